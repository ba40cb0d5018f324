"""Models whose layers are split over tensor-parallel ranks, against the whole model in plain torch on one process."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks
from torch import nn
from trains_alike import LENGTH, VOCABULARY, assert_trains_alike, batch, own_slice

import bmtrain as bmt
from bmtrain.alike import digest
from bmtrain.checkpoint import Checkpointer
from bmtrain.errors import CheckpointError, ConfigurationError, ShardedAccessError, UnsupportedError
from bmtrain.objects import allgather_objects

WIDTH, INNER = 6, 10


class PlainLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class PlainModel(nn.Module):
    """Embedding and projection are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.linspace(-1, 1, LENGTH * WIDTH).view(LENGTH, WIDTH))
        self.layers = nn.ModuleList(PlainLayer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.places
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))


class Layer(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = bmt.nn.ColumnParallelLinear(WIDTH, INNER, gather_input=False)
        self.down = bmt.nn.RowParallelLinear(INNER, WIDTH, all_reduce_output=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(bmt.DistributedModule):
    def __init__(self, recompute: bool = True) -> None:
        super().__init__()
        self.embedding = bmt.nn.VPEmbedding(VOCABULARY, WIDTH, dtype=torch.float32)
        self.places = bmt.DistributedParameter(torch.linspace(-1, 1, LENGTH * WIDTH).view(LENGTH, WIDTH))
        self.layers = bmt.TransformerBlockList([bmt.Block(Layer(), use_checkpoint=recompute) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.loss = bmt.loss.FusedCrossEntropy(parallel=True)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.places
        x = self.layers(x)
        logits = self.embedding(self.norm(x), projection=True)
        loss: torch.Tensor = self.loss(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
        return loss


def pair(recompute: bool = True, seed: int = 5) -> tuple[PlainModel, Any]:
    """The whole model in plain torch and the split one, from one seed."""
    reference = PlainModel()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name == "embedding.weight":
                nn.init.normal_(p)
            elif ".up." in name or ".down." in name:
                (nn.init.xavier_normal_ if p.dim() == 2 else nn.init.zeros_)(p)
    model: Any = Model(recompute)
    torch.manual_seed(seed)
    bmt.init_parameters(model)
    return reference, model


def trains(recompute: bool, kind: str) -> None:
    reference, model = pair(recompute)
    tensors = bmt.mesh().size("tensor")
    assert model.layers[0].up.weight.shape == (INNER // tensors, WIDTH)
    assert model.layers[0].down.weight.shape == (WIDTH, INNER // tensors)
    assert_trains_alike(model, reference, kind)
    assert_alike(model)


def assert_alike(model: Any) -> None:
    """Bit for bit: what replicas keep, what tensor-parallel ranks keep of no slices, and whole state dicts."""
    parts = {name: int(digest(p.data.part.read())) for name, p in model.named_parameters()}
    every = allgather_objects(parts)
    for name, p in model.named_parameters():
        assert all(every[rank][name] == parts[name] for rank in p._flat.place_of(p._index).copies), name
    state = {name: int(digest(value)) for name, value in model.state_dict().items()}
    assert all(theirs == state for theirs in allgather_objects(state))


# ranks, shard_size, recompute, optimizer
RUNS = [(2, None, False, "torch's"), (4, None, True, "ours")]
MORE = [(2, None, True, "ours"), (4, None, False, "torch's"), (4, 1, True, "torch's"), (4, 1, False, "ours")]


@pytest.mark.parametrize(
    ("ranks", "shard_size", "recompute", "kind"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.long) for run in MORE)],
)
def test_training_equals_the_whole_model(ranks: int, shard_size: int | None, recompute: bool, kind: str) -> None:
    run_ranks(ranks, trains, recompute, kind, init={"tp_size": 2, "shard_size": shard_size})


# ---- what is refused
# ------------------------------------------------------------------------------------------------------------------


class RowsBetween(bmt.DistributedModule):
    """A norm between two layers sees this rank's rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.down = bmt.nn.RowParallelLinear(WIDTH, WIDTH, split_input=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = bmt.nn.ColumnParallelLinear(WIDTH, WIDTH, gather_output=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.up(self.norm(self.down(x)))
        return out


@on_ranks(2, init={"tp_size": 2}, fresh=True)
def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="vocab_size is 7, which cannot be split evenly over 2"):
        bmt.nn.VPEmbedding(7, 4)
    _, model = pair()
    with pytest.raises(UnsupportedError, match="element-wise"):
        bmt.optim.OptimManager().add_optimizer(torch.optim.Adafactor(model.parameters()))
    with pytest.raises(UnsupportedError, match="no weight"):
        loss = bmt.loss.FusedCrossEntropy(torch.ones(4), parallel=True)
        loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    between: Any = RowsBetween()
    bmt.init_parameters(between)
    with pytest.raises(ConfigurationError, match=r"different gradients of norm\.weight"):
        between(torch.randn(4, WIDTH)).square().mean().backward()
        bmt.optim.OptimManager().add_optimizer(bmt.optim.AdamOptimizer(between.parameters()))
        bmt.gather_grad(between.norm.weight)


DRAWS_AGAIN = (
    "where" in nn.init._no_grad_trunc_normal_.__code__.co_names
)  # what was cut off, which only some slices hold
BY_SIZE: list[Any] = [
    nn.init.xavier_uniform_, nn.init.xavier_normal_, nn.init.kaiming_normal_, nn.init.orthogonal_, nn.init.eye_,
    lambda p: nn.init.sparse_(p, 0.5), *([nn.init.trunc_normal_] if DRAWS_AGAIN else []),
]  # fmt: skip
OF_THE_WHOLE: list[Any] = [
    nn.init.kaiming_uniform_, nn.init.normal_, lambda p: p.data.uniform_(-1, 1),
    *([] if DRAWS_AGAIN else [nn.init.trunc_normal_]),
]  # fmt: skip


@on_ranks(2, init={"tp_size": 2}, drawn_on_cpu=False)
def test_slices_are_initialised_as_the_whole_or_not_at_all() -> None:
    reference, model = pair()
    slices = [p for layer in model.layers for p in (layer.up.weight, layer.down.weight)]
    wholes = [p for layer in reference.layers for p in (layer.up.weight, layer.down.weight)]
    for initialise, default_device in itertools.product(BY_SIZE, (contextlib.nullcontext(), torch.device("cpu"))):
        for p in slices:
            refused = pytest.raises(ShardedAccessError, match=r"nn\.init\.\w+ goes by the sizes or values.*init_method")
            with default_device, refused:
                initialise(p)
        nn.init.xavier_uniform_(model.places)  # no slice
    oracle.assert_same_weights(model.layers, reference.layers, exact=True)
    for initialise in OF_THE_WHOLE:
        for parameters in (slices, wholes):
            torch.manual_seed(3)
            for p in parameters:
                initialise(p)
        oracle.assert_same_weights(model.layers, reference.layers)


# ---- what user code sees
# ------------------------------------------------------------------------------------------------------------------


@on_ranks(4, long=(2,), init={"tp_size": 2}, drawn_on_cpu=False)
def test_values_outside_of_forwards(tmp_path: Path) -> None:
    reference, model = pair()
    size = bmt.mesh().size("tensor")
    names = ("embedding.weight", "layers.0.up.weight", "layers.1.down.weight", "layers.1.down.bias", "places")
    for name in names:  # numbers are those of the whole parameter
        ours, theirs = model.get_parameter(name), reference.get_parameter(name)
        for draw in (lambda p: p.data.normal_(), lambda p: nn.init.uniform_(p), lambda p: p.data.random_(3)):
            torch.manual_seed(7)
            draw(ours)
            torch.manual_seed(7)
            draw(theirs)
            oracle.assert_same_weights(model, reference, exact=True)
    torch.manual_seed(7)
    noise, expected = torch.randn_like(model.layers[0].up.weight.data), torch.empty(INNER, WIDTH)
    torch.manual_seed(7)
    assert torch.equal(noise.full_tensor(), own_slice(expected.normal_(), noise))
    with torch.no_grad():
        model.layers[0].up.weight.data.add_(noise)
    model.load_state_dict(reference.state_dict())
    oracle.assert_same_weights(model, reference, exact=True)
    # What is written into a state dict, and while parameters are whole.
    model.state_dict()["layers.0.down.weight"][1, 3:7] = 4.0
    with torch.no_grad():
        reference.layers[0].down.weight[1, 3:7] = 4.0
    oracle.assert_same_weights(model, reference, exact=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with bmt.gathered(model, write=True), torch.no_grad():  # the first rank counts that holds the same slice
            model.layers[0].up.bias.fill_(float(bmt.rank()))
            model.places.fill_(float(bmt.rank()))
    with torch.no_grad():
        reference.places.zero_()
        reference.layers[0].up.bias.copy_(torch.arange(size).repeat_interleave(INNER // size))
    oracle.assert_same_weights(model, reference, exact=True)
    # Gradients by torch.autograd.grad, and a copy of the model.
    chosen = [model.get_parameter(name) for name in names]
    found = torch.autograd.grad(model(*(bmt.shard_batch(x) for x in batch(0))), chosen)
    expected = torch.autograd.grad(reference(*batch(0)), [reference.get_parameter(name) for name in names])
    for name, one, other in zip(names, found, expected, strict=True):
        oracle.assert_close(one, own_slice(other, one), name)
    oracle.assert_same_weights(copy.deepcopy(model), reference, exact=True)
    # Averages in a file, and models.
    average = {name: p.data.clone() for name, p in model.named_parameters()}
    bmt.save_checkpoint(average, f"{tmp_path}/average.pt")
    for name, value in torch.load(f"{tmp_path}/average.pt").items():
        assert torch.equal(value, reference.state_dict()[name]), name
    with pytest.raises(UnsupportedError, match="state dict"):
        bmt.save_checkpoint(model, f"{tmp_path}/model.pt")
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight"):
        model.load_state_dict(reference.state_dict() | {"layers.0.up.weight": torch.zeros(INNER, WIDTH + 1)})
    oracle.assert_same_weights(model, reference, exact=True)


@on_ranks(2, init={"tp_size": 2})
def test_buffers_made_of_slices() -> None:
    """A buffer made of a slice is one, too."""
    reference, model = pair()
    model.layers[0].register_buffer("average", model.layers[0].down.weight.data.clone())
    reference.layers[0].register_buffer("average", reference.layers[0].down.weight.detach().clone())
    oracle.assert_same_weights(model, reference, exact=True)
    model.state_dict()["layers.0.average"][2, 3:7] = 5.0
    reference.layers[0].average[2, 3:7] = 5.0
    oracle.assert_same_weights(model, reference, exact=True)
    with torch.no_grad():
        model.layers[0].average.zero_()
    model.load_state_dict(reference.state_dict())
    oracle.assert_same_weights(model, reference, exact=True)


def built_on_meta() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    with torch.device("meta"):
        model = bmt.nn.ColumnParallelLinear(WIDTH, INNER, gather_input=False)
    return dict(bmt.BMTrainModelWrapper(nn.Sequential(bmt.Block(model))).state_dict())


def test_models_on_the_meta_device() -> None:
    (expected,) = run_ranks(1, built_on_meta)
    for found in run_ranks(2, built_on_meta, init={"tp_size": 2}):
        assert compare([found], [expected])


# ---- state
# ------------------------------------------------------------------------------------------------------------------


class Job:
    def __init__(self, folder: str, dtype: torch.dtype, kind: str, seed: int) -> None:
        _, self.model = pair(seed=seed)
        self.model.to(dtype)
        make = bmt.optim.AdamOptimizer if kind == "ours" else torch.optim.AdamW
        self.optimizer = make(self.model.parameters(), lr=0.01)
        self.manager = bmt.optim.OptimManager()
        self.manager.add_optimizer(self.optimizer)
        self.average = {name: p.data.clone() for name, p in self.model.named_parameters()}
        self.ckpt = Checkpointer(folder, model=self.model, optimizer=self.manager, average=self.average)

    def train(self) -> None:
        for step in range(2):
            self.manager.backward(self.model(*(bmt.shard_batch(x) for x in batch(step))))
            self.manager.step()
            self.manager.zero_grad()
            for name, p in self.model.named_parameters():
                self.average[name].lerp_(p.data, 0.3)

    def facts(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{number}.{name}": value for name, value in state.items()}
        for name, value in self.average.items():
            p = self.model.get_parameter(name)
            found[f"average.{name}"] = p._flat.joined(p._index, value.full_tensor())
        return {name: value.clone() for name, value in found.items()}


KINDS = [(torch.float32, "ours"), (torch.bfloat16, "ours"), (torch.bfloat16, "torch's")]


def saves(folder: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for number, (dtype, kind) in enumerate(KINDS):
        job = Job(f"{folder}/{number}", dtype, kind, 5)
        job.train()
        job.ckpt.save(2)
        bmt.save(job.model, f"{folder}/{number}.pt")
        bmt.save_checkpoint(job.optimizer.state_dict(), f"{folder}/{number}.opt")
        found.append(job.facts())
        job.ckpt.close()
    return found


def loads(folder: str, by: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for number, (dtype, kind) in enumerate(KINDS):
        job = Job(f"{folder}/{number}", dtype, kind, 8)
        if by == "checkpointer":
            assert job.ckpt.resume() == 2
        else:
            bmt.load(job.model, f"{folder}/{number}.pt")
            job.optimizer.load_state_dict(torch.load(f"{folder}/{number}.opt"))
        found.append({k: v for k, v in job.facts().items() if by == "checkpointer" or not k.startswith("average")})
        assert_alike(job.model)
        job.train()
        job.ckpt.close()
    return found


SPLIT, WHOLE, ONE = (4, {"tp_size": 2}), (2, {}), (2, {"tp_size": 2})


@pytest.mark.parametrize(
    ("before", "after"),
    [(SPLIT, WHOLE), *(pytest.param(*p, marks=pytest.mark.long) for p in ((WHOLE, ONE), (ONE, SPLIT), (WHOLE, SPLIT)))],
    ids=str,
)
def test_state_fits_any_mesh(before: Any, after: Any, tmp_path: Path) -> None:
    expected, *others = run_ranks(before[0], saves, str(tmp_path), init=before[1])
    assert all(compare(theirs, expected) for theirs in others)
    for by in ("checkpointer", "files"):
        for theirs in run_ranks(after[0], loads, str(tmp_path), by, init=after[1]):
            assert compare(theirs, expected), by


def compare(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> bool:
    for one, other in zip(found, expected, strict=True):
        for name, value in one.items():
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
    return True


def of_data() -> tuple[float, list[float]]:
    with bmt.own_random():
        own = float(torch.rand(()))
    return own, bmt.gather_result(torch.tensor([float(bmt.rank())])).tolist()


def test_ranks_that_see_the_same_data() -> None:
    """They draw the same numbers, and what they find counts once."""
    (first, rows), *others = run_ranks(4, of_data, init={"tp_size": 2})
    assert [one == first for one, _ in others] == [True, False, False] and others[1][0] == others[2][0]
    assert all(theirs == rows == [0.0, 2.0] for _, theirs in others)


class Projected(bmt.DistributedModule):
    """A head that is not tied."""

    def __init__(self) -> None:
        super().__init__()
        self.head = bmt.nn.VPProjection(VOCABULARY, WIDTH, dtype=torch.float32)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> Any:
        return bmt.loss.FusedCrossEntropy(parallel=True)(self.head(x), targets)


@on_ranks(2, init={"tp_size": 2})
def test_a_projection_of_its_own() -> None:
    reference = nn.Linear(WIDTH, VOCABULARY, bias=False)
    torch.manual_seed(3)
    nn.init.normal_(reference.weight)
    model: Any = Projected()
    torch.manual_seed(3)
    bmt.init_parameters(model)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2, eps=1e-4))
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
    assert model.head.weight.shape == (VOCABULARY // 2, WIDTH)
    assert torch.equal(model.state_dict()["head.weight"], reference.weight)
    x, targets = torch.randn(4, WIDTH), torch.tensor([0, 13, 5, 8])
    for _ in range(3):
        manager.zero_grad()
        loss = model(x, targets)
        manager.backward(loss)
        manager.step()
        expected = F.cross_entropy(reference(x), targets)
        plain.zero_grad()
        expected.backward()
        plain.step()
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.state_dict()["head.weight"].clone(), reference.weight.detach())


def double_steps() -> torch.Tensor:
    """A layer of double precision, whose gradients tensor-parallel ranks compare, after a step."""
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 3).double())
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    manager.backward(model(torch.ones(2, 4, dtype=torch.float64)).square().mean())
    manager.step()
    return model.state_dict()["weight"]


def test_gradients_in_double_precision_are_compared() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(4, 3).double()
    plain(torch.ones(2, 4, dtype=torch.float64)).square().mean().backward()
    expected = plain.weight.detach() - 0.1 * plain.weight.grad
    for weight in run_ranks(2, double_steps, init={"tp_size": 2}):
        torch.testing.assert_close(weight, expected)
