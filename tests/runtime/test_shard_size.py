"""Parameters spread over groups of ranks and replicated over the groups.

Whole training runs are in ``test_parity``, checkpoints from any mesh to any other in ``checkpoint/test_checkpointer``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.alike import digest
from bmtrain.context import context
from bmtrain.errors import CheckpointError, RankDivergenceError
from bmtrain.objects import allgather_objects

on_meshes = pytest.mark.parametrize("mesh", [(2, 2), pytest.param((2, 1), marks=pytest.mark.long)], ids=str)


def on_mesh(mesh: tuple[int, int], function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """``function`` on replicas x shards."""
    init = {"shard_size": mesh[1], **options.pop("init", {})}
    return run_ranks(mesh[0] * mesh[1], function, *args, init=init, **options)


def net(names: models.Names) -> Any:
    """Sizes at which parts begin and end inside rows, a frozen layer, and parameters of one element."""

    class Layer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.gain = nn.Linear(6, 35), nn.Linear(35, 6), names.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).tanh()) * self.gain

    class Net(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layers = nn.Linear(6, 6), names.stack(Layer() for _ in range(3))
            self.layers[1].up.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
            return x

    return Net()


def assert_replicas_agree(model: Any) -> None:
    """Bit for bit, of what rests in the shards."""
    parts = [int(digest(p.data.part.read())) for p in model.parameters()]
    every = allgather_objects(parts)
    assert all(every[rank] == parts for rank in bmt.mesh().group("replicate"))


# ---- training
# ------------------------------------------------------------------------------------------------------------------


def scaled_steps(make: str) -> None:
    """A loss scale, accumulation, clipping, an average of the weights, and a step that one rank's overflow undoes."""
    reference, model = oracle.pair(net)
    optimizers: dict[str, Callable[[Any], Any]] = {
        "ours": lambda params: bmt.optim.AdamOptimizer(params, lr=0.01, weight_decay=0.1),
        "torch's": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
        "tensors": lambda params: torch.optim.Adafactor(params, lr=0.05),
        "whole": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizers[make](trained)
    theirs = (torch.optim.Adafactor if make == "tensors" else torch.optim.AdamW)(
        [p for p in reference.parameters() if p.requires_grad],
        **({"lr": 0.05} if make == "tensors" else {"lr": 0.01, "weight_decay": 0.1}),
    )
    manager = bmt.optim.OptimManager(loss_scale=1024.0, loss_scale_steps=100)
    manager.add_optimizer(optimizer, step_on=make if make in ("tensors", "whole") else None)
    average = [p.data.clone() for p in model.parameters()]
    their_average = [p.detach().clone() for p in reference.parameters()]
    for step in range(4):
        for micro in range(2):
            x = oracle.inputs(2 * step + micro)
            loss = oracle.mean(model(models.share(x))) / 2
            whole = oracle.mean(reference(x)) / 2
            if step == 1 and bmt.rank() == bmt.world_size() - 1:
                loss = loss * float("inf")
            manager.backward(loss)
            whole.backward()
        if step == 1:
            manager.step()
            assert manager.loss_scale == 512.0
        else:
            norm = manager.clip_grad_norm(trained, 0.01)
            expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
            oracle.assert_close(norm, expected, f"the norm of step {step}")
            manager.step()
            theirs.step()
        manager.zero_grad()
        theirs.zero_grad()
        with torch.no_grad():
            for mine, p in zip(average, model.parameters(), strict=True):
                mine.lerp_(p.data, 0.3)
            for one, q in zip(their_average, reference.parameters(), strict=True):
                one.lerp_(q, 0.3)
    oracle.assert_same_weights(model, reference, limit=1e-4)
    for (name, _), mine, one in zip(model.named_parameters(), average, their_average, strict=True):
        oracle.assert_close(mine.full_tensor(), one, f"the average of {name}", 1e-4)
    assert_replicas_agree(model)


KINDS = [("ours", (2, 2)), ("torch's", (2, 1)), ("tensors", (2, 2)), ("whole", (2, 1))]
MORE = [(make, (2, 3 - shards)) for make, (_, shards) in KINDS]


@pytest.mark.parametrize(
    ("make", "mesh"), [*KINDS, *(pytest.param(*row, marks=pytest.mark.long) for row in MORE)], ids=str
)
def test_training_with_every_kind_of_optimizer(make: str, mesh: tuple[int, int]) -> None:
    on_mesh(mesh, scaled_steps, make)


def low_precision() -> None:
    """Weights and wire in bf16: the replicas' sums are rounded alike, and masters stay equal."""
    torch.manual_seed(0)
    model: Any = net(models.sharded()).bfloat16()
    optimizer = bmt.optim.AdamOptimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    losses = []
    for _ in range(6):
        loss = oracle.mean(model(models.share(oracle.inputs(0)).bfloat16()))
        manager.backward(loss)
        manager.clip_grad_norm(model.parameters(), 0.5)
        manager.step()
        manager.zero_grad()
        losses.append(float(bmt.sum_loss(loss.detach())))
    assert losses[-1] < 0.9 * losses[0]
    assert_replicas_agree(model)
    states = optimizer.state_dict()["state"]
    sums = [float(state[name].double().sum()) for state in states.values() for name in ("master", "exp_avg")]
    assert all(theirs == sums for theirs in allgather_objects(sums))


@on_meshes
def test_low_precision_stays_equal(mesh: tuple[int, int]) -> None:
    on_mesh(mesh, low_precision)


# ---- what user code sees
# ------------------------------------------------------------------------------------------------------------------


def values_outside() -> None:
    reference, model = oracle.pair(net)
    x = oracle.inputs(0)
    params, theirs = list(model.parameters()), list(reference.parameters())
    weight, same = model.layers[0].up.weight, reference.layers[0].up.weight
    # Reductions count every element once.
    for function in (torch.sum, torch.norm, torch.std, torch.max):
        oracle.assert_close(function(weight.data), function(same.data), function.__name__)
    assert torch.equal(weight.data.full_tensor(), same)
    oracle.assert_close(torch._foreach_norm([p.data for p in params])[2], theirs[2].norm(), "foreach")
    # Gradients by torch.autograd.grad and by backward.
    (found,) = torch.autograd.grad(oracle.mean(model(models.share(x))), [weight])
    (expected,) = torch.autograd.grad(oracle.mean(reference(x)), [same])
    oracle.assert_close(found, expected, "autograd.grad")
    oracle.mean(model(models.share(x))).backward()
    oracle.mean(reference(x)).backward()
    bmt.optim.OptimManager().add_optimizer(torch.optim.SGD(params, lr=0.1))
    oracle.assert_same_grads(model, reference)
    oracle.assert_close(weight.grad.norm(), same.grad.norm(), "norm of .grad")
    # Writes reach all replicas, and what ranks do differently becomes rank 0's.
    with torch.no_grad():
        weight.data.mul_(2.0)
        weight.data.add_(torch.ones(35, 6))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with bmt.gathered(model.first, write=True):
                model.first.weight.fill_(float(bmt.rank()))
    oracle.assert_close(weight.data.full_tensor(), same.detach() * 2 + 1, "written")
    assert not model.state_dict()["first.weight"].any()
    assert_replicas_agree(model)
    # Numbers that this rank alone draws do not make replicas differ.
    with torch.no_grad(), bmt.own_random():
        weight.data.normal_()
        noise = torch.randn_like(model.layers[2].down.weight.data)
        model.layers[2].down.weight.data.add_(noise)
    assert_replicas_agree(model)
    state = {name: int(digest(value)) for name, value in model.state_dict().items()}
    assert all(theirs == state for theirs in allgather_objects(state))


@on_meshes
def test_values_and_gradients_outside_of_forwards(mesh: tuple[int, int]) -> None:
    on_mesh(mesh, values_outside)


class Remembering(nn.Module):
    """Writes to its own weights in its forward, each rank what its own share of the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.zeros(5, 6), requires_grad=False)
        self.map = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.book.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.map(x) + self.book.sum(0)


def writes_in_a_forward() -> None:
    model: Any = bmt.BMTrainModelWrapper(nn.Sequential(bmt.Block(Remembering()), nn.Linear(6, 6)))
    optimizer = bmt.optim.AdamOptimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for step in range(3):
        manager.backward(oracle.mean(model(models.share(oracle.inputs(step)))))
        manager.step()
        manager.zero_grad()
    state = {name: int(digest(value)) for name, value in model.state_dict().items()}
    assert model.state_dict()["0.book"].any()
    assert all(theirs == state for theirs in allgather_objects(state))
    assert_replicas_agree(model)


@on_meshes
def test_what_each_rank_writes_in_a_forward(mesh: tuple[int, int]) -> None:
    on_mesh(mesh, writes_in_a_forward)


def one_rank_s_states(wrong: tuple[int, int]) -> None:
    _, model = oracle.pair(net)
    optimizer = bmt.optim.AdamOptimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    oracle.mean(model(models.share(oracle.inputs(0)))).backward()
    optimizer.step()
    own = optimizer.state_dict(gather=False)
    assert own["shard_of"] == (bmt.mesh().get_local_rank("shard"), bmt.mesh().size("shard"))
    optimizer.load_state_dict(own)
    with pytest.raises(CheckpointError, match="shard 0 of 3"):
        optimizer.load_state_dict(own | {"shard_of": wrong})


def test_states_of_one_shard() -> None:
    on_mesh((2, 2), one_rank_s_states, (0, 3))


def with_plain_parameters() -> None:
    """What no distributed module holds is averaged over all ranks."""
    plain = nn.Linear(6, 6)
    reference = nn.Linear(6, 6)
    reference.load_state_dict(plain.state_dict())
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(plain.parameters(), lr=0.01))
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0)
    manager.backward(oracle.mean(plain(models.share(oracle.inputs(0)))))
    oracle.mean(reference(oracle.inputs(0))).backward()
    norm = manager.clip_grad_norm(plain.parameters(), 0.01)
    oracle.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.01), "norm")
    manager.step()
    theirs.step()
    oracle.assert_same_weights(plain, reference)


def test_parameters_of_no_module() -> None:
    on_mesh((2, 2), with_plain_parameters)


def saves(path: str) -> dict[str, torch.Tensor]:
    _, model = oracle.pair(net)
    with torch.no_grad():
        model.layers[0].up.weight.data.mul_(3.0)
    bmt.save(model, path)
    return dict(model.state_dict())


def loads(path: str) -> dict[str, torch.Tensor]:
    _, model = oracle.pair(net, seed=8)
    bmt.load(model, path)
    assert_replicas_agree(model)
    return dict(model.state_dict())


def test_files_fit_any_mesh(tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt")
    expected = on_mesh((2, 2), saves, path)[0]
    plain = torch.load(path)
    for theirs in (plain, *on_mesh((2, 1), loads, path), *run_ranks(2, loads, path)):
        assert list(theirs) == list(expected)
        assert all(torch.equal(theirs[name], value) for name, value in expected.items())


# ---- the diary and the watchdog
# ------------------------------------------------------------------------------------------------------------------


def diary_of_steps() -> tuple[list[Any], set[str]]:
    _, model = oracle.pair(net)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer([p for p in model.parameters() if p.requires_grad], lr=0.01))
    before = context().diary.count
    for step in range(2):
        manager.backward(oracle.mean(model(models.share(oracle.inputs(step)))))
        manager.step()
        manager.zero_grad()
    entries = [entry for entry in context().diary.last(10000) if entry.number >= before]
    reductions = {(entry.operation, entry.unit) for entry in entries if entry.group == "reduce/replicas"}
    assert {operation for operation, _ in reductions} == {"all_reduce"}
    assert {"layers.0", "layers.2"} <= {unit for _, unit in reductions}
    return [entry[1:5] for entry in entries], {entry.group for entry in entries}


def test_all_groups_write_the_same_diary() -> None:
    results = on_mesh((2, 2), diary_of_steps)
    assert all(theirs[0] == results[0][0] for theirs in results)
    assert {"gather", "reduce", "reduce/replicas"} <= results[0][1]


def parts_ways() -> None:
    """The other replica does not step; nobody of its own shard group misses it."""
    _, model = oracle.pair(net)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer([p for p in model.parameters() if p.requires_grad], lr=0.01))
    manager.backward(oracle.mean(model(models.share(oracle.inputs(0)))))
    with pytest.raises(RankDivergenceError, match="rank"):
        if bmt.mesh().get_local_rank("replicate"):
            model.layers[0].up.weight.data.mul_(2.0)
            model.state_dict()
        else:
            manager.step()
            model.state_dict()
            manager.step()


def test_a_replica_that_differs_is_named() -> None:
    # On GPUs the watchdog ends a rank that waits; it cannot raise.
    on_mesh((2, 2), parts_ways, fresh=True, timeout=60, init={"device": "cpu"})
