"""What a comparison found: rows of a table, and whether they are a proof."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rewriter.verify.compare import Comparison, Distance

NEEDED = ("initial weights", "outputs", "gradients")
"""A run in which one of these was compared nowhere has shown nothing."""

TITLES = {
    "build": "built", "gradients": "no dropout", "steps": "after steps", "train": "training", "split": "batch split",
    "evaluate": "evaluation",
}  # fmt: skip
"""Phases in the order in which they are reported; checkpoints come last."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    ranks: int
    phase: str
    what: str
    comparison: Comparison = field(default=Comparison())
    error: str = ""
    detail: str = ""
    skipped: str = ""

    @property
    def verdict(self) -> str:
        if self.skipped:
            return "skipped"
        if self.error:
            return "error"
        if self.comparison.different:
            return "differs"
        return "equal" if self.comparison.compared else "nothing to compare"

    @property
    def held(self) -> bool:
        return self.verdict in ("equal", "skipped")


@dataclass
class Report:
    """What was found."""

    rows: list[Row] = field(default_factory=list)
    first: dict[tuple[int, str], tuple[str, Distance]] = field(default_factory=dict)
    """By ranks and phase: the first module whose output differs, and how."""
    kept: Path | None = None
    files: tuple[str, ...] = ()
    """The converted model's classes are defined in these files of CONVERTED."""

    @property
    def empty(self) -> list[str]:
        """What was compared nowhere although a proof needs it."""
        seen = {row.what for row in self.rows if row.comparison.compared}
        return [what for what in NEEDED if what not in seen]

    @property
    def held(self) -> bool:
        return not self.empty and all(row.held for row in self.rows)

    def sort(self) -> None:
        """By ranks, as they were asked for, and phases, in the order of ``TITLES``."""
        ranks = list(dict.fromkeys(row.ranks for row in self.rows))
        phases = list(TITLES)
        self.rows.sort(
            key=lambda row: (
                ranks.index(row.ranks), phases.index(row.phase) if row.phase in TITLES else len(phases),
            )
        )  # fmt: skip
