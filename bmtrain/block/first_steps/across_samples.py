"""Losses that compare the samples of a batch, or are made of a batch's statistics: each rank's share gives another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from ...autograd import Node, is_output
from ..frame import NotKeptError

_MOST = 3000
"""So many of autograd's nodes are looked at, those nearest to the loss."""

_MOST_BESIDE = 16

Shape = tuple[int, ...]

# By the first words of autograd's names.
_VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Reshape"}
_ADDS = {"Add", "Sub", "Rsub"}
_ELEMENTWISE = {
    "Mul", "Div", "Pow", "Maximum", "Minimum", "Where", "Atan2", "Lerp", "Addcmul", "Addcdiv", "MseLoss",
    "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "SoftMarginLoss", "Fmax", "Fmin",
} | _ADDS  # fmt: skip
_LOSSES = {
    "NllLoss", "NllLoss2D", "MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy",
    "BinaryCrossEntropyWithLogits", "SoftMarginLoss", "MultiMarginLoss", "MultilabelMarginLoss", "KlDiv",
}  # fmt: skip
_SUMS = {"Sum", "Mean", "Nansum"}
_SPREADS = {"Var", "Std", "VarMean", "StdMean", "LinalgVectorNorm", "Norm", "Prod"}
_CHOOSES = {"Max", "Min", "Amax", "Amin", "Topk", "Sort", "Kthvalue", "Median", "Mode"}
_OVER = {"Softmax", "LogSoftmax", "Logsumexp"}
_LINEAR = {
    "Neg", "ToCopy", "Clone", "Squeeze", "Unsqueeze", "Expand", "Transpose", "T", "Permute", "Slice", "Select", "Index",
    "IndexSelect", "Gather", "Diagonal", "Cat", "Stack", "Split", "Unbind", "Repeat", "Flip", "Roll", "Alias", "Triu",
    "Tril", "Trace", "MaskedFill", "MaskedSelect",
} | _VIEWS | _ADDS | _SUMS  # fmt: skip
_OF_NUMBERS = {"Mul", "Div", "Neg", "ToCopy", "Clone", "Alias", "Squeeze", "Sqrt", "Pow", "Exp", "Log"} | _ADDS | _VIEWS
"""Through which a number comes into the loss."""
_BETWEEN_RANKS = {"_GatherRows", "_AllGather", "_AllReduce", "_ReduceScatter", "_Broadcast"}
_BENDS = {
    "Pow", "Abs", "Exp", "Log", "Log1P", "Sqrt", "Rsqrt", "Reciprocal", "Relu", "Sigmoid", "Tanh", "Softplus", "Clamp",
    "ClampMin", "ClampMax", "Gelu", "Silu", "Xlogy", "Mul", "Div", "Mm", "Bmm", "Logdet", "LinalgDet", "LinalgSlogdet",
    "LinalgInvEx", "LinalgCholeskyEx", "LinalgEigh", "LinalgSvd", "LinalgSolveEx",
} | _LOSSES | _SPREADS | _OVER | _CHOOSES  # fmt: skip
"""Not linear in something: of a batch's mean they are no mean."""


@dataclass(frozen=True)
class _Rows:
    """A tensor whose dimension ``dim`` counts samples, and that is the same all along ``alike``.

    ``sure`` says that these are samples: of (length, batch, width) the first dimension is not.
    """

    dim: int
    alike: frozenset[int] = frozenset()
    sure: bool = True


@dataclass(frozen=True)
class _Other:
    name: str


_ALIKE, _UNKNOWN = _Other("no samples"), _Other("unknown")
_MEANS = _Other("sums or means over samples")  # and what is linear in them
_PAIRS = _Other("pairs of samples")
_CENTRED = _Other("samples, with a mean over them added or taken off")


@dataclass(frozen=True)
class _Found:
    """What is made of several samples, by ``function``."""

    function: str
    compares: bool


State = _Rows | _Other | _Found


class AcrossSamples:
    """Goes forward through a loss's graph, and keeps track of which dimension of each tensor counts samples.

    What is not known to be of several samples is not told of.  Only shapes and numbers that autograd keeps are read.

    Attributes:
        beside: rows without a gradient, maybe of samples, that all samples were compared with; and by what function.

    Args:
        samples: how many this rank has.
        sure: whether the first dimension of what the model was given counts them.
        single: whether each sample is a single number there, as the indices that a table is asked for.
    """

    def __init__(self, samples: int, sure: bool, single: bool) -> None:
        self._samples, self._sure, self._single = samples, sure, single
        self._states: dict[Node, State] = {}
        self._numbers: dict[Node, _Found] = {}  # those made of all that there is, which may be no part of the loss
        self._shapes: dict[tuple[Node, int], Shape] = {}
        self.beside: list[tuple[str, torch.Tensor]] = []
        self._compared: dict[Node, tuple[str, torch.Tensor]] = {}

    def of(self, loss: Node) -> tuple[str, bool] | None:
        """The function that makes ``loss`` one of several samples, and whether it compares them; None if nothing is."""
        if self._samples < 2:
            return None
        for node in _in_order(loss):
            try:
                self._states[node] = self._after(node)
            except (AttributeError, RuntimeError, IndexError, TypeError, ValueError, NotKeptError):
                # Of another torch; without sizes; freed, or to be recomputed.
                self._states[node] = _UNKNOWN
            if _name(node) not in ("Diagonal", "Trace"):  # of each with its own alone
                compared = (self._compared.pop(other, None) for other, _ in node.next_functions if other is not None)
                self.beside += [one for one in compared if one is not None]
        self.beside = self.beside[-_MOST_BESIDE:]  # nearest to the loss
        found = self._states.get(loss, _UNKNOWN)
        if found is _PAIRS:
            found = _Found("a product of samples", True)
        if not isinstance(found, _Found):
            found = next((self._numbers[node] for node in self._terms(loss) if node in self._numbers), found)
        return (found.function, found.compares) if isinstance(found, _Found) else None

    def _terms(self, loss: Node) -> Iterator[Node]:
        """The numbers that ``loss`` is a sum, a multiple or a quotient of, and itself."""
        seen, waiting = {loss}, [loss]
        while waiting:
            node = waiting.pop()
            yield node
            if _name(node) in _OF_NUMBERS:
                for other, number in node.next_functions:
                    if other is not None and other not in seen and prod(self._shape(other, number)) == 1:
                        seen.add(other)
                        waiting.append(other)

    def _after(self, node: Node) -> State:
        state, shape = self._made(node), self._shape(node)
        if not is_output(node) or prod(shape) == 1:
            return state
        if not shape[0] or shape[0] % self._samples:
            return _UNKNOWN  # the rows that the model was given are a single sample, as the nodes of a graph
        known = isinstance(state, _Found) or state is _PAIRS or (isinstance(state, _Rows) and state.sure)
        return state if known else _Rows(0, sure=self._sure or len(shape) <= 2)

    def _made(self, node: Node) -> State:
        name, out = _name(node), self._shape(node)
        edges = [(other, self._shape(other, nr)) for other, nr in node.next_functions if other is not None]
        states = [self._state(other, nr, len(out)) for other, nr in node.next_functions if other is not None]
        found = next((state for state in states if isinstance(state, _Found)), None)
        if found is not None:
            return found
        if all(state is _ALIKE for state in states):
            return self._source(node, name, out, [shape for _, shape in edges])
        if name in ("Mm", "Addmm", "Bmm", "Baddbmm", "Mv", "Dot"):
            return self._product(node, name, out)
        if name in ("Cdist", "EuclideanDist", "Pdist"):
            return self._distances(node, name, states, [shape for _, shape in edges])
        if name in _BETWEEN_RANKS or (len(node._input_metadata) > 1 and isinstance(node, BackwardCFunction)):
            return _UNKNOWN
        if _PAIRS in states:
            if name == "Diagonal":
                return _Rows(0, sure=False)
            return _PAIRS if _UNKNOWN not in states else _UNKNOWN
        if _UNKNOWN in states:
            return _UNKNOWN
        shapes = [shape for _, shape in edges]
        if _CENTRED in states:
            return self._of_centred(node, name, states)
        if _MEANS in states:
            return self._of_means(node, name, states, shapes, out)
        return self._of_rows(node, name, states, shapes, out)

    def _state(self, node: Node, number: int, dims: int) -> State:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            with torch._C.DisableTorchFunctionSubclass():
                is_input = not isinstance(leaf, torch.nn.Parameter) and leaf.dim() > 1
                return _Rows(0, sure=self._sure) if is_input and leaf.shape[0] == self._samples else _ALIKE
        state = self._states.get(node, _UNKNOWN)
        if number and isinstance(state, _Rows) and self._shape(node, number) != self._shape(node):
            first, this = self._shape(node), self._shape(node, number)
            fits = len(this) > state.dim and len(first) > state.dim and this[state.dim] % self._samples == 0
            return state if fits else _UNKNOWN
        return state

    def _shape(self, node: Node, number: int = 0) -> Shape:
        """Of what ``node`` made; autograd takes long to tell."""
        known = self._shapes.get((node, number))
        if known is None:
            leaf = getattr(node, "variable", None)
            with torch._C.DisableTorchFunctionSubclass():
                made: Any = node._input_metadata[number] if leaf is None else leaf
                known = self._shapes[node, number] = tuple(map(int, made.shape))
        return known

    # -- where samples come in

    def _source(self, node: Node, name: str, out: Shape, taken: Sequence[Shape]) -> State:
        """Of what needs no gradient nothing is known: where it alone can have given the first dimension, it did."""
        if not out or out[0] < self._samples or out[0] % self._samples:
            return _ALIKE
        rows = _Rows(0, sure=self._sure)
        missing = [other is None for other, _ in node.next_functions]
        at = 1 if name in ("Addmm", "Baddbmm") else 0
        if name == "Embedding":
            return rows if len(out) > 2 else (rows if self._single and out[0] == self._samples else _UNKNOWN)
        if name in ("Mm", "Addmm", "Bmm", "Baddbmm", "Convolution", "Linear", "_Linear", "MkldnnConvolution"):
            return rows if len(missing) > at and missing[at] else _ALIKE
        is_binary = name in ("Mul", "Add", "Sub", "Div") and any(missing)
        if is_binary and out[0] == self._samples and len(out) > 1:
            return _UNKNOWN if any(len(shape) == len(out) and shape[0] == out[0] for shape in taken) else rows
        return _ALIKE if not any(missing) or name in ("Expand", "Repeat") else _UNKNOWN if name == "Index" else _ALIKE

    # -- products and distances

    def _product(self, node: Node, name: str, out: Shape) -> State:
        edges = list(node.next_functions)[1 if name in ("Addmm", "Baddbmm") else 0 :][:2]
        if len(edges) < 2:
            return _UNKNOWN
        a, b = (_ALIKE if other is None else self._state(other, nr, len(out)) for other, nr in edges)
        if _UNKNOWN in (a, b):
            return _UNKNOWN
        if _PAIRS in (a, b):
            return _PAIRS if all(state in (_PAIRS, _ALIKE) for state in (a, b)) else _UNKNOWN
        if _MEANS in (a, b) or _CENTRED in (a, b):
            if _ALIKE in (a, b):
                return _UNKNOWN if name in ("Mv", "Dot") else _CENTRED if _CENTRED in (a, b) else _MEANS
            return _UNKNOWN if name in ("Mv", "Dot") and _MEANS in (a, b) else _Found("a product of means", False)
        if name == "Dot":
            return _MEANS
        if name == "Mv":
            return a if isinstance(a, _Rows) and a.dim == 0 and b is _ALIKE else _UNKNOWN
        lead = len(out) - 2
        first, second = (state.dim - lead if isinstance(state, _Rows) else None for state in (a, b))
        if prod(out[:-2]) == 1:
            if first == 0 and edges[1][0] is None:
                self._note_beside("a product", node, "_saved_mat2", -1)
            if second == 1 and edges[0][0] is None:
                self._note_beside("a product", node, "_saved_self", -2)
        sure = all(state.sure for state in (a, b) if isinstance(state, _Rows))
        if lead and 0 in (s.dim for s in (a, b) if isinstance(s, _Rows)):  # each sample by itself
            alone = all(s is _ALIKE or (isinstance(s, _Rows) and s.dim == 0) for s in (a, b))
            return _Rows(0, sure=sure) if alone else _UNKNOWN
        if first == 0 and second == 1:
            is_square = out[-1] == out[-2] and prod(out[:-2]) == 1
            return _PAIRS if is_square else _UNKNOWN
        if first == 0 and second is None:
            return _Rows(lead, sure=sure)
        if first is None and second == 1:
            return _Rows(lead + 1, sure=sure)
        if first == 1 and second == 0 and prod(out[:-2]) == 1:
            return _MEANS if sure else _UNKNOWN
        return _UNKNOWN

    def _distances(self, node: Node, name: str, states: Sequence[State], shapes: Sequence[Shape]) -> State:
        first = states[0]
        if name == "Pdist":
            return _Found("pdist", True) if isinstance(first, _Rows) and first.dim == 0 else _UNKNOWN
        dims = [state.dim if isinstance(state, _Rows) else None for state in states]
        ndim = len(shapes[0])
        if len(states) == 1 and dims == [ndim - 2] and prod(shapes[0][:-2]) == 1:
            is_first = node.next_functions[0][0] is not None
            self._note_beside("cdist", node, "_saved_x2" if is_first else "_saved_x1", -2)
        if len(states) == 2 and dims == [ndim - 2, ndim - 2] and prod(shapes[0][:-2]) == 1:
            return _PAIRS if shapes[0][-2] == shapes[1][-2] else _UNKNOWN
        if all(dim == 0 for dim in dims if dim is not None) and (ndim > 2 or dims.count(None)) and dims[0] == 0:
            return first
        return _UNKNOWN

    def _note_beside(self, function: str, node: Node, saved: str, dim: int) -> None:
        """All samples meet all rows, counted along ``dim``, of what ``node`` has ``saved`` and needs no gradient.

        Rows of samples lie one behind the other, and there are as many of them as samples, or some batches of them.
        """
        try:
            rows = getattr(node, saved, None)
        except (RuntimeError, NotKeptError):
            return
        if not isinstance(rows, torch.Tensor) or not rows.is_floating_point() or rows.requires_grad:
            return
        if rows.dim() < 2 or not rows.shape[dim] or rows.shape[dim] % self._samples:
            return
        if rows.stride(dim) >= rows.stride(-3 - dim) > 0:
            self._compared[node] = function, rows

    # -- what follows

    def _of_means(self, node: Node, name: str, states: Sequence[State], shapes: Sequence[Shape], out: Shape) -> State:
        means = [shape for state, shape in zip(states, shapes, strict=True) if state is _MEANS]
        others = [state for state in states if state not in (_MEANS, _ALIKE)]
        if name in _ADDS and any(isinstance(state, _Rows) for state in others) and any(prod(s) > 1 for s in means):
            return _CENTRED
        if name in _LINEAR:
            return _MEANS
        if name in ("Mul", "Div") and not others and len(means) == 1:
            is_numerator = name == "Mul" or node.next_functions[0][0] is not None
            if is_numerator or prod(means[0]) == 1:
                return _MEANS
        if all(prod(shape) == 1 for shape in means):
            return _UNKNOWN if others else _MEANS  # numbers are looked at elsewhere
        return _Found(f"{name.lower()} of a mean", False) if name in _BENDS else _UNKNOWN

    def _of_centred(self, node: Node, name: str, states: Sequence[State]) -> State:
        """Linear as it is, and no longer once it meets what each sample has of its own."""
        if name in _SUMS:
            return _MEANS
        if name in _LINEAR:
            return _CENTRED
        if name not in _BENDS:
            return _UNKNOWN
        if name in ("Mul", "Div") and all(state in (_CENTRED, _ALIKE) for state in states) and len(states) == 1:
            other = getattr(node, "_saved_other", None)
            if not isinstance(other, torch.Tensor) or not other.dim() or other.shape[0] != self._samples:
                return _CENTRED
        return _Found(f"{name.lower()} of what a mean was taken off", False)

    def _of_rows(self, node: Node, name: str, states: Sequence[State], shapes: Sequence[Shape], out: Shape) -> State:
        rows = [(state, shape) for state, shape in zip(states, shapes, strict=True) if isinstance(state, _Rows)]
        state, shape = rows[0]
        sure = all(one.sure for one, _ in rows)
        if name in _SUMS | _SPREADS | _CHOOSES | _OVER:
            return self._reduced(node, name, state, shape, out)
        if name in _ELEMENTWISE:
            return self._elementwise(name, rows, out, sure)
        moved = _moved(node, name, state, shape, out, self._samples)
        if moved is not None:
            return moved
        if name in _LOSSES and prod(out) == 1:
            return _MEANS if sure else _UNKNOWN
        dim = state.dim
        if name == "Cat" and _signed(node._saved_dim, len(out)) == dim and len(rows) < len(node.next_functions):  # type: ignore[attr-defined]
            return _UNKNOWN  # among others, as of other ranks or of a queue
        if any(one.dim != dim for one, _ in rows) or len(out) <= dim:
            return _UNKNOWN
        if name == "Cat" or out[dim] == shape[dim]:
            return _Rows(dim, state.alike if len(out) == len(shape) else frozenset(), sure)
        return _Rows(0, sure=sure) if name in ("Index", "IndexSelect", "MaskedSelect") and dim == 0 else _UNKNOWN

    def _elementwise(self, name: str, rows: Sequence[tuple[_Rows, Shape]], out: Shape, sure: bool) -> State:
        if name in _LOSSES and prod(out) == 1:
            whole = max((shape for _, shape in rows), key=len)
            made = self._aligned(rows, whole, sure)
            return made if made in (_PAIRS, _UNKNOWN) else (_MEANS if sure else _UNKNOWN)
        return self._aligned(rows, out, sure)

    def _aligned(self, rows: Sequence[tuple[_Rows, Shape]], out: Shape, sure: bool) -> State:
        """Of tensors that are broadcast to ``out``."""
        dims, alike = [], []
        for state, shape in rows:
            more = len(out) - len(shape)
            dims.append(state.dim + more)
            own = {dim + more for dim in state.alike} | {i + more for i, size in enumerate(shape) if size == 1}
            alike.append((own | set(range(more))) - {state.dim + more})
        if len(set(dims)) == 1:
            return _Rows(dims[0], frozenset(set.intersection(*alike)) if len(rows) > 1 else frozenset(), sure)
        if len(rows) == 2 and dims[1] in alike[0] and dims[0] in alike[1] and out[dims[0]] == out[dims[1]]:
            return _PAIRS
        return _UNKNOWN

    def _reduced(self, node: Node, name: str, state: _Rows, shape: Shape, out: Shape) -> State:
        dims = _dims(node, len(shape))
        if dims is not None and state.dim not in dims:
            if name in _OVER - {"Logsumexp"} or len(out) == len(shape):
                return _Rows(state.dim, state.alike, state.sure)
            return _Rows(state.dim - sum(dim < state.dim for dim in dims), sure=state.sure)
        if not state.sure:
            return _UNKNOWN
        if name in _SUMS:
            return _MEANS
        found = _Found(f"{name.lower()} over samples", name in _CHOOSES | _OVER)
        if dims is None and (name in _SPREADS or (name in _CHOOSES and len(shape) > 1)):
            self._numbers[node] = found
            return _UNKNOWN  # as what is taken off an exponent, or what gradients are divided by
        return found


def _in_order(loss: Node) -> list[Node]:
    """Those nearest to ``loss``, and it, in the order of their making."""
    seen, waiting, at = {loss}, [loss], 0
    while at < len(waiting) and len(waiting) < _MOST:
        for other, _ in waiting[at].next_functions:
            if other is not None and other not in seen and not hasattr(other, "variable"):
                seen.add(other)
                waiting.append(other)
        at += 1
    return sorted(waiting, key=lambda node: node._sequence_nr())


def _name(node: Node) -> str:
    return node.name().partition("Backward")[0]


def _signed(number: int, ndim: int) -> int:
    """A dimension; autograd shows negative ones as huge."""
    return (number - 2**64 if number >= 2**63 else number) % max(ndim, 1)


def _dims(node: Any, ndim: int) -> list[int] | None:
    """What is reduced; None for all."""
    saved = getattr(node, "_saved_dim", None)
    if saved is None or (isinstance(saved, tuple) and not saved):
        return None
    return [_signed(dim, ndim) for dim in (saved if isinstance(saved, tuple) else (saved,))]


def _moved(node: Any, name: str, state: _Rows, shape: Shape, out: Shape, samples: int) -> State | None:
    """Where a view has its samples; None for what is no view."""
    dim, ndim, sure = state.dim, len(shape), state.sure
    if name in _VIEWS:
        return _viewed(state, shape, out, samples)
    if name in ("T", "Transpose", "Permute"):
        order = list(range(ndim))
        if name == "Permute":
            order = [_signed(d, ndim) for d in node._saved_dims]
        else:
            a, b = (0, ndim - 1) if name == "T" else (_signed(node._saved_dim0, ndim), _signed(node._saved_dim1, ndim))
            order[a], order[b] = order[b], order[a]
        return _Rows(order.index(dim), frozenset(order.index(d) for d in state.alike), sure)
    if name == "Unsqueeze":
        at = _signed(node._saved_dim, ndim + 1)
        return _Rows(dim + (at <= dim), frozenset(d + (at <= d) for d in state.alike) | {at}, sure)
    if name in ("Select", "Unbind"):
        at = _signed(node._saved_dim, ndim)
        return _UNKNOWN if at == dim else _Rows(dim - (at < dim), frozenset(), sure)
    if name == "Stack":
        at = _signed(node._saved_dim, ndim + 1)
        return _Rows(dim + (at <= dim), frozenset(), sure)
    if name == "Squeeze":
        return _viewed(state, shape, out, samples)
    if name in ("Expand", "Repeat"):
        more = len(out) - ndim
        grown = {d + more for d in range(ndim) if shape[d] == 1 and out[d + more] > 1} | set(range(more))
        grown |= {d + more for d in state.alike}
        return _Rows(dim + more, frozenset(grown), sure) if out[dim + more] == shape[dim] else _UNKNOWN
    if name in ("Flip", "Roll"):
        over = [_signed(d, ndim) for d in node._saved_dims] or list(range(ndim))
        return _Found(f"{name.lower()} over samples", True) if dim in over and sure else state
    if name in ("Slice", "Split", "Clone", "ToCopy", "Alias", "MaskedFill"):
        return state
    return None


def _viewed(state: _Rows, shape: Shape, out: Shape, samples: int) -> State:
    """The same numbers in another shape: the dimension that counts samples is among those that it became."""
    before, rows = prod(shape[: state.dim]), shape[state.dim]
    ends = [prod(out[: dim + 1]) for dim in range(len(out))]
    within = [dim for dim, size in enumerate(out) if ends[dim] // max(size, 1) < before * rows and ends[dim] > before]
    whole = [dim for dim in within if out[dim] and out[dim] % samples == 0]  # else views of samples, side by side
    found = whole[:1] or sorted(within, key=lambda dim: -out[dim])[:1]
    return _Rows(found[0], frozenset(), state.sure) if found else _UNKNOWN
