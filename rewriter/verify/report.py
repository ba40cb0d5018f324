"""What was found, as a table and as json."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rewriter.verify.compare import Distance
from rewriter.verify.findings import TITLES, Report, Row


def table(report: Report) -> Iterator[str]:
    """Lines for a terminal, without the verdict."""
    cells = rows(report)
    widths = [max(len(row[column]) for row in cells) for column in range(6)]
    for row in cells:
        padded = zip(row, widths, strict=False)  # the verdict needs no padding
        left = [f"{cell:{'<' if column in (1, 2) else '>'}{width}}" for column, (cell, width) in enumerate(padded)]
        yield "  ".join([*left, row[6]]).rstrip()
    yield from explanations(report)


def rows(report: Report) -> list[tuple[str, ...]]:
    """The cells of the table, its head first."""
    return [("ranks", "when", "what", "compared", "ulp", "relative", ""), *map(_cells, report.rows)]


def _cells(row: Row) -> tuple[str, ...]:
    found = row.comparison
    numbers = (str(found.compared), _ulp(found.ulp), f"{found.relative:.1e}")
    if row.error or row.skipped:
        numbers = ("", "", "")
    return (str(row.ranks), TITLES.get(row.phase, row.phase), row.what, *numbers, row.verdict)


def explanations(report: Report) -> Iterator[str]:
    """Lines below the table: what was skipped, failed or differs."""
    for row in report.rows:
        where = f"{row.ranks} rank{'s' if row.ranks > 1 else ''}, {TITLES.get(row.phase, row.phase)}"
        if row.skipped:
            yield f"skipped: {where}: {row.skipped}"
        if row.error:
            yield f"error: {where}: {row.error}"
        worst = row.comparison.worst()
        if worst is not None:
            more = len(row.comparison.different) - 1
            yield f"differs: {where}, {row.what}: {worst.path}: {words(worst)}" + (f", and {more} more" if more else "")
        if (row.ranks, row.phase) in report.first and row.what == "outputs":
            name, distance = report.first[row.ranks, row.phase]
            yield f"  first module that differs: {name}: {words(distance)}"
    for what in report.empty:
        yield f"nothing was compared: {what}"
    if report.kept is not None:
        yield f"both tensors of each difference: {report.kept}"


def verdict(report: Report) -> str:
    """What comes last."""
    return "the converted model is the same model" if report.held else "NOT shown to be the same model"


def words(distance: Distance) -> str:
    """How two leaves differ."""
    return distance.why or f"{_ulp(distance.ulp)} ulp, {distance.relative:.1e} relative"


def as_json(report: Report) -> dict[str, Any]:
    """For programs."""
    return {
        "held": report.held,
        "nothing_compared": report.empty,
        "files": list(report.files),
        "rows": [
            {
                "ranks": row.ranks, "phase": row.phase, "what": row.what, "verdict": row.verdict,
                "compared": row.comparison.compared, "ulp": _number(row.comparison.ulp),
                "relative": _number(row.comparison.relative), "error": row.error, "detail": row.detail,
                "skipped": row.skipped,
                "different": [
                    {"path": d.path, "ulp": _number(d.ulp), "relative": _number(d.relative), "why": d.why}
                    for d in row.comparison.different[:20]
                ],
            }
            for row in report.rows
        ],
        "first_modules": [
            {"ranks": ranks, "phase": phase, "module": name, "how": words(distance)}
            for (ranks, phase), (name, distance) in report.first.items()
        ],
        "kept": None if report.kept is None else str(report.kept),
    }  # fmt: skip


def _ulp(value: float) -> str:
    return f"{value:.0f}" if value < 1e6 else f"{value:.0e}"


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
