"""What is shown to the user: diffs and lists of findings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rewriter.types import Finding, Refusal, Result

_TRAINS = re.compile(rb"\.backward\(")


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


def listing(results: Sequence[Result], quiet: bool = False, verbose: bool = False) -> Iterator[str]:
    """What was found, what needs the user's hand first, then a summary, then whether the project can be launched.

    Files that train and stay as they are come first of all. One line stands for all findings of a rule in a file that
    say the same; with ``verbose`` every finding has its own.
    """
    understood = [] if quiet else [result for result in results if not result.error]
    for result in () if quiet else results:
        reason = left_training(result)
        if reason:
            yield f"{result.path}: error: trains, and was left as it is: {reason}"
    kinds: tuple[tuple[str, Callable[[Result], Sequence[Finding]]], ...] = (
        ("left: ", lambda result: result.reported),
        ("needs --unsafe: ", lambda result: result.hidden),
        ("", lambda result: result.applied),
    )
    for mark, found in kinds:
        for result in understood:
            yield from (f"{result.path}:{line}" for line in _lines_of(found(result), mark, verbose))
    yield summary(results)
    yield launch(results)


def _lines_of(found: Sequence[Finding], mark: str, verbose: bool) -> Iterator[str]:
    groups: dict[tuple[str, str, int], list[Finding]] = {}
    for number, finding in enumerate(sorted(found, key=lambda finding: (finding.line, finding.code))):
        said = finding.message if mark else ""  # what is done needs no more than its rule
        groups.setdefault((finding.code, said, number if verbose else 0), []).append(finding)
    for (code, _, _), (first, *others) in groups.items():
        more = f" (and {len(others)} more)" if others else ""
        yield f"{first.line}: {code} {mark}{first.message}{more}"


def left_training(result: Result) -> str:
    """Why a file that trains stays as it is; empty if it does not train, or is converted."""
    engine = next((f for f in result.reported if f.code == "BMT090" and _is_script(f)), None)
    if engine is not None and not result.changed:
        return f"{engine.message} (line {engine.line})"
    if result.changed or not _TRAINS.search(result.before) or b"bmtrain" in result.before:
        return ""
    if result.error:
        return result.error.removeprefix(f"{result.path}: ")
    refused = [finding for finding in result.reported if isinstance(finding, Refusal)]
    if refused:
        return f"{refused[0].message} (line {refused[0].line})"
    return "no optimizer was found that it steps" if re.search(rb"\.step\(", result.before) else ""


def _is_script(finding: Finding) -> bool:
    """Whether a file is refused for the engine that trains in it, and not for the script that it is part of."""
    return isinstance(finding, Refusal) and not finding.spared and not finding.message.startswith("part of ")


def launch(results: Sequence[Result]) -> str:
    """Whether the project is ready to launch, with the command, or why it is not."""
    failed = next((result for result in results if result.error), None)
    if failed is not None:
        return f"not ready to launch: {failed.error}"
    left = next((result for result in results if left_training(result)), None)
    if left is not None:
        return f"not ready to launch: {left.path} trains, and was left as it is: {left_training(left)}"
    started = [result.path for result in results if b"init_distributed(" in result.after]
    trained = [result.path for result in results if _TRAINS.search(result.after) and b"bmtrain" in result.after]
    if not started:
        if trained:
            return f"not ready to launch: nothing here starts the training in {trained[0]}: call bmt.init_distributed()"
        return "nothing to launch: no script here trains"
    script = next((path for path in started if path in trained), started[0])
    return f"ready to launch: torchrun --nproc_per_node=N {script}"


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
