"""Whether the first losses are means over samples, and over as many on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from types import FrameType

import torch
from torch.autograd.graph import GradientEdge

from ...alike import from_all
from ...autograd import Node, mark_output
from ...context import Context
from ...log import warn
from ...users_code import users_line
from ..backward import Backward
from ..frame import NotKeptError
from ..summary import first_tensor
from .across_samples import AcrossSamples
from .batches import batch_digest
from .no_mean import NoMean
from .steps import FirstSteps

_STEPS = 3
"""How many optimizer steps of a model are looked at."""

_MOST = 16
"""A loss that divides more often than this is put together from samples, each with a count of its own."""

_LOOKS = 8
"""So many losses of a model are followed through their whole graphs: some microseconds of the host for each node."""

_FEW = 2
"""A sum of no more numbers than this is not taken for one of samples: so few terms may be anything."""

_JOINS = ("StackBackward", "CatBackward")
_ADDS = ("AddBackward", "SubBackward")
_KEEPS = (
    "SumBackward", "MeanBackward", "MulBackward", "DivBackward", "NegBackward", "ToCopyBackward", "ViewBackward",
    "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward",
)  # fmt: skip
"""Nodes of autograd by what they do with numbers, as their names begin."""


class FirstLosses:
    """What the last loss was divided by on this rank, compared at the first optimizer steps.

    The mean over ranks of gradients is the whole batch's only if every rank divides by the same.  Looked at is what
    autograd keeps of the loss, from its end to where it stops being one number: quotients, means, and losses of torch
    that average.
    """

    def __init__(self, ctx: Context, backward: Backward, first_steps: FirstSteps) -> None:
        self._ctx, self._backward, self._first_steps = ctx, backward, first_steps
        self._counts: list[torch.Tensor] = []
        self._place, self._samples = "", 0
        self._gives_number = False  # whether a model has returned one in this step
        self._no_mean: tuple[str, str] | None = None
        self._beside: tuple[str, str, torch.Tensor] | None = None  # function, place, and what tells rows from others
        self._across: tuple[str, str, str] | None = None  # what the loss does, by which function, and where
        self._batch: torch.Tensor | None = None  # digest of what the last forward got
        self._said: set[str] = set()  # where counts differ, which other models may come to with other numbers
        self.renew()
        self._is_noted = False  # whether the loss whose backward comes next was looked at
        self._is_batch_first = self._is_single = False

    def renew(self) -> None:
        """A model begins to train."""
        self._is_over = self._said_no_mean = self._said_across = False
        self._looks_left = _LOOKS

    @property
    def wanted(self) -> bool:
        """Whether losses are looked at now."""
        return self._ctx.topology.data_size > 1 and not self._is_over and self._first_steps.age < _STEPS

    @property
    def samples(self) -> int:
        """How many rows the first tensor of the last training forward had; 0 if that is not known."""
        return self._samples

    def note(self, inputs: object) -> None:
        """An outermost forward is about to train on ``inputs``, of which the first tensor tells how many samples."""
        first = first_tensor(inputs)
        self._tell_across()  # no step came in between, which would have told whether ranks have the same
        self._batch = batch_digest(inputs) if self.wanted else None
        self._samples = len(first) if first is not None else 0
        if first is not None:  # tokens, or a sequence of vectors, may be (length, batch, ...)
            self._is_batch_first = first.dim() != 3 and not (first.dim() == 2 and not first.is_floating_point())
            self._is_single = first.dim() == 1

    def note_output(self, output: torch.Tensor) -> None:
        """A model has returned ``output``, which may be its loss."""
        if self.wanted and output.grad_fn is not None:
            mark_output(output.grad_fn)
            self._gives_number |= output.numel() == 1
            self.look(output)

    def note_roots(self, roots: Sequence[torch.Tensor | GradientEdge], frame: FrameType | None) -> None:
        """A backward that was called in ``frame`` has begun with ``roots``, and has freed what these have saved."""
        for root in roots if self.wanted and not self._is_noted else ():
            if isinstance(root, torch.Tensor) and root.grad_fn is not None and self._is_one(root.shape):
                self._look_across(root.grad_fn, users_line(frame))
        self._is_noted = False

    def _look_across(self, loss: Node, place: str) -> None:
        """Warn if ``loss`` is made of several samples together."""
        if self._said_across or not self._looks_left:
            return
        self._looks_left -= 1
        across = AcrossSamples(self._samples, self._is_batch_first, self._is_single)
        found = across.of(loss)
        if found is None:
            if across.beside and self._beside is None:
                sizes = [torch.linalg.vector_norm(r.detach(), 1, dtype=torch.float64).cpu() for _, r in across.beside]
                self._beside = across.beside[-1][0], place, torch.stack(sizes).sum()
            return
        function, compares = found
        self._say_across(
            "compares the samples of a batch" if compares else "is made of a batch's statistics", function, place
        )

    def _say_across(self, what: str, function: str, place: str) -> None:
        self._said_across = True
        self._across = what, function, place

    def _tell_across(self) -> None:
        found, self._across = self._across, None
        if found is not None and self._ctx.rank == 0:
            what, function, place = found
            warn(
                f"The loss {what} ({function}; {place}): each rank has its own samples alone for that, one in "
                f"{self._ctx.topology.data_size} of the whole batch's. Let it have those of all ranks: x = "
                "bmt.gather_batch(x), before they are put together, with which every rank computes the whole batch's "
                "loss.",
                stacklevel=3,
            )

    def note_loss(self, loss: torch.Tensor) -> None:
        """Gradients of ``loss`` are to be computed."""
        if not self.wanted or not self._is_one(loss.shape) or loss.grad_fn is None:
            return
        self.look(loss)
        self._is_noted = True
        self._backward.peeks = True
        try:
            self._look_across(loss.grad_fn, users_line())
            found = NoMean(self._samples, self._ctx.topology.data_size, self._gives_number).of(loss.grad_fn)
        finally:
            self._backward.peeks = False
        self._no_mean = (found, users_line()) if found is not None else self._no_mean

    def look(self, loss: torch.Tensor) -> None:
        """Note what ``loss`` was divided by.  Nothing is recomputed, gathered, or waited for."""
        if not self.wanted or not self._is_one(loss.shape) or loss.grad_fn is None:
            return
        self._backward.peeks = True
        try:
            counts = [_kept(count) for count in self._counts_of(loss.grad_fn)]
        finally:
            self._backward.peeks = False
        if counts:
            self._counts, self._place = counts, users_line()

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
            if self._is_of_samples(node, count):
                continue  # each has a count of its own, and they are weighed alike
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)

    def _is_of_samples(self, node: Node, count: torch.Tensor | float | None) -> bool:
        """Whether this divides by the number of samples, or multiplies by that of ranks, a sum of one loss of each."""
        here = not isinstance(count, torch.Tensor) or count.is_cpu  # a Python number; others would be waited for
        divides = here and count is not None and _is_close(float(count), self._samples)
        if not self._samples or not (divides or _factor(node) == self._ctx.topology.data_size):
            return False
        parts = _added_up(node)
        return parts > _FEW and parts % self._samples == 0

    def optimizer_stepped(self) -> None:
        """Warn if the loss is no mean, or ranks have divided by different numbers.  Collective a few times."""
        if not self.wanted:
            return
        self._gives_number = False
        here = torch.zeros(3 + _MOST, dtype=torch.float64, device="cpu")
        here[-1] = 0.0 if self._beside is None else self._beside[2]
        here[-2] = self._ctx.rank if self._batch is None else self._batch
        here[0] = len(self._counts)
        for i, count in enumerate(self._counts[:_MOST], 1):
            here[i] = count
        self._counts = []
        rows = from_all(self._ctx, here)
        if len(set(rows[:, -2].tolist())) == 1:  # all do what one rank does alone
            self._no_mean = self._across = None
        self._warn_of_no_mean()
        self._tell_across()
        beside, self._beside = self._beside, None
        sizes = rows[:, -1].tolist()
        if beside is not None and all(sizes) and not all(_is_close(size, sizes[0]) for size in sizes):
            self._say_across("compares samples with rows without a gradient, others on each rank,", *beside[:2])
            self._tell_across()
        found = _difference(rows.tolist())
        if found is None:
            return
        self._is_over = True
        if self._ctx.rank == 0 and self._place not in self._said:
            self._said.add(self._place)
            first, other, there = found
            warn(
                f"The loss is a mean over different counts ({self._place}): it was divided by {first:.6g} "
                f"on rank 0, and by {there:.6g} on rank {other}. The mean over ranks of such a loss is "
                "not the whole batch's. Average over what all ranks count: bmt.loss.mean_over_ranks(F.cross_entropy)("
                "logits, targets), or of the single losses bmt.mean(losses, mask).",
                stacklevel=2,
            )

    def _warn_of_no_mean(self) -> None:
        found, self._no_mean = self._no_mean, None
        if found is None or self._said_no_mean:
            return
        self._said_no_mean = True
        if self._ctx.rank == 0:
            what, place = found
            ranks = self._ctx.topology.data_size
            to_do = (
                f"{ranks} times smaller than the whole batch's. Multiply the loss by {ranks}, the number of ranks that "
                "share a batch, or divide the sum by the number of this rank's samples."
                if what.startswith("a sum")
                else "others than the whole batch's. Take bmt.mean(losses), a mean over all ranks' samples, in it."
            )
            warn(
                f"The loss is not a mean over this rank's samples but {what} ({place}): gradients are means over the "
                f"ranks, here {to_do}",
                stacklevel=3,
            )


def _difference(rows: list[list[float]]) -> tuple[float, int, float] | None:
    """What rank 0 has divided by, and another rank by something else; None if it is the same, or not known."""
    counted = [row[1 : 1 + int(row[0])] for row in rows]
    here = counted[0]
    if any(row[0] > _MOST for row in rows):
        return None
    for rank, there in enumerate(counted):
        if len(here) == len(there):
            pairs = [(a, b) for a, b in zip(here, there, strict=True) if not _is_close(a, b)]
        else:  # as boxes are that match nothing: each has to have counts that the other has not
            pairs = list(zip(_others(here, there), _others(there, here), strict=False))
        if pairs:
            return pairs[0][0], rank, pairs[0][1]
    return None


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


def _added_up(node: Node) -> int:
    """How many numbers ``node`` has divided, or multiplied, the sum of."""
    parts, waiting = 0, [node]
    while waiting:
        node = waiting.pop()
        name, following = node.name(), [other for other, _ in node.next_functions if other is not None]
        if name.startswith(_JOINS):
            parts += len(following)
        elif name.startswith(_ADDS) or (len(following) == 1 and name.startswith(_KEEPS)):
            waiting.extend(following)
        else:
            parts += 1
    return parts


def _factor(node: Node) -> float | None:
    """The number that ``node`` has multiplied by; None if by none."""
    try:
        factor = getattr(node, "_saved_other", None) if node.name().startswith("MulBackward") else None
    except (NotKeptError, RuntimeError):
        return None
    if not isinstance(factor, torch.Tensor) or factor.dim() or not factor.is_cpu:  # which would be waited for
        return None
    return float(factor.detach())
