"""Findings in, plan out: which edits a file gets, which findings are only reported. Pure."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rewriter.analyze.facts import Facts
from rewriter.analyze.project import File
from rewriter.analyze.source import Source
from rewriter.rules import RULES
from rewriter.types import Edit, Finding, Safety, Span

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


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


def make_plans(
    files: Sequence[File], facts: Facts, options: Options, absent: frozenset[str] = frozenset()
) -> dict[File, Plan]:
    """The plans of all files. A file that only scripts use which cannot be converted stays as it is, too.

    ``absent`` are keys of findings in other portions of the project that are known not to be applied.
    """
    found = {file: _findings(file, facts) for file in files}
    found = {file: _without_refused_parts(findings) for file, findings in found.items()}
    stopped = {file for file, findings in found.items() if any(f.stop and not f.spared for f in findings)}
    behind = facts.scripts.only_behind(stopped) if stopped else {}
    changing = [file for file in files if file not in stopped and file not in behind]
    met = {f.key for file in changing for f in found[file] if f.key and _applies(file, f, options)}
    if facts.project.partial:  # what other portions do is taken for granted, and checked when they are through
        here = {file.place for file in files}
        required = {key for file in changing for finding in found[file] for key in finding.requires}
        met |= {key for key in required - absent if key.split("\0")[0] not in here}
    return {file: _plan(file, facts, options, found[file], behind.get(file), met) for file in files}


def _applies(file: File, finding: Finding, options: Options) -> bool:
    if finding.safety is Safety.REPORT or not _wanted(file, finding, options):
        return False
    return finding.safety is Safety.SAFE or options.unsafe


def _findings(file: File, facts: Facts) -> list[Finding]:
    if file.source.skips_file:
        return []
    return sorted((finding for rule in RULES for finding in rule.find(file, facts)), key=lambda finding: finding.line)


def _without_refused_parts(findings: list[Finding]) -> list[Finding]:
    """What is left of a file's findings where rules refuse parts of it."""
    refused = [finding for finding in findings if finding.stop and finding.spared]
    if not refused or any(finding.stop and not finding.spared for finding in findings if finding.code == "BMT090"):
        return findings
    return [
        finding
        for finding in findings
        if finding in refused or all(finding.code in f.spared and not f.line <= finding.line <= f.end for f in refused)
    ]


def _plan(
    file: File, facts: Facts, options: Options, findings: list[Finding], behind: File | None, met: set[str]
) -> Plan:
    reported = [f for f in findings if f.safety is Safety.REPORT and _wanted(file, f, options)]
    if any(finding.stop and not finding.spared for finding in findings):
        return Plan((), (), (), tuple(finding for finding in reported if finding.stop))
    if behind is not None:
        message = f"part of {behind.path}, which cannot be converted"
        return Plan((), (), (), (Finding("BMT090", 1, message, safety=Safety.REPORT),))
    applied = [
        finding
        for finding in findings
        if _applies(file, finding, options) and all(key in met for key in finding.requires)
    ]
    hidden = [f for f in findings if f.safety is Safety.UNSAFE and not options.unsafe and _wanted(file, f, options)]
    edits = [edit for finding in applied for edit in finding.edits]
    if edits:
        edits = _without_empty_blocks(file, edits)
        edits.extend(_import_edits(file, facts, edits, [line for finding in applied for line in finding.imports]))
    return Plan(tuple(edits), tuple(applied), tuple(hidden), tuple(reported))


def _without_empty_blocks(file: File, edits: list[Edit]) -> list[Edit]:
    """``pass`` in place of a block of which every statement is removed."""
    source = file.source
    removed = {edit.span for edit in edits if not edit.parts}
    if not removed:
        return edits
    for node in file.nodes:
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and not isinstance(node, ast.Module):
                spans = [source.statement_lines(item) for item in block]
                if all(span in removed for span in spans):
                    first = Edit(source.span(block[0]), ("pass",))
                    edits = [edit for edit in edits if edit.parts or edit.span != spans[0]] + [first]
    return edits


def _wanted(file: File, finding: Finding, options: Options) -> bool:
    if not options.wants(finding.code):
        return False
    codes = file.source.skips.get(finding.line)
    return codes is None or (bool(codes) and finding.code not in codes)


def _import_edits(file: File, facts: Facts, edits: Iterable[Edit], others: list[str]) -> list[Edit]:
    """``import bmtrain as bmt`` behind the file's other imports, if an edit needs it, and what else edits need."""
    alias = facts.alias(file)
    written = "".join(part for edit in edits for part in edit.parts if isinstance(part, str))
    lines = list(dict.fromkeys(others))
    if not facts.has_import(file) and f"{alias}." in written:
        lines.append("import bmtrain as bmt" if alias == "bmt" else "import bmtrain")
    if not lines:
        return []
    source, body = file.source, file.tree.body
    last = _last_import(source, body, min((edit.span.start for edit in edits), default=len(source.data)))
    if last is not None:
        return [source.insert_after(last, lines, -50)]
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        return [source.insert_after(body[0], lines, -50)]
    if body:
        return [source.insert_before(body[0], lines, -50)]
    return [Edit(Span(0, 0), tuple(line + source.newline for line in lines))]


def _last_import(source: Source, body: list[ast.stmt], first: int) -> ast.stmt | None:
    """The last import in front of the first definition and of the first statement with an edit, at byte ``first``."""
    last: ast.stmt | None = None
    for statement in body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            last = statement
        elif isinstance(statement, _DEFINITIONS) or first < source.span(statement).end:
            break
    return last
