"""Models whose blocks are spread over the stages of a pipeline, against the whole model in plain torch."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks
from torch import nn
from trains_alike import LENGTH, VOCABULARY, assert_trains_alike, batch

import bmtrain as bmt
from bmtrain.checkpoint import Checkpointer
from bmtrain.context import context
from bmtrain.errors import ConfigurationError, RankDivergenceError, UnsupportedError
from bmtrain.estimate.live import LiveBytes

WIDTH = 6


class Layer(nn.Module):
    """Mixes positions where ``mask`` (B, T) lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = (x @ x.transpose(1, 2) + bias).masked_fill(~mask[:, None, :], -1e9)
        mixed = scores.softmax(-1) @ x
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(mixed))))
        return out


class Model(nn.Module):
    """Embedding and head are tied; ``bias`` is the same for all rows, and trains."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.bias = nn.Parameter(torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH))
        self.layers = layers
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x, mask = self.embedding(tokens), tokens > 2
        if hasattr(self.layers, "num_hidden"):
            x = self.layers(x, mask, self.bias)
        else:
            for layer in self.layers:
                x = layer(x, mask, self.bias)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))


class Piped(bmt.DistributedModule):
    """The same in the published style."""

    layer: type[nn.Module] = Layer

    def __init__(self, depth: int, recompute: bool | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.bias = nn.Parameter(torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH))
        self.layers = bmt.PipelineTransformerBlockList([
            bmt.Block(self.layer(), use_checkpoint=recompute, mode="PIPE") for _ in range(depth)
        ])  # fmt: skip
        self.norm = nn.LayerNorm(WIDTH)

    forward = Model.forward


def pair(depth: int = 3, recompute: bool | None = True, seed: int = 5) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    reference = Model(nn.ModuleList())
    torch.manual_seed(seed)
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    reference.layers = nn.ModuleList(Layer() for _ in range(depth))
    reference.embedding = embedding
    torch.manual_seed(seed)
    model: Any = Piped(depth, recompute)
    oracle.assert_same_weights(model, reference, exact=True)
    return reference, model


def trains(depth: int, recompute: bool | None, kind: str) -> None:
    reference, model = pair(depth, recompute)
    assert_trains_alike(model, reference, kind)


# ranks, init_distributed's arguments, blocks, recompute, optimizer
RUNS: list[Any] = [
    (2, {}, 3, True, "torch's"),
    (4, {}, 2, False, "ours"),
]  # fmt: skip
MORE = [
    (2, {"num_micro_batches": 1}, 2, False, "ours"),
    (2, {"num_micro_batches": 8}, 3, None, "ours"),
    (4, {"shard_size": 1}, 3, True, "torch's"),
    (4, {"pipe_size": 4}, 5, None, "ours"),
    (8, {"shard_size": 2}, 3, True, "torch's"),
]


@pytest.mark.parametrize(
    ("ranks", "options", "depth", "recompute", "kind"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.long) for run in MORE)],
)
def test_training_equals_the_whole_model(
    ranks: int, options: dict[str, Any], depth: int, recompute: bool | None, kind: str
) -> None:
    run_ranks(ranks, trains, depth, recompute, kind, init={"pipe_size": 2, **options})


OTHERS = {
    "Adafactor": (torch.optim.Adafactor, torch.optim.Adafactor),  # sees whole parameters, each on one rank
    "offload": (bmt.optim.AdamOffloadOptimizer, torch.optim.AdamW),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", OTHERS)
@on_ranks(2, init={"pipe_size": 2})
def test_other_optimizers(kind: str) -> None:
    reference, model = pair()
    ours, theirs = OTHERS[kind]
    optimizer, expected = ours(model.parameters(), lr=0.01), theirs(reference.parameters(), lr=0.01)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for step in range(3):
        manager.backward(model(*(bmt.shard_batch(x) for x in batch(step))))
        reference(*batch(step)).backward()
        for one in (manager, expected):
            one.step()
            one.zero_grad()
    oracle.assert_same_weights(model, reference, limit=1e-2 if kind == "offload" else 1e-4)


# ---- beside tensor parallelism
# ------------------------------------------------------------------------------------------------------------------


class SplitLayer(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = bmt.nn.ColumnParallelLinear(WIDTH, 10, gather_input=False)
        self.down = bmt.nn.RowParallelLinear(10, WIDTH, all_reduce_output=True)

    forward = Layer.forward


class SplitModel(Piped):
    layer = SplitLayer


@on_ranks(4, long=(8,), init={"pipe_size": 2, "tp_size": 2})
def test_stages_of_split_layers() -> None:
    """Three blocks, so that stages do other numbers of collectives of their slices."""
    torch.manual_seed(3)
    model: Any = SplitModel(3, recompute=True)
    bmt.init_parameters(model)
    torch.manual_seed(3)
    reference = Model(nn.ModuleList(Layer() for _ in range(3)))
    reference.load_state_dict(model.state_dict())
    optimizer, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for step in range(2):
        whole = reference(*batch(step))
        whole.backward()
        loss = model(*(bmt.shard_batch(x) for x in batch(step)))
        manager.backward(loss)
        oracle.assert_close(bmt.sum_loss(loss.detach()), whole.detach(), f"the loss of step {step}")
        norm = manager.clip_grad_norm(model.parameters(), 0.05)
        oracle.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.05), f"the norm of step {step}")
        manager.step()
        theirs.step()
        manager.zero_grad()
        theirs.zero_grad()
    oracle.assert_same_weights(model, reference)


# ---- what a call does
# ------------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Carries two values, one of them wider than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + torch.tanh(self.a(x)) * z
        return x, y + self.b(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.a.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.a(x))


class Both(bmt.DistributedModule):
    """Two pipelines, the second of two hidden values; what the first gives goes with the batch of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.encoder = bmt.PipelineTransformerBlockList([Encoder() for _ in range(2)])
        self.between = bmt.Block(nn.Linear(WIDTH, WIDTH))
        self.decoder = bmt.PipelineTransformerBlockList([Two() for _ in range(3)], num_hidden=2)
        self.head = bmt.Block(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, states: bool = False) -> torch.Tensor:
        z = self.between(self.encoder(self.embedding(x)))
        wide, narrow, *inputs = self.decoder(x, x[:, :3], z, return_hidden_states=states)
        out: torch.Tensor = self.head(wide).square().sum(1) + narrow.sum(1)
        for stacked in inputs:
            assert stacked.shape[:2] == (3, len(x))
            out = out + stacked.square().sum((0, 2))
        return out.mean()


class PlainBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.ModuleList(Encoder() for _ in range(2))
        self.between = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.ModuleList(Two() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, states: bool = False) -> torch.Tensor:
        z = self.embedding(x)
        for layer in self.encoder:
            z = layer(z)
        z, wide, narrow = self.between(z), x, x[:, :3]
        more = torch.zeros(len(x))
        for layer in self.decoder:
            if states:
                more = more + wide.square().sum(1) + narrow.square().sum(1)
            wide, narrow = layer(wide, narrow, z)
        out: torch.Tensor = self.head(wide).square().sum(1) + narrow.sum(1) + more
        return out.mean()


@on_ranks(2, init={"pipe_size": 2})
def test_two_pipelines_in_a_model() -> None:
    torch.manual_seed(1)
    reference = PlainBoth()
    torch.manual_seed(1)
    model: Any = Both()
    oracle.assert_same_weights(model, reference, exact=True)
    for states in (False, True):
        x = oracle.inputs(0)
        reference.zero_grad()
        whole = reference(x, states)
        whole.backward()
        model.zero_grad()
        loss = model(bmt.shard_batch(x), states)
        loss.backward()
        oracle.assert_close(bmt.sum_loss(loss.detach()), whole.detach(), "the loss")
        oracle.assert_same_grads(model, reference)
        # What all ranks see of a gradient that one stage has, each by itself.
        for rank in range(bmt.world_size()):
            if bmt.rank() == rank:
                found = {name for name, p in model.named_parameters() if p.grad is None}
                assert found == {name for name, q in reference.named_parameters() if q.grad is None}
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                oracle.assert_close(p.grad.norm(), q.grad.norm(), name)
    with torch.no_grad():
        x = oracle.inputs(1)
        oracle.assert_close(bmt.sum_loss(model.eval()(bmt.shard_batch(x))), reference(x), "without gradients")
    # A copy trains like the model.
    again = copy.deepcopy(model)
    for one in (model, again, reference):
        one.zero_grad()
    again.train()(bmt.shard_batch(x)).backward()
    reference(x).backward()
    oracle.assert_same_grads(again, reference)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        random.random()  # as a layer that decides whether it runs
        return x + F.dropout(self.a(x), 0.5, self.training)


def draws() -> tuple[torch.Tensor, list[float]]:
    grads = []
    for recompute in (True, False):
        torch.manual_seed(2)
        blocks = [bmt.Block(Noisy(), use_checkpoint=recompute, mode="PIPE") for _ in range(3)]
        layers: Any = bmt.PipelineTransformerBlockList(blocks)
        x = torch.ones(4, WIDTH, requires_grad=True)
        out = layers(layers(x))
        out.square().sum().backward()
        assert x.grad is not None
        grads.append([x.grad, *(bmt.gather_grad(p) for p in layers.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), "another mask when run again"
    assert len({tuple(row.tolist()) for row in out.detach()}) == 4, "rows have masks of their own"
    return out.detach(), [*torch.rand(5).tolist(), random.random()]


def test_dropout_in_stages() -> None:
    for kind in ("own", "shared"):
        (one, here), (other, there) = run_ranks(2, draws, init={"pipe_size": 2, "random": kind})
        assert not torch.equal(one, other) and here == there


# ---- state
# ------------------------------------------------------------------------------------------------------------------


Mesh = tuple[int, dict[str, Any]]


class Job:
    def __init__(self, folder: str, kind: str, dtype: torch.dtype, seed: int) -> None:
        _, self.model = pair(3, seed=seed)
        self.model.to(dtype)
        make = bmt.optim.AdamOptimizer if kind == "ours" else torch.optim.AdamW
        self.optimizer = make(self.model.parameters(), lr=0.01)
        self.manager = bmt.optim.OptimManager()
        self.manager.add_optimizer(self.optimizer)
        self.ckpt = Checkpointer(folder, model=self.model, optimizer=self.manager)

    def train(self) -> None:
        for step in range(2):
            self.manager.backward(self.model(*(bmt.shard_batch(x) for x in batch(step))))
            self.manager.step()
            self.manager.zero_grad()

    def facts(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": value.clone() for name, value in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
        return found


def saves(folder: str, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    job = Job(folder, kind, dtype, seed=5)
    job.train()
    job.ckpt.save(1)
    bmt.save(job.model, f"{folder}.pt")
    torch.save(job.optimizer.state_dict(), f"{folder}.{bmt.rank()}.optimizer")
    return job.facts()


def loads(folder: str, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    plain = Job(f"{folder}-unused", kind, dtype, seed=6)
    bmt.load(plain.model, f"{folder}.pt")
    plain.optimizer.load_state_dict(torch.load(f"{folder}.0.optimizer"))
    job = Job(folder, kind, dtype, seed=7)
    assert job.ckpt.resume()
    assert_equal([plain.facts()], [job.facts()])
    return job.facts()


def assert_equal(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    for one in found:
        assert list(one) == list(expected[0])
        for name, value in expected[0].items():
            assert torch.equal(one[name], value), name


# from a mesh, to others, optimizer, dtype
ONE: Mesh = (1, {})
PIPE: Mesh = (2, {"pipe_size": 2})
WIDE: Mesh = (4, {"pipe_size": 2})
STATES: list[Any] = [(PIPE, [ONE], "ours", torch.float32), (ONE, [PIPE], "torch's", torch.float32)]
MORE_STATES: list[Any] = [
    (PIPE, [WIDE, ONE], "torch's", torch.float32),
    (WIDE, [PIPE, (2, {}), (2, {"tp_size": 2})], "ours", torch.bfloat16),
]


@pytest.mark.parametrize(
    ("mesh", "others", "kind", "dtype"),
    [*STATES, *(pytest.param(*run, marks=pytest.mark.long) for run in MORE_STATES)],
)
def test_checkpoints_fit_every_mesh(
    mesh: Mesh, others: list[Mesh], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoints")
    saved = run_ranks(mesh[0], saves, folder, kind, dtype, init=mesh[1])
    for ranks, options in others:
        assert_equal(run_ranks(ranks, loads, folder, kind, dtype, init=options), saved)


# ---- what is refused
# ------------------------------------------------------------------------------------------------------------------


class Whole(bmt.DistributedModule):
    """A pipeline of ``blocks``, made inside a model."""

    def __init__(self, make: Callable[[], list[nn.Module]]) -> None:
        super().__init__()
        self.layers = bmt.PipelineTransformerBlockList(make())


def blocks_refused() -> None:
    shared, norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def pipe(module: nn.Module) -> nn.Module:
        return bmt.Block(module, mode="PIPE")

    def tied() -> list[nn.Module]:
        one, other = Encoder(), Encoder()
        one.a = other.a
        return [one, other]

    refused: list[tuple[str, Callable[[], list[nn.Module]]]] = [
        ('made with mode="PIPE"', lambda: [pipe(Encoder()), bmt.Block(Encoder())]),
        ("2 stages needs as many blocks at least, not 1", lambda: [pipe(Encoder())]),
        ("may be in a pipeline once", lambda: [pipe(shared)] * 2),
        ("norm of a pipeline is a BatchNorm1d", lambda: [nn.Sequential(OrderedDict(norm=norm)), Encoder()]),
        ("is shared between a block of a pipeline and another", tied),
        ("cannot be run", lambda: [nn.ModuleList([Encoder()]), Encoder()]),
    ]
    for said, make in refused:
        with pytest.raises(ConfigurationError, match=said):
            Whole(make)
    with pytest.raises(ConfigurationError, match="sharded over all ranks already"):
        pipe(bmt.Block(Encoder()))
    with pytest.raises(ConfigurationError, match=r"is in no bmt\.PipelineTransformerBlockList"):
        bmt.BMTrainModelWrapper(nn.Sequential(pipe(Encoder())))
    with pytest.raises(ConfigurationError, match="Put it into a"):
        pipe(Encoder())(torch.ones(2, WIDTH))
    made: Any = Whole(lambda: [pipe(Encoder()) for _ in range(2)])
    with pytest.raises(ConfigurationError, match="give it all of them"):
        made.layers.append(Encoder())


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.a(x)
        return out


def calls_refused() -> None:
    made: Any = Whole(lambda: [Encoder() for _ in range(2)])
    rank, x = bmt.rank(), torch.ones(4, WIDTH)
    with pytest.raises(ConfigurationError, match=r"was called by itself, but only the ranks of stage 1"):
        made.layers[1](x)
    with pytest.raises(ConfigurationError, match=r"8 rows into num_micro_batches=3 .* \[1, 2, 4, 8\]"):
        context().num_micro_batches = 3
        made.layers(x)
    context().num_micro_batches = None
    with pytest.raises(RankDivergenceError, match=rf"rank 0 \(4, {WIDTH}\), rank 1 \(3, {WIDTH}\)"):
        made.layers(x[: 4 - rank])
    with pytest.raises(RankDivergenceError, match="in the same mode"):
        made.layers.train(not rank)(x)
    made.layers.train()
    with pytest.raises(ConfigurationError, match="tensors \\(B"):
        made.layers(3)
    with pytest.raises(ConfigurationError, match="no tensors among"):
        made.layers(x, batch_related=[0])
    with pytest.raises(ConfigurationError, match=r"first sizes are \[4, 2\]"):
        made.layers(x, torch.ones(2, 1), batch_related=[0])
    outer: Any = bmt.Block(nn.Sequential(nn.Linear(WIDTH, WIDTH)), use_checkpoint=True)
    outer.forward = made.layers.forward
    with pytest.raises(ConfigurationError, match="cannot run inside of what is recomputed"):
        outer(x)
    counts: Any = Whole(lambda: [Counts() for _ in range(2)])
    with pytest.raises(ConfigurationError, match=r"changed the buffer Counts\.calls"):
        counts.layers(x)
    with pytest.raises(UnsupportedError, match=r"autograd\.grad of 'layers\.0\.a\.bias'"):
        torch.autograd.grad(made.layers(x).sum(), [made.layers[0].a.bias])
    biases = [layer.a.bias for layer in made.layers]
    (biases[0].sum() + biases[1].sum()).backward()
    with pytest.raises(UnsupportedError, match=rf"layers\.{1 - rank}, .* got a gradient from outside of it"):
        bmt.gather_grad(biases[0])


def test_refusals() -> None:
    run_ranks(2, blocks_refused, init={"pipe_size": 2}, fresh=True)
    run_ranks(2, calls_refused, init={"pipe_size": 2}, fresh=True)


def differ() -> None:
    made: Any = Whole(lambda: [Encoder() for _ in range(2)])
    x = torch.ones(4, WIDTH, requires_grad=True)
    made.layers(x).sum().backward()
    with pytest.raises(RankDivergenceError, match=r"(?s)Rank \d differs(?=.*state_dict)(?=.*pipe/control)"):
        if bmt.rank() == 1:
            made.state_dict()
        made.layers(x)


def differ_beside_a_gpu() -> None:
    """What works on a device is left to the watchdog."""
    ctx = context()
    abort = ctx.abort

    def abort_as_there() -> None:
        with mock.patch.object(ctx.device, "is_cuda", True):
            abort()

    with mock.patch.object(ctx, "abort", abort_as_there):
        differ()


def test_a_rank_that_does_something_else() -> None:
    run_ranks(2, differ, init={"pipe_size": 2}, fresh=True)
    run_ranks(2, differ_beside_a_gpu, init={"pipe_size": 2, "device": "cpu"}, fresh=True)


# ---- what user code sees
# ------------------------------------------------------------------------------------------------------------------


@on_ranks(2, init={"pipe_size": 2})
def test_values_outside_of_forwards(tmp_path: Path) -> None:
    reference, model = pair()
    names = ("layers.0.up.weight", "layers.2.down.bias", "bias")
    for name in names:
        ours, theirs = model.get_parameter(name), reference.get_parameter(name)
        assert ours.shape == theirs.shape and bmt.sum_loss(ours.data.sum()) is not None
        oracle.assert_close((ours + 1).detach(), (theirs + 1).detach(), name)
        oracle.assert_close(ours.data.norm(), theirs.data.norm(), name)
        for draw in (lambda p: p.data.normal_(), lambda p: nn.init.uniform_(p), lambda p: p.data.mul_(2)):
            torch.manual_seed(7)
            draw(ours)
            torch.manual_seed(7)
            draw(theirs)
        oracle.assert_same_weights(model, reference, exact=True)
    model.state_dict()["layers.0.down.weight"][1, 3:5] = 4.0
    with torch.no_grad():
        reference.layers[0].down.weight[1, 3:5] = 4.0
        with bmt.gathered(model, write=True):
            model.layers[1].up.bias.fill_(3.0)
        reference.layers[1].up.bias.fill_(3.0)
    oracle.assert_same_weights(model, reference, exact=True)
    with bmt.gathered(model):  # all stages' are whole: the pipeline computes with what is there
        loss = model(*(bmt.shard_batch(x) for x in batch(0)))
    oracle.assert_close(bmt.sum_loss(loss.detach()), reference(*batch(0)).detach(), "the loss inside gathered")
    bmt.save_checkpoint(model, f"{tmp_path}/model.pt")
    read = torch.load(f"{tmp_path}/model.pt", weights_only=False).state_dict()
    assert list(read) == list(reference.state_dict()) and all(
        torch.equal(read[k], v) for k, v in reference.state_dict().items()
    )
    # Under autocast, and frozen after the model was made.
    for one in (model, reference):
        one.layers[0].requires_grad_(False)
        one.layers[2].up.weight.requires_grad_(False)
        one.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = batch(1) if one is reference else tuple(bmt.shard_batch(x) for x in batch(1))
            one(*x).backward()
    oracle.assert_same_grads(model, reference, limit=0.05)
    assert {line.get("name") for line in bmt.inspect.inspect_model(model, "*")} == set(reference.state_dict())


@on_ranks(2, init={"pipe_size": 2})
def test_several_forwards_at_once() -> None:
    """Two forwards before a backward, a graph that is kept, values read in between."""
    reference, model = pair()
    one, other = ([bmt.shard_batch(x) for x in batch(step)] for step in (0, 1))
    loss = model(*one)
    assert torch.isfinite(model.layers[0].up.weight.square().sum()) and float(model.layers[2].up.bias.sum())
    (loss + model(*other)).backward()
    (reference(*batch(0)) + reference(*batch(1))).backward()
    oracle.assert_same_grads(model, reference)
    for net in (model, reference):
        net.zero_grad()
    loss = model(*one)
    loss.backward(retain_graph=True)
    assert torch.isfinite(model.layers[2].up.weight.square().sum())
    loss.backward()
    (2 * reference(*batch(0))).backward()
    oracle.assert_same_grads(model, reference)
    with torch.inference_mode():
        oracle.assert_close(bmt.sum_loss(model(*one)), reference(*batch(0)).detach(), "in inference mode")


# ---- backwards that do not reach everything
# ------------------------------------------------------------------------------------------------------------------

EMBEDDING, EVERYTHING = ("embedding", "bias"), ("",)
REACHED: list[tuple[tuple[str, ...], tuple[str, ...] | None]] = [  # frozen, and inputs of the backward; None: all
    ((), EVERYTHING),
    ((), ("embedding",)),
    ((), ("bias",)),
    ((), ("norm",)),
    ((), ("layers.0", "layers.1.up.bias")),
    ((), ("layers.2",)),
    (EMBEDDING, None),
    (EMBEDDING, EVERYTHING),
    (EMBEDDING, ("layers.0",)),
    (EMBEDDING, ("layers.2",)),
    ((*EMBEDDING, "layers.0", "layers.1"), None),
    ((*EMBEDDING, "layers.0", "layers.1"), EVERYTHING),
    ((*EMBEDDING, "layers.2"), EVERYTHING),
    ((*EMBEDDING, "layers"), EVERYTHING),
    (("layers", "norm"), EVERYTHING),
]


def reaches(recompute: bool, limit: float) -> None:
    for frozen, inputs in REACHED:
        reference, model = pair(recompute=recompute)
        for _ in range(2):
            for net in (reference, model):
                net.zero_grad()
                chosen = []
                for name, p in net.named_parameters():
                    p.requires_grad_(not name.startswith(frozen))
                    if p.requires_grad and inputs is not None and name.startswith(inputs):
                        chosen.append(p)
                loss = net(*(bmt.shard_batch(x) if net is model else x for x in batch(0)))
                loss.backward(inputs=chosen or None)
            try:
                oracle.assert_same_grads(model, reference, limit)
            except AssertionError as error:
                raise AssertionError(f"{frozen} {inputs}: {error}") from None


@pytest.mark.parametrize(
    ("ranks", "recompute", "precision"),
    [(2, True, "bf16"), (2, False, None), pytest.param(4, True, None, marks=pytest.mark.long)],
)
def test_backwards_that_reach_some_parameters(ranks: int, recompute: bool, precision: str | None) -> None:
    limit = 0.1 if precision else oracle.LIMIT
    run_ranks(ranks, reaches, recompute, limit, init={"pipe_size": 2, "precision": precision})


class Scaled(Encoder):
    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: Any = None) -> torch.Tensor:
        return super().forward(x) * scale + shift[0] * shift[1]["more"]


@on_ranks(2, init={"pipe_size": 2})
def test_backwards_that_reach_some_tensors() -> None:
    """Tensors that all stages get, asked for in every way; what is freed stays freed."""
    made: Any = Whole(lambda: [Scaled() for _ in range(2)])
    plain = [Scaled() for _ in range(2)]
    for mine, theirs in zip(made.layers, plain, strict=True):
        theirs.load_state_dict(mine.state_dict())
    x = torch.ones(4, WIDTH)

    def ask(how: str, run: Callable[[torch.Tensor, Any, Any], torch.Tensor]) -> list[torch.Tensor]:
        leaves = [torch.full((WIDTH,), value, requires_grad=True) for value in (0.5, 2.0, 3.0)]
        loss = run(leaves[0] * 1, leaves[1], {"more": leaves[2]}).square().sum()
        if how == "grad":
            return list(torch.autograd.grad(loss, leaves))
        loss.backward(inputs=leaves if how == "inputs" else None)  # type: ignore[no-untyped-call]
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(found) == 3
        return found

    def whole(scale: torch.Tensor, shift: Any, more: Any) -> torch.Tensor:
        hidden = x
        for layer in plain:
            hidden = layer(hidden, scale, (shift, more))
        return hidden

    for how in ("grad", "inputs", "all"):
        found = ask(how, lambda scale, *shift: made.layers(x, scale, shift=tuple(shift)))
        for one, other in zip(found, ask(how, whole), strict=True):
            oracle.assert_close(bmt.sum_loss(one), other, how)
    kept = torch.ones(4, WIDTH, requires_grad=True) * 1
    known, scale = weakref.ref(kept), torch.ones(WIDTH, requires_grad=True)
    gc.disable()
    try:
        out = made.layers(kept, scale, shift=(scale, {"more": scale}))
        del kept
        out.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.sum().backward()
        del out
        assert known() is None, "a circle of references holds the graph"
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        out = made.layers(x.requires_grad_(), scale, shift=(scale, {"more": scale}))
        torch.autograd.grad(out.sum(), [x], create_graph=True)[0].sum().backward()
    with torch.no_grad():
        assert not made.layers(x, scale, shift=(scale, {"more": scale})).requires_grad


@on_ranks(2, init={"pipe_size": 2})
def test_a_loss_of_some_results() -> None:
    torch.manual_seed(0)
    layers: Any = bmt.PipelineTransformerBlockList([bmt.Block(Two(), mode="PIPE") for _ in range(3)], num_hidden=2)
    plain = [Two() for _ in range(3)]
    for mine, theirs in zip(layers, plain, strict=True):
        theirs.load_state_dict(mine.state_dict())
    x = torch.ones(4, WIDTH, requires_grad=True)
    for index in range(2):
        for layer in (layers, *plain):
            layer.zero_grad()
        layers(x, x[:, :3], x)[index].sum().backward()
        both = (x, x[:, :3])
        for one in plain:
            both = one(*both, x)
        both[index].sum().backward()
        for mine, theirs in zip(layers, plain, strict=True):
            oracle.assert_same_grads(mine, theirs)


class Bias(nn.Module):
    """A backward needs nothing of what it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


def numbered_after_blocks_that_save_nothing(calls: int) -> int:
    blocks = [bmt.Block(Bias(), use_checkpoint=False, mode="PIPE") for _ in range(3)]
    layers = bmt.PipelineTransformerBlockList(blocks)
    x = torch.ones(4, WIDTH)
    for _ in range(2):
        layers.zero_grad()
        out = x
        for _ in range(calls):
            out = layers(out)
        out.square().mean().backward()
        right = 2 / WIDTH * (x[0] + calls * 3 * torch.linspace(-1, 1, WIDTH)) * calls
        for p in layers.parameters():
            oracle.assert_close(bmt.gather_grad(p), right, "a gradient")
    return context().diary.count


@pytest.mark.parametrize("calls", [1, 2])
def test_blocks_that_save_nothing(calls: int) -> None:
    """Stages have other numbers of blocks, and what they do for themselves is not numbered as what all ranks do."""
    numbered = run_ranks(4, numbered_after_blocks_that_save_nothing, calls, init={"pipe_size": 2})
    assert len(set(numbered)) == 1


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


def live_in_a_step(recompute: bool, mode: str) -> tuple[int, int]:
    """Bytes alive between forward and backward, and at their most."""
    blocks = [bmt.Block(Wide(), use_checkpoint=recompute, mode=mode) for _ in range(8)]
    layers = (bmt.PipelineTransformerBlockList if mode == "PIPE" else bmt.TransformerBlockList)(blocks)
    x = torch.randn(16, 256, 32, requires_grad=True)
    layers(x).sum().backward()  # makes what is there from then on
    gc.collect()
    with LiveBytes([x]) as counted:
        loss = layers(x).sum()
        between = counted.now
        loss.backward()
    return between, counted.peak


@pytest.mark.parametrize("recompute", [True, False])
def test_more_micro_batches_take_no_more_memory(recompute: bool) -> None:
    """GPipe keeps what all micro-batches of a call need: a batch of every rank, of this stage's blocks."""
    hidden = 16 * 256 * 32 * 4
    ((plain, _), *_) = run_ranks(2, live_in_a_step, recompute, "BLOCK")
    few, many = (
        max(run_ranks(2, live_in_a_step, recompute, "PIPE", init={"pipe_size": 2, "num_micro_batches": count}))
        for count in (2, 16)
    )
    assert few[0] == pytest.approx(many[0], rel=0.02)
    assert plain < many[0] < plain + 4 * hidden  # what comes in and goes out, and a stage's parameters
    assert many[0] > 8 * hidden
    if recompute:  # one block is computed again at a time, of one micro-batch
        assert many[1] - many[0] < (few[1] - few[0]) / 2
