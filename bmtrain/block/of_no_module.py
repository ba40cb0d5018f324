"""Parameters that no distributed module holds: who averages their gradients, and of whose nobody does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..context import Context
from ..shard.flat import flat_of


@dataclass(frozen=True)
class _Driven:
    """A parameter, which is not kept alive, and what zeros in its place are like."""

    parameter: weakref.ref[torch.Tensor]
    zeros: Callable[[], torch.Tensor]

    @staticmethod
    def of(parameter: torch.Tensor) -> _Driven:
        shape, dtype, device = parameter.shape, parameter.dtype, parameter.device
        return _Driven(weakref.ref(parameter), lambda: torch.zeros(shape, dtype=dtype, device=device))


class OfNoModule:
    """What a plain ``loss.backward()`` does for them.

    Attributes:
        waits: whether somebody else averages after the backward that is running.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._driven: list[_Driven] = []  # by the order of drive(), the same on all ranks
        self._numbers: dict[int, int] = {}
        self._reached: set[int] = set()
        self._said: dict[int, weakref.ref[torch.Tensor]] = {}
        self._average: Callable[[list[torch.Tensor]], None] | None = None
        self.waits = False

    def drive(self, parameters: Iterable[torch.Tensor], average: Callable[[list[torch.Tensor]], None]) -> None:
        """An optimizer that steps on averages has ``parameters``; ``average`` makes them, and is collective."""
        self._average = average
        for parameter in parameters:
            if not self.is_driven(parameter):
                self._numbers[id(parameter)] = number = len(self._driven)
                self._driven.append(_Driven.of(parameter))
                self._watch(parameter, number)

    def is_driven(self, parameter: torch.Tensor) -> bool:
        """Whether ``drive`` was told of it."""
        number = self._numbers.get(id(parameter))
        return number is not None and self._driven[number].parameter() is parameter

    def _watch(self, parameter: torch.Tensor, number: int) -> None:
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return  # quantized weights, which never train
        trains = parameter.requires_grad
        parameter.requires_grad_(True)  # one that is frozen may train later
        hook: Any = parameter.register_post_accumulate_grad_hook
        hook(lambda _: self._reached.add(number))
        parameter.requires_grad_(trains)

    def are_nobodys(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether ``drive`` was told of none of them, though ranks train on samples of their own; true only once."""
        new = [p for p in parameters if (known := self._said.get(id(p))) is None or known() is not p]
        if self._ctx.topology.data_size == 1 or not new or any(map(self.is_driven, new)):
            return False
        self._said |= {id(p): weakref.ref(p) for p in new}
        return True

    def backward_ends(self) -> None:
        """A backward through a distributed module is over, on all ranks: what it gave is read from here on."""
        if self._average is None or self.waits:
            return
        # Which are still there differs between ranks, as garbage is collected; which got gradients now does not matter.
        # An optimizer that a model's constructor makes has parameters that are sharded when the constructor ends.
        parameters = [one.parameter() for one in self._driven]
        flags = torch.zeros(2, len(parameters), dtype=torch.uint8, device="cpu")
        reached, sharded = flags.unbind()
        reached[list(self._reached)] = 1
        sharded[[number for number, p in enumerate(parameters) if p is not None and flat_of(p) is not None]] = 1
        self._reached.clear()
        self._ctx.control.all_reduce(flags.view(-1), "max")
        those = (reached > sharded).nonzero().flatten().tolist()
        self._average([self._driven[n].zeros() if (p := parameters[n]) is None else p for n in those])
