"""Findings in, plan out: which changes a file gets, which findings are only reported. Pure."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import Change, Import, Insert, Template, anchor, uses_bmt
from rewriter.discover import Tell
from rewriter.rules import BY_CODE, FIRST, RULES
from rewriter.rules.rule import Rule
from rewriter.spelling import nearest
from rewriter.types import Conversion, Finding, InputError, Refusal, Remark, failure

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def known_codes(given: str, where: str) -> tuple[str, ...]:
    """Codes of rules, or what they begin with, from a list with commas.

    Raises:
        InputError: there are none, or no rule's code begins so; ``where`` says who named it.
    """
    codes = tuple(code.strip().upper() for code in given.split(",") if code.strip())
    if not codes:
        raise InputError(f"{where}: names no rule; give codes such as {RULES[0].code}")
    for code in codes:
        if not any(known.startswith(code) for known in BY_CODE):
            raise InputError(f"{where}: no rule {code}{nearest(code, BY_CODE) or '; --explain lists the rules'}")
    return codes


@dataclass(frozen=True, slots=True)
class Options:
    """What the user wants converted."""

    unsafe: bool = False
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    tensor_parallel: bool = False

    def wants(self, code: str) -> bool:
        if any(code.startswith(prefix) for prefix in self.ignore):
            return False
        return not self.select or any(code.startswith(prefix) for prefix in self.select)

    def check(self) -> None:
        """Raises InputError where every rule is left out."""
        if not any(map(self.wants, BY_CODE)):
            raise InputError("--select and --ignore leave no rule; nothing would be converted")


@dataclass(frozen=True, slots=True)
class Plan:
    """``changes`` are those of the ``applied`` conversions, in the order of the rules; ``hidden`` ones
    wait for --unsafe.

    ``bmt`` is what the file calls bmtrain. ``lists`` are the names of its lists of modules, if the user named any.
    """

    changes: tuple[Change, ...] = ()
    applied: tuple[Conversion, ...] = ()
    hidden: tuple[Conversion, ...] = ()
    reported: tuple[Remark | Refusal, ...] = ()
    bmt: str = "bmt"
    lists: tuple[str, ...] = ()


def make_plans(
    files: Sequence[File],
    facts: Facts,
    options: Options,
    absent: frozenset[str] = frozenset(),
    tell: Tell | None = None,
) -> dict[File, Plan]:
    """The plans of all files. A file that only scripts use which cannot be converted stays as it is, too.

    ``absent`` are keys of findings in other portions of the project that are known not to be applied.
    """
    found: dict[File, list[Finding]] = {}
    for file in files:
        if tell is not None:
            tell("deciding", len(found), len(files))
        found[file] = _without_refused_parts(_findings(file, facts))
    stopped = [file for file, findings in found.items() if any(_stops(finding) for finding in findings)]
    behind = facts.scripts.only_behind(stopped) if stopped else {}
    chosen = {
        file: [f for f in found[file] if isinstance(f, Conversion) and _applies(file, f, options)]
        for file in files
        if file not in stopped and file not in behind
    }
    met = {f.key for conversions in chosen.values() for f in conversions if f.key}
    if facts.project.partial:  # what other portions do is taken for granted, and checked when they are through
        here = {file.place for file in files}
        required = {key for conversions in chosen.values() for finding in conversions for key in finding.requires}
        met |= {key for key in required - absent if key.split("\0")[0] not in here}
    plans = {}
    for file in files:
        if file in behind:
            message = f"part of {behind[file].path}, which cannot be converted"
            plans[file] = Plan(reported=(Refusal("BMT090", 1, message),))
        else:
            plans[file] = _plan(file, facts, options, found[file], chosen.get(file), met)
        if options.blocks:
            plans[file] = replace(plans[file], lists=facts.stacks.names(file))
    return plans


def make_first_plans(
    files: Sequence[File], facts: Facts, options: Options, refused: Mapping[Path, Sequence[Refusal]]
) -> tuple[dict[File, Plan], dict[Path, tuple[Refusal, ...]]]:
    """Plans that make scripts of another engine ordinary ones, and for each file of those that stay the reasons.

    A script changes whole or not at all: not where one of its files is refused here, or was before.
    """
    found = {
        file: [f for rule in FIRST if options.wants(rule.code) for f in _found(rule, file, facts)] for file in files
    }
    reasons = {file: [f for f in findings if isinstance(f, Refusal)] for file, findings in found.items()}
    for file in files:
        reasons[file] = [*refused.get(file.path, ()), *reasons[file]]
    stay = {f for f in files if reasons[f] or _file_stays(f)}
    groups = [*facts.programs_with_accelerators.items(), *facts.programs_with_deepspeed.items()]
    for program, group in groups if not facts.project.partial else ():
        for other in sorted(group - set(files), key=lambda file: file.place):
            if program in found and any(_found(rule, other, facts) for rule in FIRST):
                message = f"{other.path} takes part in this training, and is not converted with it: name both"
                reasons[program].append(Refusal(FIRST[0].code, 1, message))
                stay.add(program)
    for _ in groups:
        stay |= {file for _, group in groups if group & stay for file in group}
    stay &= set(files)
    holders = {program for program, _ in groups}
    holders.update(*(known.holders() for known in facts.accelerators.values()))
    holders.update(*(known.holders() for known in facts.deepspeeds.values()))
    for program, group in groups:
        # Not what a package's entry reaches at some depth: a library has trainers that its programs need not run.
        near = group & holders & facts.project.imported(program)
        first = next((file for file in files if file in near and reasons[file]), None)
        if first is not None and program not in group and not facts.scripts.trains(program):
            reason = reasons[first][0]
            message = f"it starts the training in {first.path}: {reason.message} (line {reason.line})"
            stay.add(program)
            reasons[program] = [Refusal(reason.code, 1, message)]
    plans = {}
    for file in files:
        conversions = [finding for finding in found[file] if isinstance(finding, Conversion)]
        if conversions and file not in stay:
            plans[file] = _plan(file, facts, options, found[file], conversions, set())
    # A library's file that only takes helpers of accelerate is converted for itself: others train its models.
    return plans, {file.path: tuple(reasons[file]) for file in stay & holders if reasons[file]}


def _file_stays(file: File) -> bool:
    """Whether nothing may change a file."""
    return file.source.skips_file or file.notebook is not None


def _stops(finding: Finding) -> bool:
    """Whether a finding keeps its whole file as it is."""
    return isinstance(finding, Refusal) and not finding.spared


def _applies(file: File, finding: Conversion, options: Options) -> bool:
    return _wanted(file, finding, options) and (options.unsafe or not finding.unsafe)


def _findings(file: File, facts: Facts) -> list[Finding]:
    """What the rules say about a file, in their order."""
    if file.source.skips_file:
        return []
    return [finding for rule in RULES if rule not in FIRST for finding in _found(rule, file, facts)]


def _found(rule: Rule, file: File, facts: Facts) -> list[Finding]:
    """What one rule says about a file.

    Raises:
        InputError: the rule fails. No file is converted then: what is right in one depends on what becomes of others.
    """
    try:
        return list(rule.find(file, facts))
    except InputError:
        raise
    except Exception as error:
        raise failure(f"rule {rule.code}", file.path, error) from error


def _without_refused_parts(findings: list[Finding]) -> list[Finding]:
    """What is left of a file's findings where rules refuse parts of it."""
    refused = [finding for finding in findings if isinstance(finding, Refusal) and finding.spared]
    if not refused or any(_stops(finding) for finding in findings if finding.code == "BMT090"):
        return findings
    return [
        finding
        for finding in findings
        if finding in refused or all(finding.code in f.spared and not f.line <= finding.line <= f.end for f in refused)
    ]


def _plan(
    file: File,
    facts: Facts,
    options: Options,
    findings: list[Finding],
    chosen: list[Conversion] | None,
    met: set[str],
) -> Plan:
    """The plan of one file; ``chosen`` is None if nothing may change it."""
    findings = sorted(findings, key=lambda finding: finding.line)
    reported = tuple(
        f
        for f in findings
        if not isinstance(f, Conversion)
        and _wanted(file, f, options)
        and (options.unsafe or isinstance(f, Refusal) or not f.unsafe)
    )
    if chosen is None:
        return Plan(reported=tuple(finding for finding in reported if isinstance(finding, Refusal)))
    made = [finding for finding in chosen if all(key in met for key in finding.requires)]
    hidden = tuple(
        f
        for f in findings
        if isinstance(f, Conversion) and f.unsafe and not options.unsafe and _wanted(file, f, options)
    )
    changes = list(dict.fromkeys(change for finding in made for change in finding.changes))
    bmt = facts.alias(file)
    lines = list(dict.fromkeys(change.line for change in changes if isinstance(change, Import)))
    changes = [change for change in changes if not isinstance(change, Import)]
    if not facts.has_import(file) and any(uses_bmt(change) for change in changes):
        lines.append("import bmtrain as bmt" if bmt == "bmt" else "import bmtrain")
    if lines:
        changes.insert(0, _imports(file, changes, lines))
    applied = tuple(sorted(made, key=lambda finding: finding.line))
    return Plan(tuple(changes), applied, hidden, reported, bmt)


def _wanted(file: File, finding: Finding, options: Options) -> bool:
    if not options.wants(finding.code):
        return False
    codes = file.source.skips.get(finding.line)
    return codes is None or (bool(codes) and finding.code not in codes)


def _imports(file: File, changes: Sequence[Change], lines: Sequence[str]) -> Insert:
    """New lines behind the file's other imports."""
    body = file.tree.body
    code = tuple(map(Template, lines))
    anchors = (anchor(change) for change in changes)
    last = _last_import(body, {file.names.top_of(node) for node in anchors if node is not None})
    if last is not None:
        return Insert(last, code, behind=True)
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return Insert(body[0], code, behind=documented)


def _last_import(body: list[ast.stmt], touched: set[ast.AST]) -> ast.stmt | None:
    """The last import in front of the first definition and of the first statement with a change."""
    last: ast.stmt | None = None
    for statement in body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            last = statement
        elif isinstance(statement, _DEFINITIONS) or statement in touched:
            break
    return last
