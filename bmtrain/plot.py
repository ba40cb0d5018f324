"""``python -m bmtrain plot run.jsonl``: what ``bmt.Meter`` and BMTRAIN_METER write, as rows or as a picture."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import ConfigurationError
from .log import interruptible
from .written import replacing

_BARS = "▁▂▃▄▅▆▇█"
Points = list[tuple[float, float]]


def parser(**options: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        description="Draw what bmt.Meter wrote: on the terminal, or with --out as a picture.",
        **{"prog": "bmt plot", **options},
    )
    made.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="RUN.jsonl",
        help="files of BMTRAIN_METER=... or bmt.Meter(model, path=...)",
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="a picture: .png, .svg or .pdf; needs matplotlib")
    made.add_argument("--only", action="append", default=[], metavar="NAME", help="this value alone; may be repeated")
    return made


@interruptible("bmt plot")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command.  0: drawn; 2: it could not be."""
    given = parser().parse_args(arguments)
    try:
        runs: dict[str, dict[str, Points]] = {}
        for path in given.files:
            found = read(path)
            runs |= {f"{path}, run {n}" if len(found) > 1 else str(path): run for n, run in enumerate(found, 1)}
        names = list(dict.fromkeys(name for values in runs.values() for name in values))
        unknown = [name for name in given.only if name not in names]
        if unknown:
            raise ConfigurationError(f"--only {unknown[0]}: no such value; there are {', '.join(names)}.")
        names = given.only or names
        if given.out is None:
            for line in _rows(runs, names):
                print(line)
        else:
            _draw(runs, names, given.out)
            print(f"{given.out}: {', '.join(names)}")
    except (ConfigurationError, OSError) as error:
        print(f"bmt plot: {error}", file=sys.stderr)
        return 2
    return 0


def read(path: Path) -> list[dict[str, Points]]:
    """By value, (step, number) of every line that has both; of each run in the file, in their order.

    A step that is not larger than the one before begins another run: jobs append.  A last line that was cut off, as by
    a job that ended in the middle of it, is left out.

    Raises ConfigurationError where other lines are no JSON objects with a step, or there are none.
    """
    runs: list[dict[str, Points]] = []
    last = math.inf
    lines = [line for line in path.read_text(errors="replace").split("\n") if line.strip()]
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            step = entry["step"]
            if isinstance(step, bool) or not isinstance(step, int | float):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            if number == len(lines) - 1 and runs:
                break
            raise ConfigurationError(
                f"{path}: line {number + 1} is not what bmt.Meter writes, a JSON object with a step."
            ) from None
        if step <= last:
            runs.append({})
        last = step
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                runs[-1].setdefault(name, []).append((step, value))
    runs = [run for run in runs if run]
    if not runs:
        raise ConfigurationError(f"{path}: nothing is written there yet.")
    return runs


def _rows(runs: dict[str, dict[str, Points]], names: Sequence[str]) -> list[str]:
    """One row a value and file: bars, then the first, the last, the least and the most."""
    titles = {(run, name): name if len(runs) == 1 else f"{name}, {run}" for name in names for run in runs}
    left = max(map(len, titles.values()))
    width = max(shutil.get_terminal_size().columns - left - 48, 10)
    lines = []
    for (run, name), title in titles.items():
        numbers = [value for _, value in runs[run].get(name, []) if math.isfinite(value)]
        if not numbers:
            lines.append(f"{title:{left}}  no finite numbers")
            continue
        low, high = min(numbers), max(numbers)
        fitted = _fitted(numbers, width)
        bars = "".join(_BARS[_height(value, min(fitted), max(fitted))] for value in fitted)
        lines.append(f"{title:{left}}  {bars:{width}}  {numbers[0]:.4g} to {numbers[-1]:.4g} ({low:.4g} - {high:.4g})")
    return lines


def _height(value: float, low: float, high: float) -> int:
    return round((value - low) / (high - low) * (len(_BARS) - 1)) if high > low else 0


def _fitted(numbers: Sequence[float], width: int) -> list[float]:
    """At most ``width`` means of neighbours."""
    count = min(width, len(numbers))
    cuts = [round(i * len(numbers) / count) for i in range(count + 1)]
    return [sum(numbers[a:b]) / (b - a) for a, b in pairwise(cuts)]


def _draw(runs: dict[str, dict[str, Points]], names: Sequence[str], out: Path) -> None:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigurationError(f"{out}: a picture ends in .png, .svg or .pdf.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "A picture needs matplotlib: pip install matplotlib. Without --out it is drawn on the terminal."
        ) from None
    figure = Figure(figsize=(8, 2.2 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, place + 1)
        for run, values in runs.items():
            points = values.get(name, [])
            axes.plot([step for step, _ in points], [value for _, value in points], label=run)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if place == 0 and len(runs) > 1:
            axes.legend()
    axes.set_xlabel("step")
    with replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:])
