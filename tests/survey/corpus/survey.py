"""Compares the rewriter's view of loops with a survey's: which are chains over blocks, and of which class."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .loops import CLASSES, NOT_BLOCKS, Record

_NO_CHAIN = {
    "N": "the loop sets members up",
    "14a": "members stand side by side",
    "14c": "parts of members are called",
    "14f": "the members are experts",
}
Place = tuple[str, str, int]


def compare(loops: Iterable[Record], survey: Path) -> str:
    """Markdown: the disagreements by their reason, and the classes of the loops that both call chains."""
    here = {(record.package, record.file, record.line): record for record in loops}
    packages = {record.package for record in here.values()}
    there: dict[Place, dict[str, Any]] = {}
    with gzip.open(survey, "rt") as lines:
        for entry in (json.loads(line) for line in lines):
            if entry["src"] in packages and entry["form"] == "for":
                there.setdefault((entry["src"], entry["file"], entry["line"]), entry)
    reasons: dict[str, list[str]] = {}
    both: Counter[tuple[str, str]] = Counter()
    for place in sorted(here.keys() | there.keys()):
        one, other = here.get(place), there.get(place)
        reason = _reason(one, other)
        if reason:
            reasons.setdefault(reason, []).append(f"{place[0]}: {place[1]}:{place[2]}")
        elif one is not None and other is not None and one.chain and _is_chain(other):
            both[_class(other), one.shape] += 1
    return f"{_reason_table(reasons, both.total())}\n{_class_table(both)}"


def _is_chain(entry: dict[str, Any]) -> bool:
    return bool(entry["blockish"]) and entry["shape"] not in _NO_CHAIN


def _reason(one: Record | None, other: dict[str, Any] | None) -> str:
    """Why the two see a loop differently; empty if they do not."""
    ours = one is not None and one.chain and not one.reason.startswith(NOT_BLOCKS)
    theirs = other is not None and _is_chain(other)
    if ours and not theirs:
        assert one is not None
        return f"here only: {_here_only(one, other)}"
    if theirs and not ours:
        assert other is not None
        return f"survey only: {_survey_only(one, other)}"
    return ""


def _here_only(one: Record, other: dict[str, Any] | None) -> str:
    if other is None:
        return "the survey does not have the loop"
    if not other["blockish"]:
        kind = "groups of modules" if one.shape == "F" else "members"
        return f"{kind} that the survey does not know for blocks"
    return f"the survey says that {_NO_CHAIN[other['shape']]} ({other['shape']})"


def _survey_only(one: Record | None, other: dict[str, Any]) -> str:
    if one is not None and one.reason.startswith(NOT_BLOCKS):
        return one.reason
    if one is None and other["own"] == "foreign":
        return "a list of another object, or a function outside of the class"
    if other["own"] == "guess" and (one is None or one.state == "wrapper"):
        return "the class, or its list, is not seen to be of modules"
    if one is None or one.path != other["path"].removeprefix("self."):
        return "the list is not seen: arithmetic on an index, a name for several lists, an unknown base"
    return "no result of a member goes into a later one"


def _class(entry: dict[str, Any]) -> str:
    """A survey's shape and tags as a class A to G."""
    tags = set(entry["tags"])
    if entry["shape"] == "13":
        return "F"
    if entry.get("tbl") == "strict":
        return "A"
    if entry.get("tbl") in {"kwargs", "star"} and entry["shape"] in {"1", "2", "3", "6a", "7"}:
        return "B"
    if tags & {"getattr", "method-call", "passed to helper"}:
        return "G"
    if "slice" in tags:
        return "D"
    return "E" if tags & {"cond-call", "layerdrop", "break", "continue", "return"} else "C"


def _reason_table(reasons: dict[str, list[str]], agreed: int) -> str:
    lines = ["| loop is a chain over blocks | loops | for instance |", "| --- | ---: | --- |", f"| both | {agreed} | |"]
    for reason, places in sorted(reasons.items()):
        lines.append(f"| {reason} | {len(places)} | {places[len(places) // 2]} |")
    return "\n".join(lines) + "\n"


def _class_table(both: Counter[tuple[str, str]]) -> str:
    lines = [f"| survey \\ here | {' | '.join(CLASSES)} |", "| --- |" + " ---: |" * len(CLASSES)]
    for theirs in CLASSES:
        lines.append(f"| {theirs} | {' | '.join(str(both[theirs, ours]) for ours in CLASSES)} |")
    return "\n".join(lines) + "\n"
