"""Parameters that a backward came to and that got no gradient, found in the first step."""

from __future__ import annotations

from typing import Any

import torch

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
        seen: set[Any] = set()
        waiting: list[Any] = [torch._C._current_autograd_node()]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            following = node.next_functions
            waiting.extend(edge[0] for edge in following)
            if not following:
                _note(node)


def _note(leaf: Any) -> None:
    parameter = getattr(leaf, "variable", None)
    if not isinstance(parameter, DistributedParameter) or parameter._flat is None:
        return
    if parameter._flat.reached is not None and is_accumulated(leaf):
        parameter._flat.reached.add(parameter._index)


def is_accumulated(node: Any) -> bool | None:
    """Whether the present backward adds to the ``.grad`` whose autograd node this is.

    False for a backward that does not reach it; None where torch.autograd.grad is to return it.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return None
