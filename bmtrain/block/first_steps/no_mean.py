"""Losses whose mean over ranks is not the whole batch's, though ranks count alike: sums, and functions of means."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from ...autograd import Node, is_output
from ..frame import NotKeptError

_MOST = 1000
"""So many of autograd's nodes are looked at."""

_ADDS = ("AddBackward", "RsubBackward", "SubBackward")
_KEEPS = (
    "NegBackward", "ToCopyBackward", "ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward",
    "UnsqueezeBackward",
)  # fmt: skip
_PRODUCTS = ("MulBackward", "DivBackward")
_BENDS = (
    "LogBackward", "Log1PBackward", "Log2Backward", "ExpBackward", "Expm1Backward", "SqrtBackward", "RsqrtBackward",
    "PowBackward", "ReciprocalBackward", "TanhBackward", "SigmoidBackward", "SoftplusBackward",
)  # fmt: skip
"""Functions of one number of which the mean over ranks is another."""


class NoMean:
    """What is wrong with the mean over ranks of one loss.

    Args:
        samples: how many this rank has.
        ranks: how many have samples of their own.
        gives_number: whether the model has returned a single number, which may be its loss.
    """

    def __init__(self, samples: int, ranks: int, gives_number: bool) -> None:
        self._samples, self._ranks, self._gives_number = samples, ranks, gives_number

    def of(self, loss: Node) -> str | None:
        """What ``loss`` is instead of a mean, in words; None if nothing is known against it."""
        if self._samples < 2:
            return None
        waiting, looked = [(loss, 1.0)], 0
        while waiting and looked < _MOST:
            node, divisor = waiting.pop()
            looked += 1
            name = node.name()
            if name.startswith(_BENDS):
                if self._has_mean_below(node):
                    return f"{name.partition('Backward')[0].lower()} of a mean over them"
                continue
            if name.startswith(_PRODUCTS) and self._has_mean_below(node, 2):
                return "made of two means over them, multiplied or divided,"
            try:
                sizes = _summed(node, name)
                if sizes is not None:
                    if self._is_sum(divisor, sizes) and self._is_of_samples(node, sizes):
                        return "a sum over them" + ("" if divisor == 1 else f", divided by {divisor:g}")
                    continue
                step = self._divisor(node, name)
            except (NotKeptError, AttributeError, RuntimeError):  # to be recomputed; another torch; freed
                continue
            if step is not None:
                waiting += [(other, divisor * step) for other, _ in node.next_functions if other is not None]
        return None

    def _divisor(self, node: Node, name: str) -> float | None:
        """What ``node`` divides by; None if what it does is not known, or says that the user knows of ranks."""
        if name.startswith((*_ADDS, *_KEEPS)):
            return 1.0
        if not name.startswith(_PRODUCTS):
            return None
        number = getattr(node, "_saved_other", None)
        if sum(other is not None for other, _ in node.next_functions) != 1:
            return None
        if not isinstance(number, torch.Tensor) or number.dim() or not number.is_cpu:  # which would be waited for
            return None
        factor = float(number)
        if name.startswith("DivBackward"):
            return factor
        made_of_tensors = number.is_floating_point() and number.dtype == node._input_metadata[0].dtype
        if not factor or factor == self._ranks or made_of_tensors:
            return None  # a number of Python's is float64, and widens nothing
        return 1 / factor if self._is_multiple(1 / factor) else 1.0

    def _is_multiple(self, count: float) -> bool:
        times = count / self._samples
        return times >= 0.999 and abs(times - round(times)) < 1e-4 * times

    def _is_sum(self, divisor: float, sizes: tuple[int, ...]) -> bool:
        """Whether a sum of so many, divided so, is no mean of this rank's."""
        everybodys = [self._samples * self._ranks, sizes[0] * self._ranks, prod(sizes) * self._ranks]
        here = [self._samples, sizes[0], prod(sizes)]
        return divisor == 1 or (divisor in everybodys and divisor not in here)

    def _is_of_samples(self, node: Node, sizes: tuple[int, ...]) -> bool:
        if not sizes or sizes[0] < self._samples or sizes[0] % self._samples:
            return False
        if any(map(is_output, _behind(node))):
            return True
        return self._gives_number and sum(not other.next_functions for other in _behind(node)) > 1

    def _has_mean_below(self, node: Node, operands: int = 1) -> bool:
        """Whether so many of the numbers that ``node`` takes are made of means over samples."""
        taken = [other for other, _ in node.next_functions if other is not None]
        return len(taken) >= operands and sum(map(self._is_made_of_means, taken)) >= operands

    def _is_made_of_means(self, node: Node) -> bool:
        seen: set[Node] = set()
        waiting = [node]
        while waiting and len(seen) < _MOST:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            name = node.name()
            try:
                sizes = _averaged(node, name)
            except (NotKeptError, AttributeError, RuntimeError):
                continue
            if sizes is not None:
                if self._is_of_samples(node, sizes):
                    return True
            elif name.startswith((*_ADDS, *_KEEPS, *_BENDS, *_PRODUCTS)):
                waiting += [other for other, _ in node.next_functions if other is not None]
        return False


def _behind(node: Node) -> Iterator[Node]:
    """What ``node`` was computed from, each once, and not without end."""
    seen, waiting = {node}, [node]
    while waiting and len(seen) < _MOST:
        for other, _ in waiting.pop().next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
                yield other


def _summed(node: Node, name: str) -> tuple[int, ...] | None:
    """Sizes of what ``node`` added up to one number; None if that is not what it did."""
    return _reduced(node, name, "SumBackward", 2)


def _averaged(node: Node, name: str) -> tuple[int, ...] | None:
    return _reduced(node, name, "MeanBackward", 1)


def _reduced(node: Node, name: str, begins: str, reduction: int) -> tuple[int, ...] | None:
    if name.startswith(begins):
        output = node._input_metadata[0].shape
        sizes = tuple(int(size) for size in node._saved_self_sym_sizes)  # type: ignore[attr-defined]
        return sizes if prod(output) == 1 and sizes else None
    if getattr(node, "_saved_reduction", None) == reduction:
        return tuple(node._saved_self.shape)  # type: ignore[attr-defined]
    return None
