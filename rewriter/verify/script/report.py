"""What a proof found, as text and as json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rewriter.verify.script.compare import Finding, Outcome
from rewriter.verify.script.prove import Report

MORE = 12
"""Findings that are listed for one number of ranks."""


def text(report: Report) -> Iterator[str]:
    """Lines for a terminal, without the verdict."""
    for finding in report.trouble:
        yield words(finding)
    for outcome in report.outcomes:
        yield f"{_ranks(outcome.ranks)}: {_compared(outcome)}"
        listed = sorted(outcome.findings, key=lambda finding: finding.moment)
        for number, finding in enumerate(listed[:MORE]):
            yield f"  {'also' if number else 'first difference'}: {words(finding)}"
        if len(listed) > MORE:
            yield f"  and {len(listed) - MORE} more"
    split = report.split
    if report.outcomes:
        if split.skipped:
            yield f"halves of a batch: not compared, {split.skipped}"
        elif not split.kind:
            yield "halves of a batch: the loss of the first batch is the mean of its halves' losses"


def verdict(report: Report) -> str:
    """The last line."""
    if report.held:
        return f"the converted script does what the original does on {_listed(report)}"
    good = [outcome for outcome in report.outcomes if not outcome.findings]
    held = f"; it held on {' and '.join(_ranks(outcome.ranks) for outcome in good)}" if good else ""
    return f"NOT shown to do what the original does{held}"


def _listed(report: Report) -> str:
    return " and ".join(_ranks(outcome.ranks) for outcome in report.outcomes)


def _ranks(number: int) -> str:
    return f"{number} rank" + "s" * (number != 1)


def words(finding: Finding) -> str:
    """``train.py:12: class: what``."""
    where = f"{finding.at}: " if finding.at else ""
    return f"{where}{finding.kind}: {finding.message}"


def _compared(outcome: Outcome) -> str:
    parts = [
        f"{outcome.losses} losses ({outcome.loss_difference:.0e})",
        f"{outcome.gradients} norms of gradients ({outcome.gradient_difference:.0e})",
        f"{outcome.weights} weights after {outcome.steps} steps ({outcome.weight_difference:.0e})",
        f"{outcome.samples} samples in {outcome.batches} batches",
        f"{outcome.lines} printed lines",
        f"{outcome.files} files with {outcome.tensors} tensors ({outcome.file_difference:.0e})",
    ]
    first = "" if outcome.first_step is None else f"; first step after {outcome.first_step:.1f} s"
    return "compared " + ", ".join(parts) + first


def as_json(report: Report) -> dict[str, Any]:
    """For programs."""
    return {
        "held": report.held,
        "trouble": [asdict(finding) for finding in report.trouble],
        "split": asdict(report.split),
        "runs": [asdict(outcome) for outcome in report.outcomes],
    }


def as_markdown(report: Report) -> str:
    """For people."""
    return "\n".join(["# Proof", "", "```", *text(report), verdict(report), "```", ""])
