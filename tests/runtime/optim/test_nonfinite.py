"""Losses and gradients that are infinite or NaN on some rank: all ranks stop, and say where it began."""

from __future__ import annotations

import gc
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.device import Readback
from bmtrain.errors import ConfigurationError, NonFiniteError

BAD = 2  # the step, counted from 0


class Part(nn.Module):
    """Does ``fault`` in its own forward when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.fault: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        if self.fault is not None:
            x = self.fault(x)
        return x + self.second(x)


class Net(bmt.DistributedModule):  # type: ignore[misc]
    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = bmt.TransformerBlockList([bmt.Block(Part(), use_checkpoint=recompute) for _ in range(3)])
        self.head = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        out: torch.Tensor = self.head(x)
        return out


class Masked(nn.Module):
    """Attends to some of its inputs."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask, self.scores = mask, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.scores(x + self.mask).softmax(-1)
        return out


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "divides by zero": lambda x: x / x.detach().mul(0),
    "NaN": lambda x: x * float("nan"),
    "logarithm": lambda x: (x - 100).log(),
    "overflow": lambda x: (x + 1000).exp(),
    "square root at 0": lambda x: x + (x * 0).square().sum(-1, keepdim=True).sqrt(),  # in the backward alone
    "norm at 0": lambda x: x + (x - x.detach()).square().sum().pow(0.5),
}
BACKWARD = ("square root at 0", "norm at 0")
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamOptimizer": lambda params: bmt.optim.AdamOptimizer(params, lr=1e-2),
    "AdamOffloadOptimizer": lambda params: bmt.optim.AdamOffloadOptimizer(params, lr=1e-2),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
}
FEW_OPTIMIZERS = [
    "AdamOptimizer", "SGD", *(pytest.param(name, marks=pytest.mark.long) for name in ("AdamOffloadOptimizer", "AdamW")),
]  # fmt: skip


@contextmanager
def told(late: bool) -> Iterator[None]:
    with mock.patch.object(Readback, "comes_later", late):
        yield


def at_once() -> AbstractContextManager[None]:
    """A GPU tells late, unless a test has said when; what that changes has tests of its own."""
    unasked = context().device.is_cuda and isinstance(Readback.__dict__["comes_later"], property)
    return told(late=False) if unasked else nullcontext()


class Training:
    """Steps of a small model; in one of them, on the last rank, something is not finite."""

    def __init__(
        self, optimizer: str = "AdamOptimizer", clip: bool = True, times: int = 1, recompute: bool | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.model = Net(recompute)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.manager = bmt.optim.OptimManager(**options)
        self.manager.add_optimizer(self.optimizer, bmt.lr_scheduler.Cosine(self.optimizer, 1e-2, 3, 20))
        self.clip, self.times = clip, times

    def step(
        self, step: int, fault: str = "", spoil: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss
    ) -> None:
        with at_once():
            self._step(step, fault, spoil)

    def _step(self, step: int, fault: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.manager.zero_grad()
        for time in range(self.times):
            here = bmt.rank() == bmt.world_size() - 1 and time == self.times - 1
            self.model.parts[1].fault = FAULTS[fault] if fault and here else None
            loss = oracle.mean(self.model(models.share(oracle.inputs(step * self.times + time))))
            self.manager.backward(spoil(loss) if here else loss)
        if self.clip:
            self.manager.clip_grad_norm(self.optimizer.param_groups, 0.1)
        self.manager.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def message(call: Callable[[], object]) -> str:
    with pytest.raises(NonFiniteError) as found, at_once():
        call()
    assert isinstance(found.value, FloatingPointError)
    return str(found.value)


@on_ranks(1)
def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="stop, skip, dump, ignore"):
        bmt.optim.OptimManager(nonfinite="warn")  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [True, False])
@on_ranks(1, 2, init={"schedule": "stress"})
def test_a_finite_run_is_what_it_is_without_looking(clip: bool) -> None:
    for times in (1, 3):
        runs = []
        for how in ("ignore", "stop", "skip"):
            training = Training(clip=clip, times=times, nonfinite=how)
            for step in range(4):
                training.step(step)
            runs.append(training.weights())
        for other in runs[1:]:
            assert all(torch.equal(other[key], runs[0][key]) for key in other)


@pytest.mark.parametrize("optimizer", FEW_OPTIMIZERS)
@pytest.mark.parametrize("clip", [True, False])
@on_ranks(1, 2)
def test_all_ranks_stop_with_rank_step_and_module(clip: bool, optimizer: str) -> None:
    last = bmt.world_size() - 1
    for number, fault in enumerate(FAULTS):
        training = Training(optimizer, clip, times=1 + number % 2, recompute=(None, True, False)[number % 3])
        for step in range(BAD):
            training.step(step)
        before = training.weights()
        text = message(lambda training=training, fault=fault: training.step(BAD, fault))
        assert f"Step {BAD + 1} is not made" in text, text
        assert f"rank {last}" in text, text
        if fault in BACKWARD:
            assert "every loss is" in text, text
            assert re.search(r"in the backward: the gradient of the output of Net\.parts\.1\.first", text), (
                fault,
                text,
            )
        else:
            assert re.search(rf"the loss is (nan|inf|-inf) on rank {last}", text), (fault, text)
            assert "in Net.parts.1 (Part), in what it gives to Net.parts.1.second (Linear)" in text, (fault, text)
        assert all(torch.equal(value, before[key]) for key, value in training.weights().items()), fault


@pytest.mark.parametrize("clip", [True, False])
@on_ranks(1, 2, init={"schedule": "stress"})
def test_late_news_stops_at_the_next_step_or_save(clip: bool) -> None:
    with told(late=True):
        for ends in ("step", "state_dict", "parts"):
            training = Training(clip=clip)
            for step in range(BAD):
                training.step(step)
            before = training.weights()
            training.step(BAD, "NaN")
            end: Callable[[], object] = (
                (lambda training=training: training.step(BAD + 1, "NaN")) if ends == "step" else
                getattr(training.manager, ends)
            )  # fmt: skip
            text = message(end)
            assert f"Step {BAD + 1} is not made" in text and "Net.parts.1" in text, text
            assert all(torch.equal(value, before[key]) for key, value in training.weights().items())


@on_ranks(1, 2)
def test_late_news_of_an_optimizer_of_torchs_names_what_is_spoiled() -> None:
    with told(late=True):
        training = Training("SGD")
        training.step(0, "NaN")
        text = message(lambda: training.step(1))
    assert "Step 1 has spoiled parameters" in text and "since it: Net." in text, text


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("optimizer", FEW_OPTIMIZERS)
@on_ranks(1, 2)
def test_a_skipped_step_is_as_if_it_had_not_been(optimizer: str, late: bool) -> None:
    for clip in (True, False):
        skipping, never = Training(optimizer, clip, nonfinite="skip"), Training(optimizer, clip, nonfinite="skip")
        with told(late), pytest.warns(UserWarning, match=f"Step {BAD + 1} is left out") if (
            bmt.rank() in (0, bmt.world_size() - 1)
        ) else told(late):  # fmt: skip
            for step in range(5):
                skipping.step(step, "NaN" if step == BAD else "")
                if step != BAD:
                    never.step(step)
            skipping.manager.state_dict()
        assert all(torch.equal(value, never.weights()[key]) for key, value in skipping.weights().items()), clip
        rates = [training.optimizer.param_groups[0]["lr"] for training in (skipping, never)]
        assert rates[0] == rates[1], (clip, rates)


@on_ranks(1, 2)
def test_ignoring_trains_on_as_torch_does() -> None:
    training = Training(nonfinite="ignore")
    training.step(0, "NaN")
    training.step(1)
    assert all(value.isnan().all() for value in training.weights().values())


@pytest.mark.parametrize("clip", [True, False])
@on_ranks(1, 2)
def test_a_loss_alone_that_is_not_finite(clip: bool) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        training = Training(clip=clip)
        training.step(0)
        text = message(lambda training=training, value=value: training.step(1, spoil=lambda loss: loss + value))
        assert f"the loss is {value} on rank {bmt.world_size() - 1}" in text, text
        assert "look at how the loss is computed" in text, text


@on_ranks(1, 2)
def test_losses_of_one_element_and_complex_parameters() -> None:
    class Spectral(bmt.DistributedModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6)  # type: ignore[no-any-return]

    for factor in (1.0, float("nan")):
        model = Spectral()
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        manager.backward(model(models.share(oracle.inputs(0))).square().mean().reshape(1) * factor)
        if factor == 1.0:
            manager.step()
        else:
            assert "the loss is nan on rank 0" in message(manager.step)


@on_ranks(1, 2)
def test_the_batch_is_named_when_it_is_not_finite() -> None:
    training = Training()
    x = models.share(oracle.inputs(0))
    if bmt.rank() == bmt.world_size() - 1:
        x[0, 3] = float("nan")
    training.manager.backward(oracle.mean(training.model(x)))
    text = message(training.manager.step)
    assert f"rank {bmt.world_size() - 1}, in what Net was given: 1 of {x.numel()}" in text, text


@on_ranks(1, 2)
def test_parameters_that_were_not_finite_before() -> None:
    training = Training()
    with torch.no_grad():
        training.model.head.weight.fill_(float("nan"))
    text = message(lambda: training.step(0))
    assert "Parameters are not finite before it: Net.head.weight" in text, text


@on_ranks(1, 2)
def test_masks_of_minus_infinity_are_no_beginning() -> None:
    training = Training()

    training.step(0)
    mask = torch.zeros(6).index_fill_(0, torch.tensor([4, 5]), -float("inf"))
    training.model.parts[0].second = Masked(mask)
    training.manager.backward(oracle.mean(training.model(models.share(oracle.inputs(0)))))
    training.manager.step()  # finite
    training.manager.zero_grad()
    training.model.parts[2].fault = lambda x: x / (x * 0)
    training.manager.backward(oracle.mean(training.model(models.share(oracle.inputs(0)))))
    assert "Net.parts.0" not in (text := message(training.manager.step)) and "Net.parts.2" in text, text


@on_ranks(1, 2)
def test_a_script_that_leaves_a_batch_out_by_itself_goes_on() -> None:
    """Its loss, and the norm it has looked at, belong to no step."""
    for clips in (True, False):
        training = Training(clip=clips)
        training.step(0)
        for drop in (training.manager.zero_grad, training.model.zero_grad, lambda: None):
            training.model.parts[1].fault = FAULTS["NaN"]
            loss = oracle.mean(training.model(models.share(oracle.inputs(1))))
            if drop.__name__ == "<lambda>":
                assert not bool(loss.isfinite())  # before the backward
            else:
                training.manager.backward(loss)
                if clips:
                    assert not bool(training.manager.clip_grad_norm(training.model.parameters(), 1.0).isfinite())
                drop()
            training.model.parts[1].fault = None
            training.step(2)


@on_ranks(1, 2)
def test_gradients_that_the_script_makes_finite_are() -> None:
    training = Training(clip=False)
    training.model.parts[1].fault = FAULTS["square root at 0"]
    training.manager.backward(oracle.mean(training.model(models.share(oracle.inputs(0)))))
    for parameter in training.model.parameters():
        parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
    training.manager.step()
    assert all(value.isfinite().all() for value in training.weights().values())


@on_ranks(1, 2)
def test_a_loss_scale_goes_on_skipping_overflows() -> None:
    training = Training(loss_scale=2.0**16, nonfinite="stop")
    for step in range(4):
        training.step(
            step, "NaN" if step == 1 else "", lambda loss, step=step: loss * (float("inf") if step == 2 else 1)
        )
    assert training.manager.loss_scale == 2.0**14
    assert all(value.isfinite().all() for value in training.weights().values())


@on_ranks(2)
def test_two_optimizers_clipped_apart_and_one_not_clipped() -> None:
    for clipped in ((0,), (0, 1), ()):
        model = Net()
        parts = [list(model.parts.parameters()), list(model.head.parameters())]
        manager = bmt.optim.OptimManager()
        for group in parts:
            manager.add_optimizer(bmt.optim.AdamOptimizer(group, lr=1e-2))
        for step in range(3):
            manager.zero_grad()
            model.parts[2].fault = FAULTS["square root at 0"] if step == 2 else None
            manager.backward(oracle.mean(model(models.share(oracle.inputs(step)))))
            for number in clipped:
                manager.clip_grad_norm(parts[number], 0.1)
            if step < 2:
                manager.step()
        assert "Step 3 is not made" in message(manager.step)


@pytest.mark.parametrize("kind", [2, float("inf"), 1.5])
@on_ranks(2)
def test_every_kind_of_norm_tells(kind: float) -> None:
    training = Training()
    training.model.parts[1].fault = FAULTS["NaN"] if bmt.rank() else None
    training.manager.backward(oracle.mean(training.model(models.share(oracle.inputs(0)))))
    norm = training.manager.clip_grad_norm(training.model.parameters(), 1.0, norm_type=kind)
    assert not math.isfinite(float(norm))
    message(training.manager.step)


@on_ranks(4, init={"shard_size": 2})
def test_replicas_hear_of_a_loss_in_another() -> None:
    training = Training()
    training.step(0)
    text = message(lambda: training.step(1, spoil=lambda loss: loss + float("nan")))
    assert "the loss is nan on rank 3" in text, text


def _dumps(folder: str) -> None:
    training = Training(nonfinite="dump")
    context().reports = folder
    training.step(0)
    text = message(lambda: training.step(1, "NaN"))
    path = text.split("Written: ")[1].split(". ")[0]
    [((given,), kwargs)] = torch.load(path)
    mine = bmt.rank() == bmt.world_size() - 1
    assert kwargs == {} and (not mine or torch.equal(given, models.share(oracle.inputs(1))))


def test_the_batch_is_written_by_the_rank_at_fault(tmp_path: Path) -> None:
    run_ranks(2, _dumps, str(tmp_path / "new"))
    [name] = [path.name for path in (tmp_path / "new").iterdir()]
    assert name.startswith("bmtrain-nonfinite-step2-rank1-")


@on_ranks(1, 2)
def test_a_forward_that_cannot_run_again_still_names_rank_and_step() -> None:
    training = Training()

    def once(x: torch.Tensor) -> torch.Tensor:
        training.model.parts[1].fault = _refuse
        return x * float("nan")

    training.model.parts[1].fault = once
    training.manager.backward(oracle.mean(training.model(models.share(oracle.inputs(0)))))
    text = message(training.manager.step)
    assert "Step 1 is not made: the loss is nan on rank 0" in text and "a list is empty" in text, text


def _refuse(x: torch.Tensor) -> torch.Tensor:
    raise IndexError("a list is empty")


@on_ranks(1)
def test_what_a_forward_was_given_is_held_for_the_step_only() -> None:
    """And without its graph."""
    import gc
    import weakref

    training = Training()
    x = models.share(oracle.inputs(0)).requires_grad_()
    y = x * 2
    node, kept = y.grad_fn, weakref.ref(y)
    training.manager.backward(oracle.mean(training.model(y)))
    del y
    gc.collect()
    assert kept() is None and node is not None
    held: Any = [run.args[0] for run in context().engine.latest_runs()() if run is not None]
    assert held and not held[0].requires_grad
    training.manager.step()
    assert not context().engine.latest_runs()()


@on_ranks(1)
def test_what_is_remembered_keeps_no_model() -> None:
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@on_ranks(1, 2)
def test_a_step_that_is_judged_later_keeps_no_model() -> None:
    """Where its manager lives on."""
    with told(late=True):
        training = Training()
        training.step(0)
        gone, manager = weakref.ref(training.model), training.manager
        manager.optimizers.clear()
        manager.lr_schedulers.clear()
        del training
        for _ in range(2):
            gc.collect()
        assert gone() is None


@on_ranks(1, 2)
def test_a_batch_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """The rank at fault alone writes, and the others wait for it."""
    (tmp_path / "file").touch()
    training = Training(nonfinite="dump")
    with mock.patch.object(context(), "reports", str(tmp_path / "file" / "folder")):
        text = message(lambda: training.step(0, "NaN"))
    assert f"Written: nothing by rank {bmt.world_size() - 1} (" in text and "Net.parts.1" in text, text


# ---- spikes
# ------------------------------------------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_spikes_refused() -> None:
    for options in ({"spike": 1.0}, {"spike": 10.0, "nonfinite": "ignore"}, {"spike": 10.0, "loss_scale": 64.0}):
        with pytest.raises(ConfigurationError, match="spike must be a number above 1"):
            bmt.optim.OptimManager(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Call it before step"):
        Training(clip=False, spike=10.0).step(0)


def large(loss: torch.Tensor) -> torch.Tensor:
    return loss * 1e3


@pytest.mark.parametrize("late", [False, True])
@on_ranks(1, 2, init={"schedule": "stress"})
def test_spikes_are_treated_as_what_is_not_finite(late: bool) -> None:
    with mock.patch("bmtrain.optim.nonfinite._FEWEST", 3), told(late):
        skipping, never = (Training(nonfinite="skip", spike=10.0) for _ in range(2))
        told_of = pytest.warns(UserWarning, match=r"Step 6 is left out: the norm .* more than 10 times the median")
        with told_of if bmt.rank() == 0 else nullcontext():
            for step in range(7):
                # What comes before there are enough steps to compare with is made, and so is what is not so large.
                spoil = {1: large, 4: lambda loss: loss * 2, 5: large}.get(step, lambda loss: loss)
                skipping.step(step, spoil=spoil)
                if step != 5:
                    never.step(step, spoil=spoil)
            skipping.manager.state_dict()
        oracle_weights = never.weights()
        assert all(torch.equal(value, oracle_weights[key]) for key, value in skipping.weights().items())
        for how in ("stop", "dump"):
            training = Training(nonfinite=how, spike=10.0)
            for step in range(4):
                training.step(step)
            before = training.weights()
            with pytest.raises(NonFiniteError, match=r"Step 5 is not made: the norm .* is \d.*median") as found:
                training.step(4, spoil=large)
                training.manager.state_dict()
            assert ("Written: " in str(found.value)) == (how == "dump")
            assert all(torch.equal(value, before[key]) for key, value in training.weights().items())
        training = Training(spike=10.0)  # NaN is what it was, and no norm to compare with
        for step in range(4):
            training.step(step)
        with pytest.raises(NonFiniteError, match="the loss is nan on rank"):
            training.step(4, "NaN")
            training.step(5)


@on_ranks(1, 2)
def test_a_level_that_stays_is_no_spike() -> None:
    with mock.patch("bmtrain.optim.nonfinite._FEWEST", 3), mock.patch("bmtrain.optim.nonfinite._NORMS", 5):
        training, made = Training(nonfinite="skip", spike=10.0), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(10):
                before = training.weights()
                training.step(step, spoil=large if step > 3 else lambda loss: loss)
                made.append(any(not torch.equal(value, before[key]) for key, value in training.weights().items()))
    assert made[1:] == [True] * 3 + [False] * 3 + [True] * 3, made  # the first learning rate is 0
