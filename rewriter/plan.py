"""Findings in, plan out: which edits a file gets, which findings are only reported. Pure."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from rewriter.analyze.facts import Facts
from rewriter.analyze.project import File
from rewriter.rules import RULES
from rewriter.types import Edit, Finding, Safety, Span


@dataclass(frozen=True, slots=True)
class Options:
    """What the user wants converted."""

    unsafe: bool = False
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    def wants(self, code: str) -> bool:
        if any(code.startswith(prefix) for prefix in self.ignore):
            return False
        return not self.select or any(code.startswith(prefix) for prefix in self.select)


@dataclass(frozen=True, slots=True)
class Plan:
    """``applied`` findings give the edits; ``hidden`` ones wait for --unsafe; ``reported`` ones are remarks."""

    edits: tuple[Edit, ...]
    applied: tuple[Finding, ...]
    hidden: tuple[Finding, ...]
    reported: tuple[Finding, ...]


def make_plan(file: File, facts: Facts, options: Options) -> Plan:
    """The plan of one file."""
    if file.source.skips_file:
        return Plan((), (), (), ())
    findings = sorted((finding for rule in RULES for finding in rule.find(file, facts)), key=lambda f: f.line)
    reported = [f for f in findings if f.safety is Safety.REPORT and _wanted(file, f, options)]
    if any(finding.stop for finding in findings):
        return Plan((), (), (), tuple(reported))
    applied: list[Finding] = []
    hidden: list[Finding] = []
    for finding in findings:
        if finding.safety is Safety.REPORT or not _wanted(file, finding, options):
            continue
        allowed = finding.safety is Safety.SAFE or options.unsafe
        (applied if allowed else hidden).append(finding)
    applied = _with_requirements(applied)
    edits = [edit for finding in applied for edit in finding.edits]
    if edits:
        edits.extend(_import_edit(file, facts, edits))
    return Plan(tuple(edits), tuple(applied), tuple(hidden), tuple(reported))


def _wanted(file: File, finding: Finding, options: Options) -> bool:
    if not options.wants(finding.code):
        return False
    codes = file.source.skips.get(finding.line)
    return codes is None or (bool(codes) and finding.code not in codes)


def _with_requirements(findings: list[Finding]) -> list[Finding]:
    """Findings whose requirements are met by other findings that stay."""
    while True:
        keys = {finding.key for finding in findings}
        kept = [finding for finding in findings if set(finding.requires) <= keys]
        if len(kept) == len(findings):
            return kept
        findings = kept


def _import_edit(file: File, facts: Facts, edits: Iterable[Edit]) -> list[Edit]:
    """``import bmtrain as bmt`` behind the file's other imports, if an edit needs it."""
    alias = facts.alias(file)
    written = "".join(part for edit in edits for part in edit.parts if isinstance(part, str))
    if facts.has_import(file) or f"{alias}." not in written:
        return []
    line = "import bmtrain as bmt" if alias == "bmt" else "import bmtrain"
    source, last = file.source, _last_import(file.tree)
    if last is not None:
        return [source.insert_after(last, [line], -50)]
    body = file.tree.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        return [source.insert_after(body[0], [line], -50)]
    if body:
        return [source.insert_before(body[0], [line], -50)]
    return [Edit(Span(0, 0), (line + source.newline,))]


def _last_import(tree: ast.Module) -> ast.stmt | None:
    """The last import of the block of imports that opens a module, or the first import after other code."""
    last: ast.stmt | None = None
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            last = statement
        elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            break
    return last
