"""``torch.autograd.grad`` and ``backward(inputs=...)`` with sharded parameters among what they are to reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from ..autograd import edge_of, leaves_behind
from ..comm import ops
from ..comm.base import ReduceOp
from ..errors import UnsupportedError
from .flat import place_of
from .parameter import ShardedParameter


def backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``torch.autograd.backward``: accumulates in ``inputs`` alone."""
    roots, inputs = _edges(args[0]), kwargs.pop("inputs", None)
    if inputs is not None:
        inputs = _tuple(inputs)
        reached = _reached(roots, inputs)
        kwargs["inputs"] = [edge for edges in map(reached.edges, inputs) for edge in edges] + reached.tokens
    torch.autograd.backward(roots, *args[1:], **kwargs)


def gradients(args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> tuple[Any, ...]:
    """``torch.autograd.grad``: the parameters' gradients are reduced over the ranks.

    As in a backward, a parameter that some ranks have no gradient for counts as zeros there.  Collective; ``what``
    says so in errors.
    """
    named = dict(zip(("outputs", "inputs", "grad_outputs"), args, strict=False)) | kwargs
    roots, inputs = _edges(named.pop("outputs")), _tuple(named.pop("inputs"))
    places = [index for index, value in enumerate(inputs) if isinstance(value, ShardedParameter)]
    for index in places:
        flat, number = place_of(inputs[index])
        if flat.unit.pools.stage is not None:
            raise UnsupportedError(
                f"torch.autograd.grad of {flat.names[number]!r}: only the ranks of one stage of a pipeline use it. "
                "Call backward() on the loss and read the parameters' gradients."
            )
    reached = _reached(roots, inputs)
    edges = [reached.edges(value) for value in inputs]
    materializes, allows = named.pop("materialize_grads", False), named.pop("allow_unused", False)
    flow = iter(torch.autograd.grad(roots, [edge for some in edges for edge in some], allow_unused=True, **named))
    found = [_sum(value, [next(flow) for _ in some]) for value, some in zip(inputs, edges, strict=True)]
    flat, _ = place_of(inputs[places[0]])
    ctx = flat.unit.ctx
    ctx.engine.comes_to(what)
    missing = torch.tensor([found[index] is None for index in places], dtype=torch.uint8, device="cpu")
    ctx.control.all_reduce(missing, "min")
    op: ReduceOp = "sum" if ctx.gradient_divisor == 1 else "avg"
    for index, is_missing in zip(places, missing.tolist(), strict=True):
        if not is_missing:
            own = found[index]
            found[index] = ops.reduce_gradient(_zeros(inputs[index]) if own is None else own, op, ctx.data_group)
    for index, value in enumerate(found):
        if value is None and materializes:
            found[index] = _zeros(inputs[index]).requires_grad_(bool(named.get("create_graph")))
        elif value is None and not allows:
            raise RuntimeError(
                f"The differentiated Tensor at index {index} appears to not have been used in the graph. Set "
                "allow_unused=True if this is the desired behavior."
            )
    return tuple(found)


class _Reached:
    """Where a graph ends: in what is to be reached, and in what goes along with it."""

    def __init__(self) -> None:
        self.tokens: list[GradientEdge] = []
        self._edges: dict[int, list[GradientEdge]] = {}

    def add(self, leaf: torch.Tensor, edge: GradientEdge) -> None:
        """``leaf`` is to be reached, here among other places."""
        self._edges.setdefault(id(leaf), []).append(edge)

    def edges(self, value: Any) -> list[Any]:
        """What to ask autograd for instead of ``value``, which it would not find.

        A parameter that is gathered in another dtype than it rests in is another leaf in each forward, and what it
        rests as is none of them.
        """
        if not isinstance(value, ShardedParameter):
            return [value]
        return self._edges.get(id(value)) or [edge_of(value)]


def _reached(roots: Iterable[Any], inputs: Sequence[Any]) -> _Reached:
    parameters = [value for value in inputs if isinstance(value, ShardedParameter)]
    wanted = {id(value) for value in parameters}
    units = {id(place_of(value)[0].unit) for value in parameters}
    reached = _Reached()
    for leaf, edge in leaves_behind(roots):
        if id(leaf) in wanted:
            reached.add(leaf, edge)
        elif not units.isdisjoint(map(id, getattr(leaf, "goes_with", ()))):
            reached.tokens.append(edge)
    return reached


def _tuple(values: Any) -> tuple[Any, ...]:
    return (values,) if isinstance(values, (torch.Tensor, GradientEdge)) else tuple(values)


def _edges(roots: Any) -> tuple[Any, ...]:
    return tuple(edge_of(root) if isinstance(root, ShardedParameter) else root for root in _tuple(roots))


def _sum(value: Any, found: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Of what came over all edges to ``value``, in the dtype that it rests in."""
    parts = [part for part in found if part is not None]
    if not isinstance(value, ShardedParameter) or not parts:
        return parts[0] if parts else None
    dtype = place_of(value)[0].dtype
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total = total + part
    return total


def _zeros(value: Any) -> torch.Tensor:
    if not isinstance(value, ShardedParameter):
        return torch.zeros_like(value)
    flat, index = place_of(value)
    return torch.zeros(flat.shape_of(index), dtype=flat.dtype, device=flat.shard.device)
