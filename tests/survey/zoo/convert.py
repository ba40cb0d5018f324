"""What the rewriter does to the files that a family's classes are defined in."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rewriter.analyze.facts import Facts
from rewriter.analyze.model.loops import Loop, is_chain, is_pairs
from rewriter.analyze.read.project import Project
from rewriter.analyze.read.source import Source
from rewriter.plan import Options, make_plans
from rewriter.types import Refusal

CLASSES = {
    "A": "called, positional arguments", "B": "called, keyword arguments or a checkpoint branch",
    "C": "kept: more than a call in the body", "D": "slice or reversed", "E": "layers skipped or left early",
    "F": "pairs of modules", "G": "other methods of the blocks",
}  # fmt: skip
"""How a loop over a container uses it."""


def count(source: Path, files: Iterable[str]) -> tuple[dict[str, Counter[str]], dict[str, str]]:
    """By file: edits; loops called, kept over a stack, kept over a plain list; loops of each class. And refusals."""
    project = Project([source])
    added = [project.add(Source(source / name, (source / name).read_bytes())) for name in sorted(files)]
    facts = Facts(project)
    counts: dict[str, Counter[str]] = {name: Counter() for name in files}
    refused: dict[str, str] = {}
    for file, plan in make_plans(added, facts, Options()).items():
        if file in added:
            name = str(file.path.relative_to(source))
            counts[name]["edits"] = len(plan.applied)
            stops = [f"{finding.code} {finding.message}" for finding in plan.reported if isinstance(finding, Refusal)]
            if stops:
                refused[name] = stops[0]
    called = {loop for stack in facts.stacks.found for loop in stack.calls}
    kept = {loop.node for stack in facts.stacks.found for loop in stack.loops}
    for loop in facts.stacks.loops:
        name = str(loop.file.path.relative_to(source))
        if name in counts and (is_chain(loop) or is_pairs(loop)):
            state = "called" if loop.node in called else "kept" if loop.node in kept else "plain"
            counts[name][state] += 1
            counts[name][_class(loop, state == "called")] += 1
    return counts, refused


def _class(loop: Loop, called: bool) -> str:
    inside = [node for statement in loop.node.body for node in ast.walk(statement)]
    if called:
        keywords = any(call.keywords for call in loop.calls())
        return "B" if keywords or any(isinstance(node, ast.If) for node in inside) else "A"
    if is_pairs(loop):
        return "F"
    if loop.header in ("slice", "reversed"):
        return "D"
    if any(isinstance(node, (ast.Break, ast.Continue)) for node in inside):
        return "E"
    conditions = [node for node in inside if isinstance(node, ast.If)]
    calls = list(loop.calls())
    if any(call in list(ast.walk(node)) for node in conditions for call in calls):
        return "E"
    return "C" if calls else "G"
