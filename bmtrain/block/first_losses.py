"""Whether the first losses are means over different counts on different ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch.utils._pytree import tree_leaves

from ..alike import from_all
from ..autograd import Node
from ..context import Context
from ..users_code import users_line
from .backward import Backward
from .frame import NotKeptError

_STEPS = 3
"""How many optimizer steps are looked at."""

_MOST = 16
"""A loss that divides more often than this is put together from samples, each with a count of its own."""

_DIFFERING = 2
"""As is one of which more counts than this differ between ranks, if it divides as often as there are samples, and it
divides by these as well or is the sum of theirs."""


_FACTS = 3
"""What ranks tell beside the counts: how many these are, how many samples, and whether the loss is a sum of theirs."""


class FirstLosses:
    """What the last loss was divided by on this rank, compared at the first optimizer steps.

    The mean over ranks of gradients is the whole batch's only if every rank divides by the same.  Looked at is what
    autograd keeps of the loss, from its end to where it stops being one number: quotients, means, and losses of torch
    that average.
    """

    def __init__(self, ctx: Context, backward: Backward) -> None:
        self._ctx, self._backward = ctx, backward
        self._counts: list[torch.Tensor] = []
        self._steps, self._place, self._samples = 0, "", 0
        self._is_sum = False
        self.wanted = ctx.topology.data_size > 1

    def note(self, inputs: object) -> None:
        """An outermost forward is about to train on ``inputs``, of which the first tensor tells how many samples."""
        first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)), None)
        self._samples = len(first) if first is not None and first.dim() else 0

    def look(self, loss: torch.Tensor) -> None:
        """Gradients of ``loss`` are to be computed.  Nothing is recomputed, gathered, or waited for."""
        if not self.wanted or not self._is_one(loss.shape) or loss.grad_fn is None:
            return
        self._backward.peeks = True
        try:
            counts = [_kept(count) for count in self._counts_of(loss.grad_fn)]
            is_sum = _factor(loss.grad_fn) == self._ctx.topology.data_size
        finally:
            self._backward.peeks = False
        if counts:
            self._counts, self._place, self._is_sum = counts, users_line(), is_sum

    def _is_one(self, shape: Sequence[int]) -> bool:
        """Whether that is the shape of one number, and not of one of each sample."""
        return not shape or (self._samples > 1 and prod(shape) == 1)

    def _counts_of(self, last: Node) -> Iterator[torch.Tensor | float]:
        seen, waiting = {last}, [last]
        while waiting:
            node = waiting.pop()
            if not all(self._is_one(output.shape) for output in getattr(node, "_input_metadata", ())):
                continue  # more than one number: of a quotient of these each has a count of its own
            count = _count(node)
            if count is not None:
                yield count
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)

    def optimizer_stepped(self) -> None:
        """Warn if the ranks have divided by different numbers.  Collective a few times."""
        if not self.wanted:
            return
        self._steps += 1
        self.wanted = self._steps < _STEPS
        here = torch.zeros(_FACTS + _MOST, dtype=torch.float64, device="cpu")
        here[0], here[1], here[2] = len(self._counts), self._samples, self._is_sum
        for i, count in enumerate(self._counts[:_MOST], _FACTS):
            here[i] = count
        self._counts = []
        rows = from_all(self._ctx, here)
        found = _difference(rows.tolist())
        if found is None:
            return
        self.wanted = False
        if self._ctx.rank == 0:
            first, other, there = found
            warnings.warn(
                f"The loss is a mean over different counts ({self._place}): it was divided by {first:.6g} "
                f"on rank 0, and by {there:.6g} on rank {other}. The mean over ranks of such a loss is "
                "not the whole batch's. Average over what all ranks count: bmt.loss.mean_over_ranks(F.cross_entropy)("
                "logits, targets), or of the single losses bmt.mean(losses, mask).",
                stacklevel=2,
            )


def _difference(rows: list[list[float]]) -> tuple[float, int, float] | None:
    """What rank 0 has divided by, and another rank by something else; None if it is the same, or not known."""
    counted = [row[_FACTS : _FACTS + int(row[0])] for row in rows]
    here = counted[0]
    if any(row[0] > _MOST for row in rows):
        return None
    for rank, there in enumerate(counted):
        if len(here) == len(there):
            pairs = [(a, b) for a, b in zip(here, there, strict=True) if not _is_close(a, b)]
        else:  # as boxes are that match nothing: each has to have counts that the other has not
            pairs = list(zip(_others(here, there), _others(there, here), strict=False))
        if pairs and not ((len(pairs) > _DIFFERING or len(here) != len(there)) and _are_of_samples(rows)):
            return pairs[0][0], rank, pairs[0][1]
    return None


def _are_of_samples(rows: list[list[float]]) -> bool:
    """Whether losses may be the means of those of single samples, or their sums times the number of ranks."""
    return all(
        divisions >= samples and (is_sum or samples in counts[: int(divisions)])
        for divisions, samples, is_sum, *counts in rows
    )


def _others(counts: list[float], known: list[float]) -> list[float]:
    return [count for count in counts if not any(_is_close(count, other) for other in known)]


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))


def _kept(count: torch.Tensor | float) -> torch.Tensor:
    """A copy, which later code does not write to."""
    return count.detach().clone() if isinstance(count, torch.Tensor) else torch.tensor(float(count), device="cpu")


def _count(node: Node) -> torch.Tensor | float | None:
    """What ``node``, whose forward gave one number, has divided by; None if by nothing."""
    try:
        name = node.name()
        if name.startswith("DivBackward"):
            return getattr(node, "_saved_other", None)
        if name.startswith("MeanBackward"):
            return float(getattr(node, "_saved_self_sym_numel", 0)) or None
        if getattr(node, "_saved_reduction", None) == 1:  # "mean"
            count = getattr(node, "_saved_total_weight", None)
            return count if count is not None else float(node._saved_self.numel())  # type: ignore[attr-defined]
    except (NotKeptError, AttributeError, RuntimeError):  # to be recomputed; another torch; a backward has freed it
        pass
    return None


def _factor(node: Node) -> float | None:
    """The number that ``node`` has multiplied by; None if by none."""
    try:
        factor = getattr(node, "_saved_other", None) if node.name().startswith("MulBackward") else None
    except (NotKeptError, RuntimeError):
        return None
    return float(factor) if isinstance(factor, torch.Tensor) and not factor.dim() else None
