"""What a terminal shows where rich is installed: a bar while files are read, and findings as a table of its width.

Without rich, and where output goes to a file or another program, there are lines: the same words, and no less of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rewriter.discover import Tell
from rewriter.progress import EVERY, Log, Progress
from rewriter.report import Line

_BESIDE = 50  # columns for a rule and for words, beside the longest place
_ROWS = 500  # of a table at a time: rich looks at all before it writes the first
_STYLES = {"error:": "bold red", "left: ": "yellow", "needs --unsafe: ": "magenta", "": "cyan"}


@contextmanager
def progress(stream: TextIO, quiet: bool = False, color: bool = True) -> Iterator[Tell]:
    """Inside the ``with``, what is told is shown on a terminal, and gone when it is done; elsewhere, unless ``quiet``,
    a line now and then.
    """
    if not stream.isatty() and not quiet:
        yield Log(stream)
        return
    console = _console(stream, color)
    if console is None:
        with Progress(stream) as told:
            yield told
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    # Without a thread that draws, since large projects are converted by forks of this process.
    with rich.Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        shown, phase, last = bar.add_task("looking for files", total=None), "looking for files", 0.0
        bar.refresh()

        def tell(what: str, done: int, total: int) -> None:
            nonlocal phase, last
            now = time.monotonic()
            if what != phase:
                phase = what
                bar.reset(shown, description=what, total=total or None)
            elif now - last < EVERY and done != total:
                return
            last = now
            bar.update(shown, completed=done, total=total or None)
            bar.refresh()

        yield tell


def show(lines: Iterable[Line], stream: TextIO, color: bool) -> None:
    """Findings: a table on a terminal, elsewhere a line each that other programs understand."""
    every, console = list(lines), _console(stream, color)
    widest = max((len(line.place) for line in every), default=0)
    if console is None or console.width < widest + _BESIDE:  # a place that is broken in two is none
        for line in every:
            print(line, file=stream)
        return
    from rich.table import Table
    from rich.text import Text

    for start in range(0, len(every), _ROWS):
        table = Table.grid("", "", "", padding=(0, 2, 0, 0))
        table.columns[0].no_wrap = table.columns[1].no_wrap = True
        table.columns[2].overflow = "fold"  # a word that is too long loses no part
        for line in every[start : start + _ROWS]:
            style = _STYLES.get(line.code) or _STYLES[line.mark]
            table.add_row(Text(line.place), Text(line.code, style), Text.assemble((line.mark, style), line.message))
        console.print(table)


def _console(stream: TextIO, color: bool) -> Any:
    """Rich's, for a terminal that can do what it needs; else None."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream, no_color=not color, highlight=False)
    return console if console.is_interactive else None
