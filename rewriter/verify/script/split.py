"""Whether a loss looks across the items of a batch: the loss of a batch against those of its halves, on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rewriter.verify.script.runs import Run
from rewriter.verify.script.story import Loss, apart, losses_of

RunPart = Callable[[str], Run]


@dataclass(frozen=True)
class Split:
    """What came out."""

    skipped: str = ""
    """Why nothing was shown."""
    at: str = ""
    whole: float = 0.0
    halves: tuple[float, ...] = ()
    kind: str = ""
    """``across`` if the loss looks across items, ``counts`` if it is a mean over something else than samples, ``sum``
    if it is a sum over them; nothing if the loss of the whole is the mean of its halves'."""


def split_test(whole: Run, run_part: RunPart, tolerance: float) -> Split:
    """Compare the first loss of ``whole`` with those of the halves of its first batch."""
    losses = losses_of(whole)
    if not losses:
        return Split("no loss was seen")
    first = losses[0]
    if why := _unfit(first):
        return Split(why)
    parts = [_first(run_part(part)) for part in ("first", "second")]
    one, two = parts
    if one is None or two is None:
        return Split("half of the first batch cannot be run alone", first.at)
    if len(one.rows) + len(two.rows) != len(first.rows) or not one.rows or not two.rows:
        return Split("the first batch could not be cut into halves", first.at)
    if one.initial != first.initial or two.initial != first.initial:
        return Split("the first weights are not the same in every run", first.at)
    count = len(first.rows)
    joined = (one.value * len(one.rows) + two.value * len(two.rows)) / count
    tolerance = max(tolerance, 1e-2) if first.low else tolerance
    halves = (one.value, two.value)
    if apart(first.value, joined, max(map(abs, halves))) <= tolerance:
        return Split(at=first.at, whole=first.value, halves=halves)
    again = _first(run_part("whole"))
    if again is None or apart(first.value, again.value) > tolerance:
        return Split("the first loss is another one when the script is run again", first.at)
    if apart(first.value, one.value + two.value) <= tolerance:
        return Split(at=first.at, whole=first.value, halves=halves, kind="sum")
    # A mean over anything is the same for a batch that is there twice; what compares items sees twice as many.
    doubled = _first(run_part("doubled"))
    same = doubled is not None and apart(first.value, doubled.value) <= tolerance
    counts = same and min(halves) <= first.value <= max(halves)
    return Split(at=first.at, whole=first.value, halves=halves, kind="counts" if counts else "across")


def _unfit(first: Loss) -> str:
    if first.drew:
        return f"random numbers are drawn {first.drew}"
    if first.batch_norm:
        return "the model normalises over the batch"
    if len(first.rows) < 2:
        return "the first batch has no two samples that are known"
    return ""


def _first(run: Run) -> Loss | None:
    losses = losses_of(run)
    return losses[0] if losses else None
