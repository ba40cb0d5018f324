"""Tensors of no module that one rank's gradient moves: stepped by hand, they come to differ between ranks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import FrameType

import torch
from torch.autograd.graph import GradientEdge

from ...alike import differing_ranks, on_all_ranks
from ...autograd import is_accumulated, leaves_behind
from ...context import Context
from ...log import warn
from ...shard.flat import flat_of
from ...topology import Dimension
from ...users_code import users_line
from ..of_no_module import OfNoModule

_BACKWARDS = 8
"""How many of the first backwards are looked at."""
_MOST = 32  # tensors


class FirstLeaves:
    """Those that the first backwards give a gradient that nobody averages, compared when these are over.

    What ranks had alike and come to have otherwise, they have stepped on.

    Attributes:
        wanted: whether backwards are still looked at.
    """

    def __init__(self, ctx: Context, of_no_module: OfNoModule) -> None:
        self._ctx, self._of_no_module = ctx, of_no_module
        self._leaves: list[weakref.ref[torch.Tensor]] = []
        self._alike: set[int] = set()  # which of them all ranks had alike
        self._backwards, self._place = 0, ""
        self.wanted = ctx.topology.data_size > 1

    def note(self, leaves: Iterable[torch.Tensor], samples: int, frame: FrameType | None) -> None:
        """A backward, called in ``frame``, gives ``leaves`` gradients; one of ``samples`` rows is each rank's own."""
        self._place = users_line(frame)
        for leaf in leaves:
            known = self._of_no_module.is_driven(leaf) or any(one() is leaf for one in self._leaves)
            if not known and len(self._leaves) < _MOST and not _is_of_samples(leaf.shape, samples):
                self._leaves.append(weakref.ref(leaf))

    def backward_ends(self) -> None:
        """Warn of those that differ.  Collective, a few times."""
        self._backwards += 1
        self.wanted = self._backwards < _BACKWARDS
        there = [None if (leaf := one()) is None else (index, leaf) for index, one in enumerate(self._leaves)]
        leaves = dict(on_all_ranks(self._ctx, there, _MOST))
        if not leaves:
            return
        dimensions: tuple[Dimension, ...] = ("replicate", "shard")
        found = differing_ranks(
            self._ctx, {f"{i} {tuple(leaf.shape)}": (leaf.detach(), dimensions) for i, leaf in leaves.items()}
        )
        if found is None:
            return
        indices = {int(name.partition(" ")[0]) for name in found}
        differing = [leaf for index, leaf in leaves.items() if index in indices & self._alike]
        self._alike |= leaves.keys() - indices
        if not differing:
            return
        self.wanted = False
        if self._ctx.rank == 0 and self._of_no_module.are_nobodys(differing):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in differing[:3])
            warn(
                f"A tensor that belongs to no module (of shape {shapes}; {self._place}) "
                "has come to differ between ranks: its gradient is that of this rank's samples alone. Before it is "
                "stepped on, write tensor.grad = bmt.distributed.all_reduce(tensor.grad, 'avg'), or give the tensor to "
                "an optimizer that a bmt.optim.OptimManager drives.",
                stacklevel=2,
            )


def _is_of_samples(shape: torch.Size, samples: int) -> bool:
    """Whether each row may be of a sample of this rank's, as where a gradient of the inputs is asked for."""
    return (len(shape) > 1 and shape[0] == samples) or (len(shape) > 2 and shape[1] == samples)


def leaves_of_no_module(roots: Iterable[torch.Tensor | GradientEdge]) -> list[torch.Tensor]:
    """Whatever the running backward, which began with ``roots``, gives a gradient and is no sharded parameter."""
    return [
        leaf
        for leaf, edge in leaves_behind(roots)
        if flat_of(leaf) is None and not hasattr(leaf, "goes_with") and is_accumulated(edge.node)
    ]
