"""Parameters that a backward came to and that got no gradient, found in the first step."""

from __future__ import annotations

import torch

from ..autograd import Node, is_accumulated, leaves_behind, running_node
from ..shard.flat import flat_of
from ..shard.parameter import DistributedParameter

_WALKS = 8
"""Enough for the first step of most scripts; each one costs the host about a microsecond for every autograd node."""


class FirstGraphs:
    """Notes, in the first backwards, which parameters autograd is about to give a gradient.

    Autograd knows, whatever computes the gradient and wherever it goes.  The optimizers' first step compares
    (``FlatShard.warn_of_untrained``).
    """

    def __init__(self) -> None:
        self._left = _WALKS

    def walk(self) -> None:
        """Called by a hook of a tensor in the running backward: look at everything the tensor was computed from."""
        if not self._left:
            return
        self._left -= 1
        for leaf, edge in leaves_behind([running_node()]):
            _note(leaf, edge.node)


def _note(parameter: torch.Tensor, node: Node) -> None:
    flat = flat_of(parameter)
    if flat is None or flat.gradient.reached is None or not isinstance(parameter, DistributedParameter):
        return
    if is_accumulated(node):
        flat.gradient.reached.add(parameter._index)
