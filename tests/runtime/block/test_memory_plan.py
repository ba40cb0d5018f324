"""What is free buys speed and changes no number: units stay whole from step to step, beside a model that is lean."""

from __future__ import annotations

import gc
import os
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from between_steps import (
    AMID,
    BETWEEN,
    Amid,
    Between,
    loss_of,
    names,
    nothing,
    tokens,
    trained,
    units_of,
    writes,
)
from fresh import GIB, PLENTY, fresh_plan, memory_of
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.device import Memory
from bmtrain.errors import ConfigurationError
from bmtrain.objects import allgather_objects
from bmtrain.shard.unit import State


def check_same(between: Between, steps: int, precision: str, *how: Any) -> None:
    lean = trained(None, between, steps, precision, *how)
    auto = trained(PLENTY, between, steps, precision, *how)
    fresh_plan(None)
    assert lean[0] == auto[0], (between.__name__, precision, *how)
    assert all(torch.equal(lean[1][key], auto[1][key]) for key in lean[1]), (between.__name__, precision, *how)
    assert not lean[2] and auto[2] == (bmt.world_size() > 1 or precision in ("bf16", "fp16"))


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16", "fp16"])
@on_ranks(2)
def test_what_stays_changes_no_number_in_10_steps(precision: str) -> None:
    check_same(nothing, 10, precision)


@on_ranks(3)
def test_what_stays_changes_no_number_on_3_ranks() -> None:
    check_same(nothing, 10, "autocast")


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@on_ranks(1, 3)
def test_what_stays_changes_no_number_on_other_ranks(precision: str) -> None:
    for how in [(None, True), (True, False), (False, True)]:
        check_same(nothing, 10, precision, *how)


@pytest.mark.parametrize("between", BETWEEN)
@on_ranks(2)
def test_what_else_is_done_to_a_model_counts(between: Between) -> None:
    check_same(between, 7, "autocast")


@pytest.mark.long
@pytest.mark.parametrize("between", BETWEEN)
@on_ranks(1, 2, 3)
def test_what_else_is_done_to_a_model_counts_however_it_trains(between: Between) -> None:
    for how in [(None, False), (True, True), (False, False)]:
        check_same(between, 8, "bf16", *how)


@pytest.mark.parametrize("amid", AMID)
@on_ranks(2)
def test_what_is_done_before_the_backward_counts(amid: Amid) -> None:
    for precision in ("fp32", "autocast"):
        check_same(nothing, 5, precision, False, True, amid)


@pytest.mark.parametrize("amid", AMID)
@on_ranks(2, init={"schedule": "stress"})  # what was given back is overwritten, as on a GPU
def test_what_is_done_before_the_backward_counts_where_memory_is_used_again(amid: Amid) -> None:
    check_same(nothing, 5, "autocast", False, True, amid)


@pytest.mark.long
@pytest.mark.parametrize("amid", AMID)
@on_ranks(1, 3, init={"schedule": "stress"})
def test_what_is_done_before_the_backward_counts_however_it_trains(amid: Amid) -> None:
    for precision in (
        "fp32",
        "bf16",
    ):  # kept activations alone: those of a block that runs again follow what is written
        for own in (True, False):
            check_same(nothing, 5, precision, False, own, amid)


@on_ranks(1)
def test_one_rank_keeps_what_it_casts() -> None:
    check_same(writes, 5, "bf16")
    check_same(nothing, 4, "fp32", False)


# ---- who decides, and who takes it back
# -------------------------------------------------------------------------------------------------


class Training:
    """A small GPT that is trained step by step, with as many sequences as asked for."""

    def __init__(self, memory: Memory, limit: Any = "auto") -> None:
        context().memory = limit
        self.plan = fresh_plan(memory)
        torch.manual_seed(3)
        self.model = models.gpt(names(None), layers=2, width=8)
        self.manager = bmt.optim.OptimManager()
        self.manager.add_optimizer(bmt.optim.AdamOptimizer(self.model.parameters(), lr=1e-2))

    def forward(self, step: int = 0, rows: int = 4) -> Any:
        return self.model(tokens(step, rows=rows), tokens(step + 1, rows=rows))

    def steps(self, count: int, rows: int = 4) -> None:
        for step in range(count):
            self.manager.backward(self.forward(step, rows))
            self.manager.step()
            self.manager.zero_grad()

    @property
    def stay(self) -> bool:
        """Whether all stay; all do, or none."""
        answers = {unit.stays for unit in units_of(self.model)}
        assert len(answers) == 1 and answers == {bool(self.plan._staying)}
        return answers.pop()


@contextmanager
def training(memory: Memory, limit: Any = "auto") -> Iterator[Training]:
    before = context().memory
    try:
        yield Training(memory, limit)
    finally:
        context().memory = before
        fresh_plan(None)


@on_ranks(2)
def test_ranks_decide_alike_whatever_each_has_free() -> None:
    last = bmt.rank() == bmt.world_size() - 1
    # The last rank's free memory, or its limit; 1 GiB is left for a step of twice the size, unless a number is given.
    cases = [(60, "auto", True), (1.5, "auto", True), (0.5, "auto", False), (-3, "auto", False), (60, "lean", False)]
    cases += [(60, 2.5, True), (60, 1.5, False), (60, 60, True), (-3.9, 60, False)]
    for free, limit, stay in cases:
        with training(memory_of(free) if last else PLENTY, limit) as run:
            run.steps(2)
            assert not run.plan._staying
            run.steps(1)
            assert run.stay == stay, (free, limit)
            kept = allgather_objects(sorted(run.plan._kept))
            assert all(each == kept[0] for each in kept)
            assert bool(kept[0]) == (limit != "lean" and free > 0 and limit != 1.5)


class Watched:
    """A stopwatch of a forward that took the device a second; and how long that waited for gathers."""

    def __init__(self, host: float, waited: float) -> None:
        self._host, self._waited, self.is_on = host, waited, True

    def stop(self) -> None:
        pass

    def read(self) -> tuple[float, float]:
        return self._host, 1.0

    def seconds(self) -> float:
        assert not self.is_on
        return self._waited


@contextmanager
def watched_training(
    patch: pytest.MonkeyPatch, times: list[Watched], memory: Memory = PLENTY
) -> Iterator[tuple[Training, list[str]]]:
    """Of the forwards that are timed ``times`` are said, one after the other; and what the plan says."""
    said: list[str] = []
    patch.setattr("bmtrain.block.memory.say", said.append)
    with training(memory) as run:
        run.plan._watches = len(times)
        watches, waits = iter(times), iter(times)
        patch.setattr(context().device, "stopwatch", lambda: next(watches, None))  # others may time, too
        patch.setattr(context().device, "watch_gathers", lambda: next(waits, None))
        yield run, said


@on_ranks(2)
def test_what_computation_hides_does_not_stay() -> None:
    last = bmt.rank() == bmt.world_size() - 1
    # Of a second on the device: what the last rank's host took, what that rank waited for gathers; blocks to record.
    cases = [(0.1, 0.01, False, False), (0.1, 0.01, True, False), (0.7, 0.01, False, False), (0.7, 0.01, True, True)]
    cases += [(0.1, 0.2, False, True)]
    for host, waited, recorded, stay in cases:
        usual, slow = Watched(host, waited) if last else Watched(0.1, 0.0), Watched(1.0, 1.0)
        with pytest.MonkeyPatch.context() as patch, watched_training(patch, [slow, usual, slow]) as (run, said):
            run.plan.may_record = recorded
            run.steps(6)
            assert run.plan._kept and not said and not run.plan._staying  # activations are another matter
            run.steps(1)
            assert run.stay == stay, (host, waited, recorded)
            hides = "hides their gathers" in "".join(said)
            assert hides == (not stay and bmt.rank() == 0) and len(said) == (bmt.rank() == 0)


@on_ranks(2)
def test_of_steps_with_several_forwards_one_is_timed_each() -> None:
    times = [Watched(0.1, 0.0) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch, watched_training(patch, times) as (run, _):
        for step in range(7):
            assert len(run.plan._watched) == max(0, step - 3)
            for _ in range(3):
                run.manager.backward(run.forward(step))
            assert not any(watched.is_on for watched in times[: max(0, step - 2)])
            run.steps(1)
        assert not run.stay and run.plan._kept


@on_ranks(2)
def test_larger_inputs_of_steps_that_are_timed_are_none_that_were_measured() -> None:
    times = [Watched(0.1, 1.0) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch, watched_training(patch, times, memory_of(4)) as (run, _):
        run.steps(3)
        run.steps(3, rows=40)
        loss = run.forward(rows=40)
        assert run.stay and run.plan._is_short, "what a step of so many rows takes is not known"
        run.manager.backward(loss)
        run.manager.step()
        assert not run.stay


@on_ranks(2)
def test_only_whoever_may_record_blocks_says_so() -> None:
    with training(PLENTY) as run:
        run.steps(3)
        engine: Any = context().engine
        assert run.plan.may_record == (engine.graphs is not None and engine.graphs.plan is run.plan)
        assert run.stay and not run.plan._watched


@on_ranks(3)
def test_larger_inputs_of_one_rank_take_back_what_stays_everywhere() -> None:
    with training(memory_of(4)) as run:
        other = bmt.rank() != 1
        run.steps(3)
        run.steps(2, rows=8)  # twice as much fits
        assert run.stay
        loss = run.forward(rows=4 if other else 40)
        assert run.plan._is_short == (not other), "the rank itself keeps nothing else from now on"
        assert run.stay
        run.manager.backward(loss)
        run.manager.step()
        assert not run.stay
        assert all(unit.state is State.SHARDED for unit in units_of(run.model))
        run.steps(3)  # measured again, on one rank with the larger inputs
        assert run.stay
        run.steps(2, rows=8 if other else 40)
        assert run.stay
        for rows in (50, 60, 70):  # inputs that grow for ever are not followed for ever
            assert run.stay
            run.plan._moving = 100 * GIB
            run.steps(4, rows=8 if other else rows)
        assert not run.stay


@on_ranks(2)
def test_an_allocator_that_looked_twice_takes_back_what_stays_on_all_ranks() -> None:
    with training(PLENTY) as run:
        run.steps(4)
        context().device.stand_in = replace(PLENTY, retries=bmt.rank())
        assert run.stay
        run.steps(1)
        assert not run.stay
        run.steps(3)
        assert run.stay, "it is not held against what is planned later"


@on_ranks(2)
def test_need_in_a_later_forward_of_a_step_is_told_in_the_next() -> None:
    with training(memory_of(4)) as run:
        run.steps(4)
        run.manager.backward(run.forward())
        run.manager.backward(run.forward(rows=40 if bmt.rank() else 4))
        run.manager.step()
        assert run.stay
        run.steps(1)
        assert not run.stay


@on_ranks(2)
def test_nobody_waits_for_other_ranks_while_all_stays() -> None:
    control: Any = context().control
    calls: list[str] = []

    def noted(name: str) -> Any:
        inner = getattr(control, name)

        def around(*args: Any) -> Any:
            calls.append(name)
            return inner(*args)

        return around

    exchanges = ("all_reduce", "all_gather", "broadcast", "barrier", "start_all_reduce")
    with training(PLENTY) as run:
        run.steps(8)  # by then nobody looks at first backwards
        for name in exchanges:
            setattr(control, name, noted(name))
        try:
            for _ in range(3):
                for _ in range(2):
                    run.manager.backward(run.forward())
                with torch.no_grad():
                    run.forward(rows=40)  # takes little, whatever its size
                run.manager.step()
        finally:
            for name in exchanges:
                delattr(control, name)
        assert run.stay
    assert calls == ["start_all_reduce"] * 4, "in each step who is short of memory, and once which gradients there are"


RUNS: Counter[str] = Counter()


class Counted(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner, self.name = nn.Linear(4, 4), name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RUNS[self.name] += 1
        return torch.tanh(self.inner(x))


def runs_of_a_step(steps: int) -> list[list[int]]:
    """How often each of two blocks ran in each step: the second one joins in the third step."""
    blocks = [bmt.Block(Counted(name)) for name in "ab"]
    model = bmt.BMTrainModelWrapper(nn.ModuleList(blocks))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    for step in range(steps):
        RUNS.clear()
        x = torch.ones(2, 4)
        for block in blocks[: 1 + (step >= 2)]:
            x = block(x)
        manager.backward(x.square().mean())
        manager.step()
        manager.zero_grad()
        found.append([RUNS["a"], RUNS["b"]])
    return found


def test_what_a_cpu_cannot_measure_is_kept_from_the_third_step_of_a_block_on() -> None:
    kept = [[2, 0], [2, 0], [1, 2], [1, 2], [1, 1], [1, 1]]
    for ranks in (1, 2):
        assert run_ranks(ranks, runs_of_a_step, 6, init={"device": "cpu"}) == [kept] * ranks
        for memory in ("lean", 8):
            always = run_ranks(ranks, runs_of_a_step, 6, init={"device": "cpu", "memory": memory})
            assert always == [[[2, 0]] * 2 + [[2, 2]] * 4] * ranks


# ---- refusals
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "memory", ["", "Auto", "all", "8", "8GiB", None, True, False, 0, -1, float("nan"), float("inf"), [8]]
)
def test_memory_is_a_word_or_a_number_of_gib(memory: Any) -> None:
    with pytest.raises(ConfigurationError, match="memory must be"):
        bmt.init_distributed(memory=memory)
    assert not bmt.is_initialized()


@pytest.mark.parametrize("others", [["auto", "lean"], [8, 4.5]])
@on_ranks(2, initialize=False, fresh=True)
def test_ranks_say_the_same_of_memory(others: list[Any]) -> None:
    with pytest.raises(ConfigurationError, match="the same on all ranks"):
        bmt.init_distributed(device="cpu", memory=others[int(os.environ["RANK"])])
    assert not bmt.is_initialized()


@on_ranks(2)
def test_a_transform_of_torch_func_between_steps() -> None:
    with training(PLENTY) as run:
        run.steps(4)
        assert run.stay
        given, wanted = tokens(7), tokens(8)
        values = {name: p.gather().detach() for name, p in run.model.named_parameters()}

        def loss(values: Any) -> torch.Tensor:
            return torch.func.functional_call(run.model, values, (given, wanted))  # type: ignore[no-any-return]

        torch.func.grad(loss)(values)  # begins a forward that tells the others whether memory is short
        run.steps(2)
        assert run.stay


# ---- models that go
# ------------------------------------------------------------------------------------------------------------------


def what_it_holds(model: Any, manager: Any) -> dict[str, weakref.ref[Any]]:
    """What is to go with ``model``: its memory, and that of its optimizers."""
    found = {"model": model, "optimizer": manager.optimizers[0]}
    for unit in units_of(model):
        assert unit.state is State.GATHERING or not unit.moves, "the plan lets it stay"
        found[f"unit {unit.name}"] = unit
        for number, buffer in enumerate(unit._prefetched):
            found[f"buffer {number} of {unit.name}"] = buffer.arena
        for number, flat in enumerate(unit.flats):
            found[f"shard {number} of {unit.name}"] = flat._arena
    return {name: weakref.ref(value) for name, value in found.items()}


def trains_and_stays() -> tuple[Any, Any, dict[str, weakref.ref[Any]]]:
    model = models.gpt(names(None), layers=2, width=8)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for step in range(4):
        manager.backward(loss_of(model, step))
        manager.clip_grad_norm(model.parameters(), 0.5)
        manager.step()
        manager.zero_grad()
    return model, manager, what_it_holds(model, manager)


def goes(how: str) -> None:
    context().memory = "auto"
    fresh_plan(PLENTY)
    other = trains_and_stays() if how in ("beside another", "clipped by another") else None
    fresh_plan(PLENTY)
    model, manager, held = trains_and_stays()
    if how == "clipped by another":
        assert other is not None
        manager.backward(loss_of(model, 9))
        other[1].clip_grad_norm(model.parameters(), 0.5)
        manager.zero_grad()
    if how == "taken out":
        manager.optimizers.clear()
        manager.lr_schedulers.clear()
    else:
        manager = None
    model = None
    for _ in range(2):  # parameters of a graph that is garbage, too, are no garbage until that is gone
        gc.collect()
    left = [name for name, one in held.items() if one() is not None]
    assert not left, left
    if other is not None:  # who stays trains on
        other[1].backward(loss_of(other[0], 5))
        other[1].step()
    fresh_plan(None)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", ["alone", "beside another", "clipped by another", "taken out"])
@pytest.mark.parametrize("precision", ["bf16", pytest.param(None, marks=pytest.mark.long)])
def test_a_model_that_is_gone_leaves_no_memory_behind(ranks: int, how: str, precision: str | None) -> None:
    run_ranks(ranks, goes, how, init={"precision": precision})
