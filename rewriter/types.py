"""Values shared by every layer: spans of source, edits, findings and rules. All frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewriter.analyze.facts import Facts
    from rewriter.analyze.project import File


class InputError(Exception):
    """Input that cannot be converted; the message is one line for the user."""


class ConflictError(Exception):
    """Two edits overlap without one containing the other. Always a bug in a rule."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Half-open range of byte offsets in the UTF-8 form of a file."""

    start: int
    end: int

    def contains(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end


Part = str | Span


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace ``span`` by ``parts``.

    A part is new text, or a span of the original file: it stands for that text *after* every other edit inside it,
    so nested edits compose. Of two edits with the same span the one with the smaller ``rank`` is the inner one; of two
    insertions at the same place the one with the smaller rank comes first.
    """

    span: Span
    parts: tuple[Part, ...]
    rank: int = 0


class Safety(str, Enum):
    """What may be done with a finding."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a rule has to say about one place: edits that belong together, or a remark without edits.

    ``requires`` names ``key``s of other findings without which these edits would be wrong. ``stop`` means that the file
    must not be changed at all, or, with ``spared``, that only rules with these codes may change it, and not between
    ``line`` and ``end``. ``imports`` are lines that the edits need at the top of the file.
    """

    code: str
    line: int
    message: str
    edits: tuple[Edit, ...] = ()
    safety: Safety = Safety.SAFE
    key: str = ""
    requires: tuple[str, ...] = ()
    stop: bool = False
    spared: tuple[str, ...] = ()
    end: int = 0
    imports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A whole file before and after a rule; ``after`` empty means that the rule leaves it alone."""

    before: str
    after: str = ""
    unsafe: bool = False


Finder = Callable[["File", "Facts"], Iterable[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rewrite: its code, a one-line title, where it looks, and examples that tests execute."""

    code: str
    title: str
    explanation: str
    find: Finder
    examples: tuple[Example, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one file. ``error`` is one line; then ``after`` equals ``before``."""

    path: Path
    before: bytes
    after: bytes
    applied: tuple[Finding, ...] = ()
    hidden: tuple[Finding, ...] = ()
    reported: tuple[Finding, ...] = ()
    error: str = ""

    @property
    def changed(self) -> bool:
        return self.before != self.after
