"""What becomes of each loop over a list of modules, by the shape of the loop."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rewriter.analyze.facts import Facts
from rewriter.analyze.model.call_form import call_form
from rewriter.analyze.model.checkpoints import is_checkpoint
from rewriter.analyze.model.flow import names
from rewriter.analyze.model.loops import SETUP, Loop, find_loops, is_chain, is_pairs, takes_apart
from rewriter.analyze.model.stacks import NO_MODULES
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.read.project import Project

from .flow import passes_on

CLASSES = {
    "A": "one positional call, whole list",
    "B": "one call with keywords, or with a checkpoint branch",
    "C": "more than a call in the body, over the list, its indices or several lists",
    "D": "a slice, or the list in reverse",
    "E": "members skipped, or the loop left early",
    "F": "pairs, or lists of modules, as members",
    "G": "parts or other methods of the members, or members given to a helper",
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
        seen = _calls(loop) and not NO_MODULES.search(loop.path)
        if not left[node] and node not in kept and not (seen or _is_list_of_modules(facts, loop)):
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
                    if loop.node not in found or _rank(loop) > _rank(found[loop.node]):
                        found[loop.node] = loop
                yield from found.values()


def _rank(loop: Loop) -> int:
    """How likely a list is the one that a loop is about, of several that it runs over."""
    if is_pairs(loop) or takes_apart(loop):
        return 4
    return 2 * is_chain(loop) + _calls(loop)


def _calls(loop: Loop) -> bool:
    """Whether the members themselves are called."""
    return any(loop.is_element(call.func) for call in loop.calls())


def loop_class(loop: Loop, project: Project) -> str:
    """A letter of CLASSES; empty for a loop that carries nothing from member to member."""
    if is_pairs(loop) or takes_apart(loop):
        return "F" if _carries(loop, any_call=True) else ""
    if not is_chain(loop):
        return "G" if _carries(loop, any_call=False) else ""
    if not _calls(loop) and not any(is_checkpoint(loop.file, call, project) for call in loop.calls()):
        return "G"
    form = call_form(loop, project)
    if not isinstance(form, str):
        return "B" if form.call.keywords or form.checkpoint else "A"
    if loop.header in {"slice", "reversed"}:
        return "D"
    calls = set(loop.calls())
    jumps = (ast.Break, ast.Continue, ast.Return)
    skips = any(isinstance(node, jumps) for statement in loop.node.body for node in walk(statement))
    return "E" if skips or not _always(loop.node.body, calls) else "C"


def _carries(loop: Loop, any_call: bool) -> bool:
    """Whether what is carried goes into a member's method, or a part of it, or into any call in the body."""
    for node in (node for statement in loop.node.body for node in walk(statement)):
        if not isinstance(node, ast.Call) or (isinstance(node.func, ast.Attribute) and SETUP.match(node.func.attr)):
            continue
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        part = any(loop.is_element(item) for item in walk(node.func))
        helped = any(loop.is_element(value) for value in given)
        used = {name.id for value in given for name in names(value)} - {loop.element, loop.index}
        if (any_call or part or helped) and used & loop.carried:
            return True
    return False


def _always(body: list[ast.stmt], calls: set[ast.Call]) -> bool:
    """Whether some statements call a member whichever way a test in them goes."""
    for statement in body:
        if isinstance(statement, ast.If):
            if _always(statement.body, calls) and _always(statement.orelse, calls):
                return True
        elif any(node in calls for node in walk(statement)):
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
