"""One object that drives a training step: loss scale, backward, clipping, optimizers, schedules."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from ..context import context
from ..errors import CheckpointError, ConfigurationError
from ..objects import allgather_objects
from ..shard.engine import engine
from ..shard.in_parts import in_parts
from ..shard.place import Place
from .adam import AdamOptimizer, check_fits, clear_grads
from .adapt import adapt, check_adapted
from .compare import compare
from .driven import knows_shards, skips_on_device
from .loss_scale import LossScale, Overflow, ScheduleStep
from .nonfinite import NonFinite, OnNonFinite, Pending, StepFacts
from .norm import clip_, find_overflow, scale_grads_
from .origin import stop
from .pieces import Chosen, all_params, homes_of, params_of
from .step_on import StepOn


@dataclass
class _Provisional:
    """What the last step did on the host without knowing whether the device skipped it."""

    overflow: Overflow
    schedule_steps: list[ScheduleStep]
    holds_gradients: bool = True
    """Whether gradients of that step may still be there."""
    says: Callable[[], None] | None = None
    """Says that it was skipped."""


class OptimManager:
    """Drives optimizers and their learning-rate schedules.

    The loss scale follows overflows on the device: with AdamOptimizers a step does not wait for it.  A schedule learns
    of a skipped step when its outcome is known: before the next step, or when ``loss_scale`` is read (which waits).

    Args:
        loss_scale: initial loss scale for fp16; None trains without one.
        loss_scale_factor, loss_scale_steps: the scale is divided by the factor when a gradient overflows, and
            multiplied by it after so many good steps.
        min_loss_scale, max_loss_scale: its bounds.
        grad_scale: the sum of all ranks' gradients is divided by this; None means the world size, so that gradients are
            means over ranks, as they are after a plain ``loss.backward()``.
        nonfinite: what to do where a rank's loss, or a gradient, is infinite or NaN, which would spoil parameters for
            good. "stop": NonFiniteError on all ranks with the rank, the step and the module where it began, found by
            running the step's forwards once more. "dump": the same, and the batch is written to a file in the folder
            BMTRAIN_DIARY_DIR, else that for temporary files. "skip": the step is left out, with a warning. "ignore": no
            look at it; torch would train on. A loss scale that follows overflows skips such steps in any case.
        spike: treat a step likewise whose norm of gradients, as ``clip_grad_norm`` says it, is more than so many times
            the median of the last 64; from the 16th step on, also after a resume. None looks at no such thing.
        compare_every: after every so many steps, compare the digests of what several ranks keep alike: parameters and
            optimizer states of replicas, parameters of no distributed module, and buffers (but for batch norms'
            statistics). RankDivergenceError names what differs, and where. None compares nothing.

    No step waits for the device to be judged: on a GPU what has happened is known at the next one, or when the state is
    saved.  Until then AdamOptimizers leave parameters as they were; optimizers of torch's have made the step, or, to
    "skip" it, wait for the device.

        optim_manager = bmt.optim.OptimManager()
        optim_manager.add_optimizer(optimizer, lr_scheduler)
        ...
        optim_manager.zero_grad()
        optim_manager.backward(loss)
        norm = optim_manager.clip_grad_norm(optimizer.param_groups, 1.0)
        optim_manager.step()
    """

    def __init__(
        self,
        loss_scale: float | None = None,
        loss_scale_factor: float = 2,
        loss_scale_steps: int = 1024,
        min_loss_scale: float = 1,
        max_loss_scale: float = float("inf"),
        grad_scale: float | None = None,
        *,
        nonfinite: OnNonFinite = "stop",
        spike: float | None = None,
        compare_every: int | None = None,
    ) -> None:
        if nonfinite not in get_args(OnNonFinite):
            raise ConfigurationError(f"nonfinite must be one of {', '.join(get_args(OnNonFinite))}, not {nonfinite!r}.")
        if spike is not None and (not spike > 1 or nonfinite == "ignore" or loss_scale is not None):
            raise ConfigurationError(
                f"spike must be a number above 1, as 10.0, or None, not {spike}, and works neither with "
                'nonfinite="ignore" nor with a loss scale.'
            )
        if compare_every is not None and compare_every < 1:
            raise ConfigurationError(f"compare_every must be a number of steps or None, not {compare_every}.")
        if loss_scale is not None and loss_scale <= 0:
            raise ConfigurationError(f"loss_scale must be positive or None, not {loss_scale}.")
        self._scale: LossScale | None = None
        self._last: _Provisional | None = None
        self.nonfinite, self.compare_every = nonfinite, compare_every
        self._facts = StepFacts(context(), spike)
        self._pending: Pending | None = None
        self._known: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Chosen]] = weakref.WeakKeyDictionary()
        self._tries = 0  # steps, made or not
        self._fixed_scale, self._steps = 1.0, 0  # without a loss scale that follows overflows
        if loss_scale is not None:
            self._scale = LossScale(context(), loss_scale)
        self.loss_scale_factor, self.loss_scale_steps = loss_scale_factor, loss_scale_steps
        self.min_loss_scale, self.max_loss_scale = min_loss_scale, max_loss_scale
        self.grad_scale = context().topology.data_size if grad_scale is None else grad_scale
        self.optimizers: list[torch.optim.Optimizer] = []
        self.lr_schedulers: list[Any] = []

    def add_optimizer(
        self, optimizer: torch.optim.Optimizer, lr_scheduler: Any = None, *, step_on: StepOn | None = None
    ) -> None:
        """Drive ``optimizer``, and ``lr_scheduler`` after each of its steps (leave it out if you step it yourself).

        Args:
            step_on: what an optimizer of torch's or another package's steps on.  "shards": this rank's parts; right for
                element-wise ones (Adam, SGD, Lion).  "tensors": whole tensors, each on one rank, which alone keeps its
                state; for those that treat each tensor by itself (Muon, Adafactor, LARS).  "whole": all tensors on
                every rank, at N times the memory; always right.  None: the cheapest that is known to be right; an
                optimizer that is not known steps on whole tensors, with a warning.

        Raises ConfigurationError when the optimizer, tried out on small tensors, does not do the same on ``step_on``.
        """
        adapt(optimizer, step_on)
        self.optimizers.append(optimizer)
        self.lr_schedulers.append(lr_scheduler)

    @property
    def loss_scale_enabled(self) -> bool:
        """Whether the loss scale follows overflows."""
        return self._scale is not None

    @property
    def loss_scale(self) -> float:
        """The present loss scale.  Reading it waits for the device; it may be set."""
        self._learn()
        return self._fixed_scale if self._scale is None else float(self._scale.value)

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        if self._scale is None:
            self._fixed_scale = value
        else:
            self._scale.value.fill_(value)

    @property
    def steps_since_last_scale(self) -> int:
        """Good steps since the loss scale last changed.  Reading it waits for the device."""
        return self._steps if self._scale is None else self._scale.good_steps

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call ``backward`` on: times the loss scale, so that gradients become what ``grad_scale`` says."""
        if self._last is not None and self._last.holds_gradients:
            # What comes now is added to what the last step left, which is dropped if that step was skipped.
            if self._holds_gradients():
                self._learn()
            else:
                self._last.holds_gradients = False
        # Gradients are divided where they are reduced, so that a backward without the manager gives their mean, too.
        divided = context().gradient_divisor / self.grad_scale
        if self._scale is None:
            if self._looks:
                if self._facts.losses and not self._holds_gradients():
                    self._facts.forget()  # of a step that the script has left out
                self._facts.note_loss(loss)
            factor = self._fixed_scale * divided
            return loss if factor == 1.0 else loss * factor
        scale = self._scale.value * divided
        return (loss * scale.to(torch.promote_types(loss.dtype, torch.float32))).to(loss.dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the mean of every rank's ``loss``, added to what is there.  Collective."""
        self.scale_loss(loss).backward()  # type: ignore[no-untyped-call]
        engine().finish_backward()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._facts.forget()
        for optimizer in self.optimizers:
            clear_grads(optimizer)

    @torch.no_grad()
    def clip_grad_norm(
        self, param_groups: Any, max_norm: float, norm_type: float | str = 2, eps: float = 1e-6
    ) -> torch.Tensor:
        """Scale gradients so that their norm is at most ``max_norm``.  Collective; between backward and step.

        Args:
            param_groups: an optimizer's ``param_groups``, or parameters.
            norm_type: a number, or "inf".

        Returns the norm before clipping, of the unscaled gradients: a 0-d tensor, equal on all ranks.
        """
        scale = self._fixed_scale if self._scale is None else self._scale.value.float()
        params = params_of(param_groups)
        chosen = self._chosen(params)
        if not self._looks:
            return clip_(chosen, max_norm, float(norm_type), scale, eps)
        norm = clip_(chosen, max_norm, float(norm_type), scale, eps, self._facts.spoils())
        self._facts.note_norm(params, norm)
        return norm

    def step(self) -> None:
        """Update every optimizer and schedule.  After an overflow, only lower the loss scale and drop the gradients.

        Raises ConfigurationError if no optimizer was added, and NonFiniteError as ``nonfinite`` says.
        """
        if not self.optimizers:
            raise ConfigurationError(
                "This OptimManager has no optimizer, so its step trains nothing. Call "
                "optim_manager.add_optimizer(optimizer, lr_scheduler) once, before the first step."
            )
        engine().finish_backward()
        self._tries += 1
        runs = engine().latest_runs() if self.compare_every and self._tries % self.compare_every == 0 else None
        self._learn()
        if self._scale is None:
            self._settle()
            self._step_unscaled()
        else:
            self._step_scaled(self._scale)
        if runs is not None:
            compare(self._tries, self.optimizers, runs)

    def _step_scaled(self, scale: LossScale) -> None:
        chosen = self._chosen(self._params())
        chosen.finish_gradients()
        overflow = find_overflow(chosen)
        if self._may_skip():
            self._update(scale.value, overflow)
            self._last = _Provisional(overflow, self._undoable_schedule_steps())
        elif overflow.happened:
            self.zero_grad()
        else:
            self._update(scale.value)
            self._step_schedules()
        scale.follow(overflow, self.loss_scale_factor, self.loss_scale_steps, self.min_loss_scale, self.max_loss_scale)
        if overflow.is_known:
            self._learn()

    @property
    def _looks(self) -> bool:
        """Whether losses and gradients are looked at."""
        return self._scale is None and self.nonfinite != "ignore"

    def _step_unscaled(self) -> None:
        outcome = self._facts.outcome(self._params, self._count()) if self._looks else None
        losses = self._facts.losses
        self._facts.forget()
        if outcome is not None and not outcome.is_known:
            if self.nonfinite != "skip":
                made = not all(skips_on_device(o) for o in self.optimizers)
                self._pending = self._judged(outcome, losses, made)
            elif self._may_skip():
                self._update(self._fixed_scale, outcome)
                says = partial(self._say_skipped, self._tries, outcome, losses)
                self._last = _Provisional(outcome, self._undoable_schedule_steps(), says=says)
                self._steps += 1
                return
        if outcome is not None and self._pending is None and outcome.happened:
            if self.nonfinite != "skip":
                stop(self._judged(outcome, losses), self._params(), self.nonfinite)
            self._say_skipped(self._tries, outcome, losses)
            self.zero_grad()
            return
        self._update(self._fixed_scale, None if self._pending is None else outcome)
        self._step_schedules()
        self._steps += 1

    def _settle(self) -> None:
        """Raise NonFiniteError if that is what the last step turns out to need.  Collective."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.outcome.happened:
            stop(pending, self._params(), self.nonfinite)

    def _judged(self, outcome: NonFinite, losses: list[torch.Tensor], is_made: bool = False) -> Pending:
        return Pending(self._tries, outcome, losses, engine().latest_runs(), is_made, self._facts.spikes)

    def _say_skipped(self, number: int, outcome: NonFinite, losses: list[torch.Tensor]) -> None:
        here, bad = context().rank, [value for value in map(float, losses) if not math.isfinite(value)]
        if bad or here == 0:
            what = f"the loss on rank {here} is {bad[0]}" if bad else "a loss or a gradient is infinite or NaN"
            if outcome.spike is not None and self._facts.spikes is not None:
                what = self._facts.spikes.words(outcome.spike)
            warnings.warn(f"Step {number} is left out: {what}.", stacklevel=3)

    def _count(self) -> int:
        return sum(len(group["params"]) for optimizer in self.optimizers for group in optimizer.param_groups)

    def _holds_gradients(self) -> bool:
        return any(home.gradient.present for home in homes_of(self._params()))

    def _undoable_schedule_steps(self) -> list[ScheduleStep]:
        managed = zip(self.optimizers, self.lr_schedulers, strict=True)
        return [ScheduleStep(o, s) for o, s in managed if s is not None]

    def _may_skip(self) -> bool:
        """Whether optimizers leave out a step on the device's word, and schedules take one back."""
        return all(skips_on_device(o) for o in self.optimizers) and all(
            s is None or ScheduleStep.can_be_undone(s) for s in self.lr_schedulers
        )

    def _learn(self) -> None:
        """If the last step turns out to have been skipped, put back what went on as if it had not."""
        last, self._last = self._last, None
        if last is not None and last.overflow.happened:
            for schedule_step in last.schedule_steps:
                schedule_step.undo()
            if last.holds_gradients:
                self.zero_grad()
            if last.says is not None:
                last.says()
                self._steps -= 1

    def _update(self, scale: float | torch.Tensor, overflow: Overflow | None = None) -> None:
        for optimizer in self.optimizers:
            if skips_on_device(optimizer):
                optimizer.step(scale=scale, overflow=overflow)
            elif knows_shards(optimizer):
                optimizer.step(scale=float(scale))
            else:
                if isinstance(scale, torch.Tensor) or scale != 1.0:
                    scale_grads_(self._chosen(all_params(optimizer.param_groups)), 1.0 / scale)
                optimizer.step()

    def _step_schedules(self) -> None:
        for schedule in self.lr_schedulers:
            if schedule is not None:
                schedule.step()

    def _chosen(self, params: list[Any]) -> Chosen:
        """``params`` and where they lie, mostly known from the last step, as long as there are optimizers of them."""
        if not self.optimizers:
            return Chosen(params)
        latest = self._known.setdefault(self.optimizers[0], [])
        for known in latest:
            if known.fits(params):
                return known
        made = Chosen(params)
        if not {id(p) for p in self._params()}.isdisjoint(map(id, params)):
            latest[:] = [made, *latest[:1]]
        return made

    def _params(self) -> list[Any]:
        return [p for optimizer in self.optimizers for p in all_params(optimizer.param_groups)]

    def state_dict(self, gather_opt: bool = True) -> dict[str, Any]:
        """Everything needed to go on: optimizers, schedules, loss scale.  Collective.

        Args:
            gather_opt: whole optimizer states, loadable at any world size; False gives this rank's shards where the
                optimizer has that form, which every rank has to write to a file of its own.
        """
        self._learn()
        self._settle()
        return self._state(
            [o.state_dict(gather=gather_opt) if knows_shards(o) else o.state_dict() for o in self.optimizers]
        )

    def _state(self, optimizers: list[Any]) -> dict[str, Any]:
        return {
            "optimizers": optimizers,
            "lr_schedulers": [None if s is None else s.state_dict() for s in self.lr_schedulers],
            "loss_scale": self.loss_scale,
            "loss_scale_enabled": self.loss_scale_enabled,
            "steps_since_last_scale": self.steps_since_last_scale,
        }

    def parts(self) -> dict[str, Any]:
        """As ``state_dict()``; each rank has its own part, without a copy (``shard.in_parts``)."""
        self._learn()
        self._settle()
        found = [(o, in_parts(o)) for o in self.optimizers]
        return self._state([o.state_dict() if own is None else own.parts() for o, own in found])

    def part_at(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Place | bool:
        """As ``shard.in_parts`` says."""
        if len(path) < 2 or path[0] != "optimizers" or path[1] not in range(len(self.optimizers)):
            return True
        own = in_parts(self.optimizers[path[1]])
        return True if own is None else own.part_at(path[2:], shape)

    def check_parts(self, state: dict[str, Any]) -> None:
        """As ``shard.in_parts`` says."""
        _require_fit(self, state)
        for optimizer, inner in zip(self.optimizers, state["optimizers"], strict=True):
            own = in_parts(optimizer)
            if own is not None:
                own.check_parts(inner)

    def load_parts(self, state: dict[str, Any]) -> None:
        """As ``shard.in_parts`` says."""
        self.check_parts(state)
        for optimizer, inner in zip(self.optimizers, state["optimizers"], strict=True):
            own = in_parts(optimizer)
            (optimizer.load_state_dict if own is None else own.load_parts)(inner)
        self._go_on(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``.  Collective.

        Raises ConfigurationError when it holds another number of optimizers, and CheckpointError when some of it does
        not fit, before the manager or a schedule has changed.
        """
        _require_fit(self, state_dict)
        if len(self.optimizers) > 1:  # a single one checks by itself
            for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
                _check(optimizer, state)
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._go_on(state_dict)

    def _go_on(self, state_dict: dict[str, Any]) -> None:
        """From the state of schedules and of the loss scale."""
        for schedule, own in _pairs(self, state_dict):
            schedule.load_state_dict(own)
        self._last = None
        if state_dict["loss_scale_enabled"]:
            self._scale = LossScale(context(), state_dict["loss_scale"], state_dict.get("steps_since_last_scale", 0))
        else:
            self._scale, self._fixed_scale = None, state_dict["loss_scale"]
            self._steps = state_dict.get("steps_since_last_scale", 0)


def _pairs(manager: OptimManager, state: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Each schedule that has a state, with it."""
    both = zip(manager.lr_schedulers, state["lr_schedulers"], strict=True)
    return [(schedule, own) for schedule, own in both if schedule is not None and own is not None]


def _require_fit(manager: OptimManager, state: Any) -> None:
    """Raises an error on every rank if ``state`` does not fit on some.  Collective."""
    every = allgather_objects([_misses_optimizers(manager, state), _problem(manager, state)])
    for missing, problem in every:
        if missing or problem:
            raise ConfigurationError(missing) if missing else CheckpointError(problem)


def _misses_optimizers(manager: OptimManager, state: Any) -> str | None:
    for name, own in (("optimizers", manager.optimizers), ("lr_schedulers", manager.lr_schedulers)):
        given = state.get(name) if isinstance(state, dict) else None
        if isinstance(given, list | tuple) and len(given) != len(own):
            return f"The state holds {len(given)} {name}, this manager has {len(own)}; add them first."
    return None


def _problem(manager: OptimManager, state: Any) -> str | None:
    kinds: dict[str, Any] = {
        "optimizers": (list, tuple), "lr_schedulers": (list, tuple), "loss_scale": (int, float),
        "loss_scale_enabled": bool,
    }  # fmt: skip
    wrong = [k for k, kind in kinds.items() if not isinstance(state, dict) or not isinstance(state.get(k), kind)]
    if wrong:
        return (
            f"This is no state of an OptimManager, as its {', '.join(wrong)} show; nothing was loaded. Give it what "
            "optim_manager.state_dict() gave."
        )
    if _misses_optimizers(manager, state):
        return None
    for schedule, own in _pairs(manager, state):
        reason = _refusal(schedule, own)
        if reason is not None:
            return f"The state of {type(schedule).__name__} does not fit; nothing was loaded: {reason}"
    return None


def _refusal(schedule: Any, state: Any) -> str | None:
    """Why ``schedule`` does not take ``state``, found out by trying; it keeps its own."""
    groups = getattr(getattr(schedule, "optimizer", None), "param_groups", [])
    before, rates = copy.deepcopy(schedule.state_dict()), [group.get("lr") for group in groups]
    try:
        schedule.load_state_dict(copy.deepcopy(state))
    except Exception as error:  # of whatever kind a schedule raises
        return f"{type(error).__name__}: {error}"
    finally:
        schedule.load_state_dict(before)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    return None


def _check(optimizer: torch.optim.Optimizer, state: Any) -> None:
    if isinstance(optimizer, AdamOptimizer):
        check_fits(optimizer, state)
    elif not knows_shards(optimizer):
        check_adapted(optimizer, state)
