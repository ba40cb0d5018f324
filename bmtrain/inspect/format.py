"""Summaries as a table of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_COLUMNS = ("name", "shape", "max", "min", "std", "mean", "grad_std", "grad_mean")


def format_summary(summary: Sequence[dict[str, Any]]) -> str:
    """A table with a head line and one line for each entry of ``inspect_model`` or ``get_summary``."""
    lines = [list(_COLUMNS), *([_cell(entry.get(column)) for column in _COLUMNS] for entry in summary)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, tuple):
        return f"({', '.join(map(str, value))})"
    return str(value)
