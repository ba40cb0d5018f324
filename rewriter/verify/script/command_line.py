"""What ``bmt-convert --prove`` runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from rewriter.types import InputError, Refusal, Result, Tried
from rewriter.verify.script.prove import Settings, prove
from rewriter.verify.script.report import as_json, as_markdown, text, verdict
from rewriter.verify.script.runs import Command


def settings(
    original: Path, converted: Path, commands: Sequence[str], ranks: str, steps: int | None, timeout: float,
    still: bool, refused: str,
) -> Settings:  # fmt: skip
    """Checked.

    Raises:
        InputError: a command or the ranks cannot be tried.
    """
    lines = tuple(_words(original, command) for command in commands)
    numbers = [number.strip() for number in ranks.split(",")]
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise InputError(f"--ranks: {ranks!r} is not a list of numbers above 0")
    if steps is not None and steps < 1:
        raise InputError(f"--steps: {steps} is not a number above 0")
    made = Command(lines, steps, timeout, still)
    return Settings(original, converted, made, tuple(dict.fromkeys(map(int, numbers))), refused=refused)


def _words(original: Path, command: str) -> tuple[str, ...]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--prove: {command!r}: {error}") from None
    if words and Path(words[0]).name in ("python", "python3"):
        words = words[1:]
    if not words or (words[0] == "-m" and len(words) == 1):
        raise InputError("--prove: give the script and its arguments, such as 'train.py --config small.yaml'")
    if words[0] != "-m" and not (original / words[0]).is_file():
        raise InputError(f"--prove: {words[0]}: no such script in the project; give its path within it")
    return tuple(words)


def refusal(results: Sequence[Result]) -> str:
    """Why the converted project is no job of several ranks; nothing if it is one."""
    if any(result.changed and b"init_distributed" in result.after for result in results):
        return ""
    reasons = [
        f"{result.path.name}:{found.line}: {found.code} {found.message}"
        for result in results
        for found in result.reported
        if isinstance(found, Refusal)
    ]
    errors = [result.error for result in results if result.error]
    told = "; ".join((errors + reasons)[:3]) or "no training that is known was found"
    return f"the conversion makes no job of several ranks of it: {told}"


def run(made: Settings, report: Path | None) -> Tried:
    """Prove, print, write the report; the verdict is not printed yet."""
    found = prove(made)
    lines = tuple(text(found))
    print("\n".join(lines))
    if report is not None:
        report.write_text(json.dumps(as_json(found), indent=1) if report.suffix == ".json" else as_markdown(found))
    return Tried("--prove", found.held, verdict(found), notes=lines)
