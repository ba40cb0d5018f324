"""Whether there is a gradient, read by one rank alone; and whole gradients, gathered once for all that lie together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import RanksFailed, on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context

WIDTH = oracle.WIDTH


class Branches(nn.Module):
    """A body, a branch for each rank, one for all, one for nobody, and a frozen one."""

    def __init__(self, names: models.Names) -> None:
        super().__init__()
        self.body = names.stack([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.branches = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.both, self.nobodys, self.frozen = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, which: tuple[int, ...]) -> torch.Tensor:
        for layer in self.body:
            x = torch.tanh(layer(x))
        out = self.frozen(self.both(x))
        for number in which:
            out = out + self.branches[number](x) * (self.scale if number else 1)
        return out  # type: ignore[no-any-return]


class Pair:
    """The plain model and the sharded one: each rank gives its rows to branches of its own."""

    def __init__(self) -> None:
        def build(names: models.Names) -> Any:
            made = Branches(names)
            return made if names.Module is nn.Module else bmt.BMTrainModelWrapper(made)

        self.plain, self.model = oracle.pair(build)

    def backward(self, step: int, *which: tuple[int, ...], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank r's rows go through branches ``which[r]``, or the last ones named."""
        ranks, x = bmt.world_size(), oracle.inputs(step)
        chosen = [which[min(rank, len(which) - 1)] for rank in range(ranks)]
        outs = [self.plain(rows, some) for rows, some in zip(x.chunk(ranks), chosen, strict=True)]
        theirs, ours = oracle.mean(torch.cat(outs)), oracle.mean(self.model(models.share(x), chosen[bmt.rank()]))
        theirs.backward(**options)  # type: ignore[no-untyped-call]
        ours.backward(**options)  # type: ignore[no-untyped-call]
        return theirs, ours

    def on_both(self, change: Callable[[Any], None]) -> None:
        change(self.plain)
        change(self.model)

    def looks(self) -> None:
        """One rank after the other looks by itself; then all of them at the values."""
        for rank in range(bmt.world_size()):
            if bmt.rank() == rank:
                for (name, ours), theirs in zip(self.model.named_parameters(), self.plain.parameters(), strict=True):
                    assert (ours.grad is None) == (theirs.grad is None), (rank, name)
                    if ours.grad is not None:
                        assert ours.grad.shape == theirs.shape and ours.grad.dtype == theirs.dtype
                        assert ours.grad.device == ours.device and not ours.grad.requires_grad
                        assert ours.grad.numel() == theirs.numel() and ours.grad.dim() == theirs.dim()
                        assert ours.grad.size() == theirs.size() and ours.grad.is_floating_point()
                        assert not ours.grad.is_sparse and ours.grad.layout == theirs.layout
                        assert ours.grad.nbytes == theirs.nbytes and ours.grad.element_size() == theirs.element_size()
                        assert not theirs.dim() or len(ours.grad) == len(theirs)
                        assert repr(ours.grad)
        for (name, ours), theirs in zip(self.model.named_parameters(), self.plain.parameters(), strict=True):
            found = bmt.gather_grad(ours)
            assert (found is None) == (theirs.grad is None), name
            if found is not None:
                assert theirs.grad is not None
                oracle.assert_close(found, theirs.grad, name)


def _drop(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for parameter in getattr(model, name).parameters():
            parameter.grad = None

    return change


@on_ranks(1, 2, 3)
def test_branches_that_other_ranks_use() -> None:
    pair = Pair()
    pair.looks()
    pair.backward(0, (0,), (1,), (1, 2))
    pair.looks()
    pair.on_both(lambda model: model.zero_grad())
    pair.looks()
    pair.backward(1, ())
    pair.looks()
    pair.backward(2, (), (2,))  # another one is added
    pair.looks()
    pair.on_both(lambda model: model.zero_grad(set_to_none=False))
    pair.looks()


@on_ranks(1, 2, 3)
def test_a_second_backward_through_the_same_graph() -> None:
    pair = Pair()
    losses = pair.backward(0, (0,), (1,), retain_graph=True)
    pair.looks()
    pair.on_both(lambda model: model.zero_grad())
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    pair.looks()


@on_ranks(1, 2, 3)
def test_gradients_that_are_dropped_and_set() -> None:
    pair = Pair()
    pair.backward(0, (0,), (1,))
    pair.on_both(_drop("both"))
    pair.on_both(_drop("branches"))
    pair.looks()
    pair.backward(1, (), (2,))
    pair.looks()
    pair.on_both(_drop("branches"))
    for model in (pair.plain, pair.model):
        model.nobodys.weight.grad = torch.ones(WIDTH, WIDTH)
    pair.looks()


@on_ranks(1, 2, 3)
def test_what_is_set_where_nothing_came() -> None:
    pair = Pair()
    for model in (pair.plain, pair.model):
        model.nobodys.weight.grad = torch.ones(WIDTH, WIDTH)
    pair.looks()
    pair.backward(0, (), (1,))
    pair.looks()


@on_ranks(1, 2, 3)
def test_a_branch_that_is_frozen_with_its_gradient_stays_as_it_is() -> None:
    pair = Pair()
    pair.backward(0, (0,), (1,))
    pair.on_both(lambda model: model.branches.requires_grad_(False))
    pair.looks()
    pair.on_both(lambda model: model.branches.requires_grad_(True))
    pair.looks()
    pair.backward(1, (2,), ())
    pair.looks()


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, bmt.optim.AdamOptimizer])
def test_training_with_looks_of_one_rank_between_all_steps(optimizer: Any) -> None:
    pair, kind = Pair(), torch.optim.AdamW if optimizer is bmt.optim.AdamOptimizer else optimizer
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1} | ({} if kind is torch.optim.SGD else {"eps": 1e-3})
    theirs, ours = kind(pair.plain.parameters(), **options), optimizer(pair.model.parameters(), **options)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(ours)
    for step in range(4):
        for part in range(3):
            pair.backward(3 * step + part, (0,) if part == 1 else (), (step % 3,))
            if bmt.rank() == part:
                assert pair.model.both.weight.grad is not None
        pair.looks()
        manager.clip_grad_norm(ours.param_groups, 0.1, eps=1e-6)
        torch.nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.1)
        pair.looks()
        manager.step()
        theirs.step()
        if step % 2:
            manager.zero_grad()
            theirs.zero_grad()
        pair.looks()
    oracle.assert_same_weights(pair.model, pair.plain, limit=1e-4)


@on_ranks(2, 3)
def test_a_parameter_of_no_module_that_one_rank_uses() -> None:
    model = bmt.BMTrainModelWrapper(nn.Linear(WIDTH, WIDTH))
    temperature, other = (torch.ones((), requires_grad=True) for _ in range(2))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD([*model.parameters(), temperature, other], lr=0.1))
    for step in range(3):
        out = model(models.share(oracle.inputs(step)))
        loss = oracle.mean(out * temperature if bmt.rank() == 0 else out)
        loss.backward()  # type: ignore[no-untyped-call]
        if bmt.rank() == 1:
            assert temperature.grad is not None and other.grad is None and model.weight.grad is not None
        manager.step()
        manager.zero_grad()
        if bmt.rank() == 0:
            assert temperature.grad is None and model.weight.grad is None


def _reads_alone(what: str) -> None:
    model = bmt.BMTrainModelWrapper(nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for step in range(12):
        oracle.mean(model(models.share(oracle.inputs(step)))).backward()  # type: ignore[no-untyped-call]
        if step == 8 and bmt.rank() == 0:
            if what == "norm":
                print(float(model.weight.grad.norm()))
            elif what == "whole":
                print(bmt.gather_grad(model.weight))
            else:
                optimizer.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("what", ["norm", "whole", "step"])
def test_values_that_one_rank_asks_for_alone_say_what_to_write(what: str) -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(2, _reads_alone, what, fresh=True)
    if what == "step" and os.environ.get("BMTRAIN_TEST_DEVICE") == "cuda":
        assert "exit code 70" in str(
            caught.value
        )  # the gather behind the step waits on the device: the watchdog ends it
        return
    words = "step() on every rank" if what == "step" else "every rank computes: norm = p.grad.norm()"
    assert "RankDivergenceError" in str(caught.value) and words in str(caught.value), str(caught.value)


# ---- whole gradients
# ---------------------------------------------------------------------------------------------------------------------


class _Gathers:
    """Counts what is gathered."""

    def __init__(self) -> None:
        self._group: Any = context().shard_group
        self._inner, self.count = self._group.all_gather, 0
        self._group.all_gather = self._gather

    def _gather(self, *args: Any) -> None:
        self.count += 1
        self._inner(*args)

    def close(self) -> None:
        del self._group.all_gather


@on_ranks(2, 3)
def test_a_flat_shard_is_gathered_once_for_all_its_gradients() -> None:
    pair = Pair()
    pair.backward(0, (0,), (1,))
    gathers = _Gathers()
    flats = {id(p._flat) for p in pair.model.parameters() if bmt.gather_grad(p) is not None}
    assert gathers.count == len(flats) and len(flats) < len(list(pair.model.parameters())) / 2
    gathers.close()


@on_ranks(1, 2, 3)
def test_a_whole_gradient_is_never_that_of_before() -> None:
    pair = Pair()
    ours = torch.optim.SGD(pair.model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(pair.plain.parameters(), lr=0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(ours)

    def scale(model: Any) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                with torch.no_grad():
                    parameter.grad.mul_(2)

    def write(model: Any) -> None:
        model.both.weight.grad.fill_(3)
        model.both.bias.grad.data.add_(1)

    def replace(model: Any) -> None:
        model.both.weight.grad = torch.full((WIDTH, WIDTH), 0.5)

    def clip(model: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.both.parameters(), 0.01)

    for step in range(2):
        pair.backward(step, (0,), (1,))
        pair.looks()
        for change in (scale, write, replace, clip):
            pair.on_both(change)
            pair.looks()
        pair.backward(step, (1,), (2,))
        pair.looks()
        manager.clip_grad_norm(ours.param_groups, 0.05, eps=1e-6)
        torch.nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.05)
        pair.looks()
        manager.clip_grad_norm(pair.model.both.parameters(), 0.001, eps=1e-6)
        torch.nn.utils.clip_grad_norm_(pair.plain.both.parameters(), 0.001)
        pair.looks()
        manager.step()
        theirs.step()
        pair.looks()
        pair.on_both(lambda model: model.zero_grad(set_to_none=False))
        pair.looks()
        pair.on_both(lambda model: model.zero_grad())
        pair.looks()


@on_ranks(2)
def test_a_whole_gradient_that_was_given_may_be_written() -> None:
    pair = Pair()
    pair.backward(0, (0,), (1,))
    given = bmt.gather_grad(pair.model.both.weight)
    assert given is not None
    given.zero_()
    pair.looks()


@on_ranks(2)
def test_whole_gradients_go_when_something_changes() -> None:
    pair = Pair()
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(pair.model.parameters(), lr=0.1))
    pools: Any = context().engine.schedule.pools
    x = models.share(oracle.inputs(0))

    def gather() -> None:
        for parameter in pair.model.parameters():
            bmt.gather_grad(parameter)
        assert 0 < len(pools.whole_gradients._kept) <= 2, "of one unit"

    pair.backward(0, (0,), (1,))
    gather()
    manager.step()
    assert not pools.whole_gradients._kept
    gather()
    with torch.no_grad():
        pair.model(x, ())
    assert not pools.whole_gradients._kept
    gather()
    pair.model(x, ()).sum().backward()
    assert not pools.whole_gradients._kept
    gather()
    manager.zero_grad()
    assert not pools.whole_gradients._kept


@on_ranks(2, 3)
def test_ranks_tell_each_other_once_of_gradients_that_all_have() -> None:
    pair = Pair()
    oracle.assert_same_grads(pair.model, pair.plain)
    control: Any = context().control
    inner, count = control.start_all_reduce, [0]

    def start(tensor: torch.Tensor, op: Any = "sum") -> Callable[[], None]:
        count[0] += tensor.dtype == torch.int32
        return inner(tensor, op)  # type: ignore[no-any-return]

    control.start_all_reduce = start
    try:
        for step in range(3):
            pair.backward(step, (0,), (1,))
        assert count[0] == 3, "the root has a branch that nobody uses"
        for step in range(3):
            pair.model.zero_grad()
            count[0] = 0
            for part in range(3):
                x = models.share(oracle.inputs(3 * step + part))
                for layer in pair.model.body:
                    x = layer(x)
                oracle.mean(x).backward()  # type: ignore[no-untyped-call]
            assert count[0] == 1
            pair.model.body[0].weight.grad = None
            oracle.mean(pair.model.body[1](oracle.inputs(step))).backward()  # type: ignore[no-untyped-call]
            assert count[0] == 1 and pair.model.body[0].weight.grad is None
    finally:
        del control.start_all_reduce
