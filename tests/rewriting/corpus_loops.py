"""What becomes of each loop over a list of modules, by the shape of the loop."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rewriter.analyze.call_form import call_form
from rewriter.analyze.checkpoints import is_checkpoint
from rewriter.analyze.facts import Facts
from rewriter.analyze.loops import Loop, find_loops, is_chain, is_pairs, stored_names
from rewriter.analyze.names import walk
from rewriter.analyze.project import File, Project

from .corpus_flow import passes_on

CLASSES = {
    "A": "one positional call, whole list",
    "B": "one call with keywords, or with a checkpoint branch",
    "C": "more than a call in the body, over the list, its indices or several lists",
    "D": "a slice, or the list in reverse",
    "E": "members skipped, or the loop left early",
    "F": "pairs of modules",
    "G": "other methods of the members, or members given to a helper",
}
STATES = {
    "called": "the loop is one call of the list",
    "kept": "the loop stays; its members are blocks, or parts of an outer list's block",
    "wrapper": "the loop stays; the class has a base of another package, and bmt.BMTrainModelWrapper makes the blocks",
    "refused": "the loop stays, and its members stay parts of the module around them; a reason is given",
}
NOT_BLOCKS = ("the members are single torch layers", "by its name", "no loop carries")


class Record(NamedTuple):
    """One loop. ``chain`` is whether something is carried from member to member."""

    package: str
    file: str
    line: int
    owner: str
    path: str
    shape: str
    state: str
    reason: str

    @property
    def chain(self) -> bool:
        return bool(self.shape)

    @property
    def place(self) -> str:
        return f"{self.package}: {self.file}:{self.line}"


def records(facts: Facts, folder: Path, stopped: Mapping[File, str]) -> Iterator[Record]:
    """The loops of a project's modules, each ``for`` once. ``stopped`` files are left whole, each for a reason."""
    stacks = facts.stacks
    called = {node for stack in stacks.found for node in stack.calls}
    kept = {loop.node: stack.reasons.get(loop.node, "") for stack in stacks.found for loop in stack.loops}
    left: dict[ast.AST, str] = {}
    exact = {(item.node, item.path): item.reason for item in stacks.left}
    for item in stacks.left:
        left.setdefault(item.node, item.reason)
    for loop in _all_loops(facts):
        node, reason = loop.node, ""
        left[node] = exact.get((node, loop.path)) or left.get(node, "")
        if loop.file in stopped:
            state, reason = "refused", stopped[loop.file]
        elif node in called:
            state = "called"
        elif node in kept:
            state, reason = "kept", kept[node]
        elif left[node].startswith("it runs inside a block"):
            state, reason = "kept", left[node]
        elif facts.classes.kind(loop.owner) == "external":
            state, reason = "wrapper", "the class is based on another package's"
        else:
            state, reason = "refused", left[node] or "the members are not called as blocks"
        name = loop.file.path.relative_to(folder).as_posix()
        shape = loop_class(loop, facts.project) if passes_on(loop) else ""
        if not left[node] and node not in kept and not _is_list_of_modules(facts, loop):
            shape = ""
        yield Record(folder.name, name, node.lineno, loop.owner.name, loop.path, shape, state, reason)


def _is_list_of_modules(facts: Facts, loop: Loop) -> bool:
    """Whether a class is seen to make the list that a loop runs over: else it may hold numbers."""
    family = (loop.owner, *facts.classes.ancestors(loop.owner), *facts.classes.descendants(loop.owner))
    return any(loop.path in facts.stacks.containers.of(member) for member in family)


def _all_loops(facts: Facts) -> Iterator[Loop]:
    """Of several lists that one ``for`` runs over, the one that it is a chain of."""
    for file in facts.project:
        if not file.convert or b"for " not in file.source.data:
            continue
        for info in facts.classes.all(file):
            if facts.classes.is_module(info):
                found: dict[ast.For, Loop] = {}
                for loop in find_loops(info):
                    if loop.node not in found or (is_chain(loop) and not is_chain(found[loop.node])):
                        found[loop.node] = loop
                yield from found.values()


def loop_class(loop: Loop, project: Project) -> str:
    """A letter of CLASSES; empty for a loop that carries nothing from member to member."""
    if is_pairs(loop):
        return "F" if _carries(loop, any_call=True) else ""
    if not is_chain(loop):
        return "G" if _carries(loop, any_call=False) else ""
    if not any(loop.is_element(call.func) or is_checkpoint(loop.file, call, project) for call in loop.calls()):
        return "G"
    form = call_form(loop, project)
    if not isinstance(form, str):
        return "B" if form.call.keywords or form.checkpoint else "A"
    if loop.header in {"slice", "reversed"}:
        return "D"
    return "E" if _skips(loop) else "C"


def _carries(loop: Loop, any_call: bool) -> bool:
    """Whether the result of a member's method, or of any call in the body, goes into the next one."""
    stored = stored_names(loop.node.body)
    for node in (node for statement in loop.node.body for node in walk(statement)):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute) and loop.is_element(node.func.value)
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        names = {item.id for value in given for item in walk(value) if isinstance(item, ast.Name)}
        helped = any(loop.is_element(value) for value in given)
        if (any_call or method or helped) and (names & stored) - {loop.element, loop.index}:
            return True
    return False


def _skips(loop: Loop) -> bool:
    """Whether members may be left out: a jump in the body, or a call on one side of a test only."""
    calls = set(loop.calls())
    for node in (node for statement in loop.node.body for node in walk(statement)):
        if isinstance(node, (ast.Break, ast.Continue, ast.Return)):
            return True
        if isinstance(node, ast.If):
            sides = [calls & {item for part in side for item in walk(part)} for side in (node.body, node.orelse)]
            if bool(sides[0]) != bool(sides[1]) and len(sides[0] | sides[1]) == len(calls):
                return True
    return False


def table(found: Iterable[Record]) -> list[list[str]]:
    """Rows of: class, loops, called, kept, by the wrapper, refused, share with blocks (macro over packages)."""
    chains = [record for record in found if record.chain and not record.reason.startswith(NOT_BLOCKS)]
    rows = []
    for letter in [*CLASSES, ""]:
        part = [record for record in chains if not letter or record.shape == letter]
        states = Counter(record.state for record in part)
        share = f"{macro_share(part, ('called', 'kept', 'wrapper')):.1f} %" if part else "-"
        counts = [str(states[state]) for state in STATES]
        rows.append([letter or "all", str(len(part)), *counts, share])
    return rows


def macro_share(found: Iterable[Record], states: tuple[str, ...]) -> float:
    """Mean over packages of the share of loops in one of some states, in percent."""
    totals: Counter[str] = Counter()
    good: Counter[str] = Counter()
    for record in found:
        totals[record.package] += 1
        good[record.package] += record.state in states
    return 100 * sum(good[name] / total for name, total in totals.items()) / len(totals) if totals else 0.0
