"""What a run's events say, loss by loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rewriter.verify.script.runs import Run


@dataclass(frozen=True)
class Loss:
    """A loss that ``backward`` was called on, and what led to it."""

    value: float
    at: str
    rows: tuple[str, ...]
    """Digests of the samples that the loop got before it; else of what the model got."""
    loose: tuple[str, ...]
    given: tuple[str, ...]
    """Digests of all that the model got, or of the samples if a loader gave them."""
    loaded: bool
    """Whether a loader gave them."""
    drew: str
    """Where random numbers were drawn since: ``in the model``, ``between batch and model``, or nowhere."""
    batch_norm: bool
    low: bool
    """Whether it was computed in low precision."""
    initial: tuple[Any, ...]
    """Digests of the weights before the first of all."""


def losses_of(run: Run, rank: int = 0) -> list[Loss]:
    """In order."""
    found: list[Loss] = []
    batch: dict[str, Any] | None = None
    inputs: list[dict[str, Any]] = []
    for event in run.events[rank]:
        if event["kind"] == "batch" and event["trains"]:
            batch, inputs = event, []
        elif event["kind"] == "input":
            inputs.append(event)
        elif event["kind"] == "loss":
            found.append(_loss(event, batch, inputs))
            batch, inputs = None, []
    return found


def _loss(event: dict[str, Any], batch: dict[str, Any] | None, inputs: list[dict[str, Any]]) -> Loss:
    loaded = batch is not None and bool(batch["rows"])
    source = batch if batch is not None and loaded else next((e for e in inputs if e["rows"]), None)
    drew = ""
    if inputs and inputs[0]["generators"] != event["generators"]:
        drew = "in the model"
    elif batch is not None and batch["generators"] != (inputs[0] if inputs else event)["generators"]:
        drew = "between batch and model"
    return Loss(
        event["value"], event["at"], tuple(source["rows"]) if source else (),
        tuple(source.get("loose", ())) if source else (),
        tuple(source["rows"]) if source and loaded else tuple(row for e in inputs for row in e["rows"]), loaded, drew,
        event.get("batch_norm", False), event.get("low", False), tuple(map(tuple, event.get("initial", ()))),
    )  # fmt: skip


def merged(run: Run) -> list[Loss]:
    """The job's: means over the ranks, with the samples of all."""
    ranks = [losses_of(run, rank) for rank in range(run.ranks)]
    return [
        replace(
            losses[0], value=mean(list(losses)), rows=_joined(loss.rows for loss in losses),
            loose=_joined(loss.loose for loss in losses), given=_joined(loss.given for loss in losses),
        )
        for losses in zip(*ranks, strict=False)
    ]  # fmt: skip


def _joined(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(entry for part in parts for entry in part)


def mean(losses: list[Loss]) -> float:
    """Of all ranks, as gradients are."""
    return sum(loss.value for loss in losses) / len(losses)


def mean_by_samples(losses: list[Loss]) -> float:
    """Of all ranks, each weighed by its samples."""
    count = sum(len(loss.rows) for loss in losses)
    return sum(loss.value * len(loss.rows) for loss in losses) / count if count else mean(losses)


def apart(ours: float, theirs: float, least: float = 0.0) -> float:
    """The relative difference; not a number is infinitely far from a number."""
    if ours == theirs or (ours != ours and theirs != theirs):
        return 0.0
    distance = abs(ours - theirs) / max(abs(ours), least, 1e-12)
    return distance if distance == distance else float("inf")


def position(run: Run, event: dict[str, Any], rank: int = 0) -> int:
    """The number of losses before an event."""
    count = 0
    for other in run.events[rank]:
        if other is event:
            break
        count += other["kind"] == "loss"
    return count
