"""What is shown to the user: diffs and lists of findings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rewriter.types import Finding, Result


def diff(result: Result, color: bool = False) -> str:
    """A unified diff of one file; empty if nothing changed."""
    before = result.before.decode("utf-8", "replace").splitlines(keepends=True)
    after = result.after.decode("utf-8", "replace").splitlines(keepends=True)
    lines = difflib.unified_diff(before, after, f"a/{_name(result.path)}", f"b/{_name(result.path)}")
    return "".join(_lines(lines, color))


def _lines(lines: Iterable[str], color: bool) -> Iterator[str]:
    for line in lines:
        text = line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
        if color and line.startswith(("+", "-", "@")):
            code = {"+": 32, "-": 31, "@": 36}[line[0]]
            body = text.rstrip("\r\n")
            text = f"\033[{code}m{body}\033[0m{text[len(body) :]}"
        yield text


def _name(path: Path) -> str:
    return path.as_posix().lstrip("/")


def listing(results: Sequence[Result], quiet: bool = False) -> Iterator[str]:
    """One line per finding, then a summary."""
    for result in results:
        if not result.error and not quiet:
            for message in messages(result.applied, result.hidden, result.reported):
                yield f"{result.path}:{message}"
    yield summary(results)


def messages(applied: Iterable[Finding], hidden: Iterable[Finding], reported: Iterable[Finding]) -> Iterator[str]:
    """One line per finding of a file, in the file's order."""
    marks = [("", applied), ("needs --unsafe: ", hidden), ("left: ", reported)]
    entries = [(finding.line, finding.code, mark + finding.message) for mark, found in marks for finding in found]
    for line, code, message in sorted(entries):
        yield f"{line}: {code} {message}"


def summary(results: Sequence[Result]) -> str:
    changed = sum(result.changed for result in results)
    applied = sum(len(result.applied) for result in results)
    parts = [f"{changed} of {_count(len(results), 'file')} changed, {_count(applied, 'edit')}"]
    hidden = sum(len(result.hidden) for result in results)
    left = sum(len(result.reported) for result in results)
    failed = sum(bool(result.error) for result in results)
    if hidden:
        parts.append(f"{hidden} more with --unsafe")
    if left:
        parts.append(f"{_count(left, 'place')} left as written")
    if failed:
        parts.append(f"{_count(failed, 'file')} not understood")
    return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
