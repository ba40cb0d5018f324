"""Layers that are several in one, and embeddings with a forward of their own, split by a plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks
from torch import nn
from trains_alike import VOCABULARY, assert_trains_alike, batch

import bmtrain as bmt
from bmtrain.checkpoint import Checkpointer
from bmtrain.errors import ConfigurationError
from bmtrain.parallel.embedding import why_not_split

WIDTH, HEADS = 16, 4


class Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self, rows: int, width: int, padding: int | None = None) -> None:
        super().__init__(rows, width, padding)
        self.register_buffer("scale", torch.tensor(width**0.5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.scale.to(self.weight.dtype)  # type: ignore[operator, no-any-return]


class Attention(nn.Module):
    """``others``: how many heads of keys, and of values.  ``apart``: what belongs to a head stands together."""

    def __init__(self, others: int = HEADS, apart: bool = True) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, WIDTH + 2 * others * WIDTH // HEADS)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.n_head, self.n_others, self.apart = HEADS, others, apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, size = *x.shape[:2], WIDTH // HEADS
        y = self.c_attn(x)
        if self.apart:
            sizes = [n * size for n in (self.n_head, self.n_others, self.n_others)]
            q, k, v = (t.view(rows, length, -1, size).transpose(1, 2) for t in y.split(sizes, -1))
        else:
            q, k, v = y.view(rows, length, self.n_head, -1).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: torch.Tensor = self.c_proj(y.transpose(1, 2).reshape(rows, length, -1))
        return out


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 24), nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        out: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return out


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attn, self.mlp = Attention(**options), Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norms[0](x))
        out: torch.Tensor = x + self.mlp(self.norms[1](x))
        return out


class Model(nn.Module):
    def __init__(self, tied: bool = True, seed: int = 3, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = Scaled(VOCABULARY, WIDTH, 3)
        self.layers = nn.ModuleList(Layer(**options) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) / 4
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).view(-1, VOCABULARY), targets.reshape(-1))


Plan = dict[str, Any]
ROWWISE: Plan = {"layers.*.attn.c_proj": "rowwise", "layers.*.mlp.down_proj": "rowwise"}
PACKED: Plan = {**ROWWISE, "layers.*.attn.c_attn": "packed_colwise", "layers.*.mlp.gate_up_proj": "packed_colwise"}
NAMES = ["n_head", "n_others"]


def attn(style: Any) -> Plan:
    return {**PACKED, "layers.*.attn.c_attn": style}


# ---- what is refused
# ------------------------------------------------------------------------------------------------------------------


class Direct(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.weight) * 2


class Twice(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) + super().forward(tokens.flip(-1))


class Centred(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) - self.weight.mean(0)


class Wrapped(nn.Embedding):
    """Tokens beyond the table come round."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens % self.weight.shape[0])


class Dropped(nn.Embedding):
    """Whole rows, in training."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(tokens)
        return F.embedding(tokens, self.weight * torch.bernoulli(torch.full((VOCABULARY, 1), 0.5)))


class Typed(nn.Embedding):
    def forward(self, tokens: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) + kinds


class Behind(nn.Embedding):
    """Tokens that are no rows."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens + 2)


class Negative(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens - self.num_embeddings)


class Clamped(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens.clamp(max=len(self.weight) - 1))


class Elsewhere(nn.Embedding):
    """With a tensor that is on no device that computes."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.scale = torch.ones((), device="meta")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.scale


def refusals() -> dict[str, tuple[nn.Module, Plan]]:
    grouped = Model(others=2)
    odd = nn.Sequential(nn.ModuleDict({"in": nn.Linear(WIDTH, 26), "out": nn.Linear(13, WIDTH)}))
    halved = nn.Sequential(nn.ModuleDict({"in": nn.Linear(WIDTH, 24), "out": nn.Linear(12, WIDTH)}))
    both = Model(tied=False)
    both.layers[0].attn.c_proj.weight = both.layers[1].attn.c_proj.weight
    embeddings = {
        f"e is {made.__name__}, an embedding with a forward of its own": (
            nn.ModuleDict({"e": made(VOCABULARY, WIDTH)}),
            {"e": "rowwise"},
        )
        for made in (Direct, Twice, Centred, Wrapped, Dropped, Typed, Behind, Negative, Clamped, Elsewhere)
    }
    return embeddings | {
        'c_attn gives 48 features, and what is behind it takes 16.*"packed_colwise", 3.*"packed_colwise", 1': (
            Model(),
            attn("colwise"),
        ),
        "gate_up_proj gives 24 features, and what is behind it takes 12": (
            Model(),
            {**PACKED, "layers.*.mlp.gate_up_proj": "colwise"},
        ),
        "the 32 features that layers.0.attn.c_attn gives .* cannot be told": (grouped, PACKED),
        "the 24 features that 0.in gives .* cannot be told": (halved, {"0.in": "packed_colwise"}),
        r"c_attn.out_features is 48, which has no parts like \[1, 1, 1, 1, 1\]": (Model(), attn(("packed_colwise", 5))),
        "A part of 0.in.out_features is 13, which cannot be split evenly": (
            odd,
            {"0.in": "packed_colwise", "0.out": "rowwise"},
        ),
        "A part of layers.0.attn.c_attn.out_features is 3, ": (Model(), attn(("packed_colwise", [14, 1, 1]))),
        r"'packed_colwise', 0\).*parts of its output": (Model(), attn(("packed_colwise", 0))),
        r"'packed_colwise', \[2, 'a'\].*parts of its output": (Model(), attn(("packed_colwise", [2, "a"]))),
        r"\('rowwise', 2\), which is not supported": (Model(), attn(("rowwise", 2))),
        "'packed_rowwise', which is not supported": (Model(), attn("packed_rowwise")),
        'embedding is an embedding, which can be split "rowwise" only': (Model(), {"embedding": ("packed_colwise", 2)}),
        "embedding.weight is also the weight": (Model(), {"head": ("packed_colwise", 2)}),
        "is also the weight of another layer, which the plan splits otherwise": (
            both,
            {"layers.0.attn.c_proj": "rowwise_rep", "layers.1.attn.c_proj": "colwise_rep"},
        ),
    }


@on_ranks(2, init={"tp_size": 2})
def test_what_cannot_be_told_is_refused_and_nothing_changes() -> None:
    for message, (model, plan) in refusals().items():
        before = dict(model.named_modules())
        kinds = [type(module) for module in before.values()]
        with pytest.raises(ConfigurationError, match=message):
            bmt.parallelize_module(model, plan, NAMES)
        after = dict(model.named_modules())
        assert after == before and [type(module) for module in after.values()] == kinds, message


class Tried(nn.Embedding):
    """Has tensors everywhere, makes one, draws, and keeps what it has seen."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("calls", torch.zeros(()))
        self.gain = nn.Parameter(torch.ones(width))
        self.inner = nn.Sequential(nn.Linear(width, width))
        self.inner[0].bias = self.gain
        self.plain, self.named = torch.ones(()), {"one": [torch.ones(())]}
        self.also, self.drop, self.seen = self.weight, nn.Dropout(0.5), []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(width := self.embedding_dim) + torch.rand(width)
        self.calls += 1
        self.plain += 1
        self.named["one"][0] += 1
        self.seen.append(torch.ones(()))
        assert self.inner[0].bias is self.gain and self.also is self.weight
        tensors = [tokens, made, self.weight, self.gain, self.calls, self.plain, *self.named["one"]]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert self.weight.untyped_storage().nbytes() <= 4 * (len(self.weight) + width)
        return self.inner(self.drop(super().forward(tokens))) * self.plain + self.named["one"][0] + made


def test_a_forward_is_tried_on_the_cpu_and_leaves_nothing() -> None:
    module = Tried(1000, WIDTH)
    before, drawn = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    elsewhere = torch.device("cuda" if torch.cuda.is_available() else "meta")
    if elsewhere.type == "cuda":
        module = module.to(elsewhere)
    with elsewhere:
        assert why_not_split(module, 2) is None
    assert all(torch.equal(value.cpu(), before[name]) for name, value in module.state_dict().items())
    assert module.plain == 1 and module.named["one"][0] == 1 and not module.seen and module.training
    assert type(module) is Tried and module.also is module.weight and torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.float64])
def test_a_table_of_any_type_is_tried(dtype: torch.dtype) -> None:
    assert why_not_split(Scaled(VOCABULARY, WIDTH, 3).to(dtype), 2) is None
    for kind in (Wrapped, Clamped):
        assert "goes by nothing else" in str(why_not_split(kind(50000, WIDTH).to(dtype), 2)), kind


@on_ranks(2, init={"tp_size": 2})
def test_parts_of_a_parameter_that_are_none() -> None:
    for shape, dim, parts in (((4, 6), 1, (1, 1)), ((5, 2), 0, (1, 1)), ((6, 2), 0, (2, 1, 1))):
        with pytest.raises(ConfigurationError, match="no parts of a slice"):
            bmt.DistributedParameter(torch.zeros(shape), tp_mode=True, tp_split_dim=dim, tp_parts=parts)


# ---- what is right
# ------------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], Plan]] = {
    "found out": ({}, PACKED),
    "said": ({}, attn(("packed_colwise", 3))),
    "fewer keys": ({"others": 2}, attn(("packed_colwise", [16, 8, 8]))),
    "heads apart": ({"apart": False}, attn(("packed_colwise", 1))),
    "all split": ({}, {**PACKED, "embedding": "rowwise", "head": "colwise_rep"}),
    "found by its head": ({}, {**PACKED, "head": "colwise_rep"}),
    "not tied": ({"tied": False}, {**PACKED, "embedding": "embedding_rowwise"}),
}


def split(case: str, seed: int = 3) -> Any:
    options, plan = CASES[case]
    model = Model(seed=seed, **options)
    kind = type(model.embedding)
    bmt.parallelize_module(model, plan, NAMES)
    assert isinstance(model.embedding, kind)
    return bmt.BMTrainModelWrapper(model)


@on_ranks(4, long=(2,), init={"tp_size": 2})
def test_split_models_are_the_whole_one() -> None:
    for case, (options, _) in CASES.items():
        model, reference = split(case), Model(**options)
        assert_trains_alike(model, reference, "ours" if case == "said" else "torch's", ("c_attn", "gate_up"))
        model.load_state_dict(Model(seed=8, **options).state_dict())
        oracle.assert_same_weights(model, Model(seed=8, **options), exact=True)
        with pytest.raises(Exception, match="c_attn"):
            model.load_state_dict(reference.state_dict() | {"layers.0.attn.c_attn.weight": torch.zeros(3, WIDTH)})


class Brings(Model):
    """A plan as of Hugging Face, whose packed layers have two parts."""

    _tp_plan: ClassVar = {"layers.*.mlp.gate_up_proj": "packed_colwise", "layers.*.mlp.down_proj": "rowwise"}


@on_ranks(2, init={"tp_size": 2})
def test_a_plan_that_came_along() -> None:
    assert_trains_alike(bmt.BMTrainModelWrapper(bmt.parallelize_module(Brings())), Model())


@on_ranks(2, init={"tp_size": 2}, drawn_on_cpu=False)
def test_init_parameters_and_random_writes_are_of_the_whole() -> None:
    model, reference = split("fewer keys"), Model(others=2)
    for net in (model, reference):
        torch.manual_seed(1)
        with torch.no_grad():
            for _, p in sorted(net.named_parameters()):
                p.data.normal_()
    oracle.assert_same_weights(model, reference, exact=True)


@on_ranks(2, 4, init={"tp_size": 2})
def test_values_outside_of_forwards(tmp_path: Path) -> None:
    model, reference = split("fewer keys"), Model(others=2)
    weight: Any = model.layers[0].attn.c_attn.weight
    whole_one = reference.layers[0].attn.c_attn.weight.detach()
    assert torch.equal(weight.gather_all().cpu(), whole_one) and weight._tp_original_shape == whole_one.shape
    oracle.assert_same_weights(copy.deepcopy(model), reference, exact=True)
    state = model.state_dict()
    for written in (state, reference.state_dict()):
        written["layers.0.attn.c_attn.weight"][5:30, 3] = 7.0
    oracle.assert_same_weights(model, reference, exact=True)
    bmt.save_checkpoint({name: p.data.clone() for name, p in model.named_parameters()}, str(tmp_path / "average.pt"))
    for name, value in torch.load(tmp_path / "average.pt").items():
        assert torch.equal(value, reference.state_dict()[name]), name
    with bmt.gathered(weight, write=True), torch.no_grad():
        weight.zero_()
    with torch.no_grad():
        reference.layers[0].attn.c_attn.weight.zero_()
    oracle.assert_same_weights(model, reference, exact=True)


# ---- state
# ------------------------------------------------------------------------------------------------------------------


def facts(folder: str, case: str, saves: bool) -> dict[str, torch.Tensor]:
    """Of a job that has trained, or has gone on from its checkpoint."""
    model = split(case, 3 if saves else 8) if bmt.mesh().size("tensor") > 1 else whole(case, 3 if saves else 8)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=0.01)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    ckpt = Checkpointer(folder, model=model, optimizer=manager)
    if saves:
        manager.backward(model(*bmt.shard_batch(batch(0))))
        manager.step()
        ckpt.save(1)
    else:
        assert ckpt.resume() == 1
    ckpt.close()
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value.clone() for name, value in state.items()}
    return found


def whole(case: str, seed: int) -> Any:
    return bmt.BMTrainModelWrapper(Model(seed=seed, **CASES[case][0]))


SPLIT, APART, ONE = (4, {"tp_size": 2}), (2, {}), (2, {"tp_size": 2})


@pytest.mark.parametrize("case", ["fewer keys", "all split"])
@pytest.mark.parametrize(("before", "after"), [(SPLIT, APART), (APART, ONE), (ONE, SPLIT)], ids=str)
def test_state_fits_any_mesh(before: Any, after: Any, case: str, tmp_path: Path) -> None:
    expected, *others = run_ranks(before[0], facts, str(tmp_path), case, True, init=before[1])
    for theirs in others + run_ranks(after[0], facts, str(tmp_path), case, False, init=after[1]):
        for name, value in expected.items():
            assert torch.equal(theirs[name], value), name
