"""One object that drives a training step: loss scale, backward, clipping, optimizers, schedules."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from ..autograd import never_compiled
from ..context import context
from ..errors import CheckpointError, ConfigurationError
from ..log import warn
from ..objects import allgather_objects
from ..shard.engine import engine
from ..shard.in_parts import in_parts
from ..shard.place import Place
from .adam import clear_grads
from .adapt import adapt, check_adapted
from .compare import compare
from .driven import CheckingOptimizer, knows_shards, skips_on_device
from .interrupts import after_step
from .loss_scale import LossScale, Overflow, ScheduleStep
from .nonfinite import NonFinite, OnNonFinite, Pending, StepFacts
from .norm import clip_, find_overflow, scale_grads_
from .origin import stop
from .pieces import Chosen, all_params, finish_gradients, homes_of, params_of
from .step_on import StepOn


@dataclass
class _Provisional:
    """What the last step did on the host without knowing whether the device skipped it."""

    overflow: Overflow
    schedule_steps: list[ScheduleStep]
    optimizers: list[torch.optim.Optimizer]
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
        self._scaled_by: torch.Tensor | None = None  # the scale of the gradients that are there
        self._unscaled: dict[int, Overflow | None] = {}  # by the optimizer's place: what its gradients held

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

        Raises ConfigurationError when the optimizer, tried out on small tensors, does not do the same on ``step_on``,
        and for several at once.
        """
        if isinstance(optimizer, list | tuple | dict):
            raise ConfigurationError(
                f"add_optimizer takes one optimizer, not a {type(optimizer).__name__}. Call it once for each of them."
            )
        adapt(optimizer, step_on)
        self.optimizers.append(optimizer)
        self.lr_schedulers.append(lr_scheduler)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers it drives, in their order: their own dicts, so that rates may be set there."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

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

    @never_compiled
    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call ``backward`` on: times the loss scale, so that gradients become what ``grad_scale`` says."""
        if self._last is not None and self._last.holds_gradients:
            # What comes now is added to what the last step left, which is dropped if that step was skipped.
            if self._holds_gradients(self._last.optimizers):
                self._learn()
            else:
                self._last.holds_gradients = False
        engine().note_loss(loss)
        # Gradients are divided where they are reduced, so that a backward without the manager gives their mean, too.
        divided = context().gradient_divisor / self.grad_scale
        self._scaled_by = None
        if self._unscaled:  # a step may have been left out
            self._unscaled = {i: o for i, o in self._unscaled.items() if self._holds_gradients([self.optimizers[i]])}
        if self._scale is None:
            if self._looks:
                if self._facts.losses and not self._holds_gradients(self.optimizers):
                    self._facts.forget()  # of a step that the script has left out
                self._facts.note_loss(loss)
            factor = self._fixed_scale * divided
            return loss if factor == 1.0 else loss * factor
        scale = self._scale.value * divided
        return (loss * scale.to(torch.promote_types(loss.dtype, torch.float32))).to(loss.dtype)

    @never_compiled
    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the mean of every rank's ``loss``, added to what is there.  Collective."""
        others = engine().of_no_module
        others.waits = True
        try:
            self.scale_loss(loss).backward()  # type: ignore[no-untyped-call]
        finally:
            others.waits = False
        finish_gradients(self._params())  # those of no module as well, which user code may clip or read

    @never_compiled
    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._clear(self.optimizers)

    @never_compiled
    @torch.no_grad()
    def unscale(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Divide gradients by the loss scale now instead of in the step.  Collective; after the last backward.

        For code that reads or changes them in between, as after ``GradScaler.unscale_``.  Once for each step: a second
        call does nothing.  Without a loss scale there is nothing to divide by.

        Args:
            optimizer: whose gradients; None is all.
        """
        those = self._those(optimizer)
        if self._scale is None and self._fixed_scale == 1.0:
            return
        self._learn()
        for one in those:
            place = self._place(one)
            if place not in self._unscaled:
                chosen = self._chosen(all_params(one.param_groups))
                chosen.finish_gradients()
                self._unscaled[place] = None if self._scale is None else find_overflow(chosen)
                scale_grads_(chosen, 1.0 / self._gradients_scale())

    @never_compiled
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
        params = params_of(param_groups)
        scale = self._gradients_scale()
        scale = scale.float() if isinstance(scale, torch.Tensor) else scale
        if self._unscaled and self._unscale_owners_of(params):
            scale = 1.0
        chosen = self._chosen(params)
        spoils = self._facts.spoils() if self._looks else None
        norm = clip_(chosen, max_norm, float(norm_type), scale, eps, spoils)
        if self._looks:
            self._facts.note_norm(params, norm)
        meter = engine().meter
        if meter is not None:
            meter.note_norm(norm, float(norm_type))
        return norm

    @never_compiled
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Update every optimizer and schedule.  After an overflow, only lower the loss scale and drop the gradients.

        Args:
            optimizer: update this one alone, and its schedule: for losses that take turns under one loss scale.

        Raises ConfigurationError if no optimizer was added, or another than ``optimizer``, and NonFiniteError as
        ``nonfinite`` says.
        """
        if not self.optimizers:
            raise ConfigurationError(
                "This OptimManager has no optimizer, so its step trains nothing. Call "
                "optim_manager.add_optimizer(optimizer, lr_scheduler) once, before the first step."
            )
        meter = engine().meter
        with nullcontext() if meter is None else meter.managed_step(None if self._scale is None else self._scale.value):
            self._step(optimizer)
        after_step()

    def _step(self, optimizer: torch.optim.Optimizer | None) -> None:
        engine().finish_backward()
        self._tries += 1
        runs = engine().latest_runs() if self.compare_every and self._tries % self.compare_every == 0 else None
        self._learn()
        those = self._those(optimizer)
        if self._scale is None:
            self._settle()
            self._step_unscaled(those)
        else:
            self._step_scaled(self._scale, those)
        if runs is not None:
            compare(self._tries, self.optimizers, runs())

    def _step_scaled(self, scale: LossScale, those: list[torch.optim.Optimizer]) -> None:
        overflow = self._take_unscaled(those)
        by = self._gradients_scale() if overflow is None else 1.0
        if overflow is None:
            chosen = self._chosen(self._params(those))
            chosen.finish_gradients()
            overflow = find_overflow(chosen)
        if self._may_skip(those):
            self._update(those, by, overflow)
            self._last = _Provisional(overflow, self._undoable_schedule_steps(those), those)
        elif overflow.happened:
            self._clear(those)
        else:
            self._update(those, by)
            self._step_schedules(those)
        if len(those) < len(self.optimizers) and self._scaled_by is None:
            self._scaled_by = scale.value.clone()  # others may have gradients of the same backward
        scale.follow(overflow, self.loss_scale_factor, self.loss_scale_steps, self.min_loss_scale, self.max_loss_scale)
        if overflow.is_known:
            self._learn()

    @property
    def _looks(self) -> bool:
        """Whether losses and gradients are looked at."""
        return self._scale is None and self.nonfinite != "ignore"

    def _step_unscaled(self, those: list[torch.optim.Optimizer]) -> None:
        outcome = self._facts.outcome(partial(self._params, those), self._count()) if self._looks else None
        by = self._fixed_scale
        if self._some_unscaled(those):
            self._take_unscaled(those)
            by = 1.0
        losses = self._facts.losses
        self._facts.forget()
        if outcome is not None and not outcome.is_known:
            if self.nonfinite != "skip":
                made = not all(skips_on_device(o) for o in those)
                self._pending = self._judged(outcome, losses, made)
            elif self._may_skip(those):
                self._update(those, by, outcome)
                says = partial(self._say_skipped, self._tries, outcome, losses)
                self._last = _Provisional(outcome, self._undoable_schedule_steps(those), those, says=says)
                self._steps += 1
                return
        if outcome is not None and self._pending is None and outcome.happened:
            if self.nonfinite != "skip":
                stop(self._judged(outcome, losses), self._params(), self.nonfinite)
            self._say_skipped(self._tries, outcome, losses)
            self._clear(those)
            return
        self._update(those, by, None if self._pending is None else outcome)
        self._step_schedules(those)
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
            warn(f"Step {number} is left out: {what}.", stacklevel=3)

    def _count(self) -> int:
        return sum(len(group["params"]) for optimizer in self.optimizers for group in optimizer.param_groups)

    def _holds_gradients(self, those: list[torch.optim.Optimizer]) -> bool:
        return any(home.gradient.present for home in homes_of(self._params(those)))

    def _undoable_schedule_steps(self, those: list[torch.optim.Optimizer]) -> list[ScheduleStep]:
        return [ScheduleStep(o, s) for o, s in self._managed(those) if s is not None]

    def _may_skip(self, those: list[torch.optim.Optimizer]) -> bool:
        """Whether optimizers leave out a step on the device's word, and schedules take one back."""
        return all(skips_on_device(o) for o in those) and all(
            s is None or ScheduleStep.can_be_undone(s) for _, s in self._managed(those)
        )

    # One optimizer of several, gradients without their scale
    # ------------------------------------------------------------------------------------------------------------

    def _those(self, optimizer: torch.optim.Optimizer | None) -> list[torch.optim.Optimizer]:
        if optimizer is None:
            return self.optimizers
        if all(one is not optimizer for one in self.optimizers):
            raise ConfigurationError(
                f"This OptimManager does not drive that {type(optimizer).__name__}. Call "
                "optim_manager.add_optimizer(optimizer) once, before the first step."
            )
        return [optimizer]

    def _place(self, optimizer: torch.optim.Optimizer) -> int:
        return next(i for i, one in enumerate(self.optimizers) if one is optimizer)

    def _gradients_scale(self) -> float | torch.Tensor:
        """By what the gradients that are there are too large: a number, or a 0-d tensor."""
        if self._scale is None:
            return self._fixed_scale
        return self._scale.value if self._scaled_by is None else self._scaled_by

    def _some_unscaled(self, those: list[torch.optim.Optimizer]) -> bool:
        """Whether ``unscale()`` was called for one of ``those``; then it is to be for all of them."""
        return bool(self._unscaled) and any(self._place(one) in self._unscaled for one in those)

    def _take_unscaled(self, those: list[torch.optim.Optimizer]) -> Overflow | None:
        """What the gradients of ``those`` held before ``unscale()``; None if they carry the scale.  Collective."""
        if not self._some_unscaled(those):
            return None
        for one in those:
            self.unscale(one)
        found = [o for one in those if (o := self._unscaled.pop(self._place(one))) is not None]
        if len(found) < 2:
            return found[0] if found else None
        return Overflow(context(), torch.stack([o.flag for o in found]).max())

    def _unscale_owners_of(self, params: list[Any]) -> bool:
        """Whether gradients of ``params`` are to be taken as they are: all, if some carry no scale.  Collective."""
        wanted = {id(p) for p in params}
        owners = [o for o in self.optimizers if any(id(p) in wanted for p in all_params(o.param_groups))]
        if not self._some_unscaled(owners):
            return False
        for owner in owners:
            self.unscale(owner)
        return True

    def _clear(self, those: list[torch.optim.Optimizer]) -> None:
        self._facts.forget()
        for optimizer in those:
            self._unscaled.pop(self._place(optimizer), None)
            clear_grads(optimizer)

    def _managed(self, those: list[torch.optim.Optimizer]) -> list[tuple[torch.optim.Optimizer, Any]]:
        """Each with its schedule."""
        pairs = zip(self.optimizers, self.lr_schedulers, strict=True)
        return [(o, s) for o, s in pairs if any(o is one for one in those)]

    def _learn(self) -> None:
        """If the last step turns out to have been skipped, put back what went on as if it had not."""
        last, self._last = self._last, None
        if last is not None and last.overflow.happened:
            for schedule_step in last.schedule_steps:
                schedule_step.undo()
            if last.holds_gradients:
                self._clear(last.optimizers)
            if last.says is not None:
                last.says()
                self._steps -= 1

    def _update(
        self, those: list[torch.optim.Optimizer], scale: float | torch.Tensor, overflow: Overflow | None = None
    ) -> None:
        for optimizer in those:
            if skips_on_device(optimizer):
                optimizer.step(scale=scale, overflow=overflow)
            elif knows_shards(optimizer):
                optimizer.step(scale=float(scale))
            else:
                if isinstance(scale, torch.Tensor) or scale != 1.0:
                    scale_grads_(self._chosen(all_params(optimizer.param_groups)), 1.0 / scale)
                optimizer.step()

    def _step_schedules(self, those: list[torch.optim.Optimizer]) -> None:
        for _, schedule in self._managed(those):
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
            latest[:] = [made, *latest[:3]]
        return made

    def _params(self, those: list[torch.optim.Optimizer] | None = None) -> list[Any]:
        return [p for optimizer in those or self.optimizers for p in all_params(optimizer.param_groups)]

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

    def scaler_state_dict(self) -> dict[str, Any]:
        """The loss scale alone, as ``torch.amp.GradScaler.state_dict()`` gives it; {} where none follows overflows."""
        if self._scale is None:
            return {}
        return {
            "scale": self.loss_scale,
            "growth_factor": self.loss_scale_factor,
            "backoff_factor": 1 / self.loss_scale_factor,
            "growth_interval": self.loss_scale_steps,
            "_growth_tracker": self.steps_since_last_scale,
        }

    def load_scaler_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a loss scale that ``scaler_state_dict()``, or a GradScaler, gave; {} leaves the one that is there.

        Raises CheckpointError when it is no such state.
        """
        if self._scale is None or not state:
            return
        names = {"scale", "growth_factor", "growth_interval", "_growth_tracker"}
        if not names <= state.keys():
            raise CheckpointError(
                f"This is no state of a loss scale, which has {', '.join(sorted(names))}; it has "
                f"{', '.join(map(str, state))}. Give it what scaler_state_dict(), or GradScaler.state_dict(), gave."
            )
        self._learn()
        self._scale = LossScale(context(), state["scale"], state["_growth_tracker"])
        self.loss_scale_factor, self.loss_scale_steps = state["growth_factor"], state["growth_interval"]

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
    if not knows_shards(optimizer):
        check_adapted(optimizer, state)
    elif isinstance(optimizer, CheckingOptimizer):
        optimizer.check_state(state)
