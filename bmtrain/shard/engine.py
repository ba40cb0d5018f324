"""What shards, and the packages above, ask of the engine: the part of the block layer that decides when units move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import nn

from ..context import context
from .flat import FlatShard
from .parameter import ShardedParameter
from .unit import ShardUnit

T = TypeVar("T")


class Run(NamedTuple):
    """An outermost forward under autograd."""

    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    autocast: torch.dtype | None


LatestRuns = Callable[[], list[Run | None]]
"""Some forwards, held without their modules: None where one is gone by the time that they are asked for."""

MOST_RUNS = 8
"""How many forwards of a step are remembered: each keeps its batch until the step is over."""


class StepMeter(Protocol):
    """Measures steps of a script that says nothing of it."""

    def note_norm(self, norm: torch.Tensor, norm_type: float) -> None:
        """``norm`` is that of the gradients that were clipped, 0-d."""

    def managed_step(self, loss_scale: torch.Tensor | None) -> AbstractContextManager[None]:
        """Inside the ``with`` an OptimManager makes one step; ``loss_scale`` is 0-d."""


class Engine(Protocol):
    """When parameters are whole and when gradients are reduced."""

    @property
    def idle(self) -> bool:
        """Whether no distributed module is running."""

    def shard(self, module: nn.Module) -> None:
        """Shard every parameter of ``module`` that is not sharded yet.  Collective."""

    def meet(self, what: str) -> None:
        """Return once every rank has come to ``what``; raises RankDivergenceError if one came elsewhere."""

    def forward(
        self,
        unit: ShardUnit | None,
        recompute: bool | None,
        call: Callable[..., T],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> T:
        """Run one module's forward with its unit whole."""

    def note_beside(self, module: nn.Module) -> None:
        """``module``, which has no parameters, is called outside of any other."""

    @property
    def looks_at_losses(self) -> bool:
        """Whether what autograd keeps of the first losses is looked at, which compiled code would hide."""

    @property
    def may_inline(self) -> bool:
        """Whether blocks that keep their activations may be run without the engine: nothing moves on one rank."""

    def keeps(self, unit: ShardUnit, recompute: bool | None) -> bool:
        """Whether a block that was told ``recompute`` keeps its activations, unless inputs are larger."""

    def whether_all_kept(self, call: Callable[[], T]) -> tuple[T, bool | None]:
        """What ``call`` returns, and whether no block in it is recomputed; None as long as that is being decided."""

    @property
    def meter(self) -> StepMeter | None:
        """What measures the steps; None where BMTRAIN_METER does not ask for it."""

    @property
    def outside(self) -> OutsideForward:
        """Whole units where no forward of their own module runs."""

    @property
    def of_no_module(self) -> OfNoModule:
        """Who averages the gradients of parameters that no distributed module holds."""

    @property
    def recompute_note(self) -> Callable[[torch.Tensor], object] | None:
        """While a block runs a second time: what to call with each tensor that would be saved."""

    def whole_flat(self, view: torch.Tensor) -> FlatShard | None:
        """The whole FlatShard (None if none) of whose gather buffer ``view`` is a part."""

    def note_loss(self, loss: torch.Tensor) -> None:
        """Gradients of ``loss`` are to be computed."""

    def finish_backward(self) -> None:
        """Reduce every gradient that is not reduced yet.  Collective."""

    def latest_runs(self) -> LatestRuns:
        """The forwards since the last optimizer step, a few, without their graphs."""

    def note_step(self) -> None:
        """An optimizer begins a step on sharded parameters, on all ranks."""

    def updated(self, units: Sequence[ShardUnit]) -> None:
        """An optimizer has just changed all of ``units``.  Collective."""

    def has_room(self, size: int) -> bool:
        """Whether so many bytes of the device's memory may be held beside a few steps."""

    def optimizer_stepped(self, state_bytes: Callable[[], int]) -> None:
        """An optimizer has updated all its parameters; ``state_bytes`` is what its states take on this rank."""


class OfNoModule(Protocol):
    """Parameters that no distributed module holds.

    Attributes:
        waits: whether somebody else averages after the backward that is running.
    """

    waits: bool

    def drive(self, parameters: Iterable[torch.Tensor], average: Callable[[list[torch.Tensor]], None]) -> None:
        """An optimizer that steps on averages has ``parameters``; ``average`` makes them, and is collective."""

    def are_nobodys(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether ``drive`` was told of none of them, though ranks train on samples of their own; true only once."""


class OutsideForward(Protocol):
    """Makes units whole though no forward of their own module runs."""

    def pinned(self, units: Iterable[ShardUnit]) -> AbstractContextManager[None]:
        """Whole units inside the ``with``, outside of any forward or in one.  Collective."""

    def all_pinned(self) -> list[ShardUnit]:
        """The units that somebody has pinned."""

    def release(self, units: Iterable[ShardUnit]) -> None:
        """Give up whole values that no running forward has pinned."""

    def is_near(self, parameters: Iterable[ShardedParameter]) -> bool:
        """Whether operations outside of any forward have used ``parameters``, and their values are still here."""

    def on_demand(
        self, parameters: Sequence[ShardedParameter], func: Callable[..., object] | None, what: str
    ) -> AbstractContextManager[None]:
        """Whole parameters for one operation, and for the rest of the forward it is part of.  Collective."""

    def apart(self, value: object) -> object:
        """What an operation outside of any forward gives: a copy, if it is a view of whole values."""

    def pin_for_loop(self, unit: ShardUnit) -> Pin | None:
        """Make ``unit`` whole until the pin is released or the running forward ends; None if none runs."""

    def pin_until_next(self, holder: nn.Module, unit: ShardUnit) -> None:
        """Make ``unit`` whole until ``holder`` asks so for another, or the running forward ends."""


class Pin(Protocol):
    """Keeps one unit whole."""

    def release(self) -> None:
        """Let go of it."""


def engine() -> Engine:
    """The process's engine.  Raises NotInitializedError before ``init_distributed``."""
    return cast(Engine, context().engine)
