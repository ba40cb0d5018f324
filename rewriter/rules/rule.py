"""What a rule is. Rules know the facts and the changes, and not each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.types import Finding


@dataclass(frozen=True, slots=True)
class Example:
    """A whole file before and after a rule; ``after`` empty means that the rule leaves it alone."""

    before: str
    after: str = ""
    unsafe: bool = False
    tensor_parallel: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One rewrite: its code, a one-line title, where it looks, and examples that tests execute."""

    code: str
    title: str
    explanation: str
    find: Callable[[File, Facts], Iterable[Finding]]
    examples: tuple[Example, ...] = ()
