"""One rank logs, the others warn.

What: the level of a logger, handler or ``basicConfig`` is ``logging.WARNING`` on all ranks but one, however it is
written, and so are those of loguru's sinks, absl and coloredlogs. A log file of ``logging`` or loguru is one rank's: on
the others ``basicConfig(filename=...)`` and ``FileHandler`` write warnings to stderr, or to ``os.devnull`` where a
handler of the script prints them already. One rank configures ``logging`` by ``dictConfig`` or ``fileConfig``, and
loguru by ``configure``. A ``Console`` of rich is quiet on the others.
Why: each line would be there once for every rank, and a file that all ranks write is torn; what goes wrong on one rank
alone is to be seen.
Refuses when: only one rank reaches the call; the script was for several ranks and says itself what each of them logs.
loguru's own sink, which no line of the script makes, is reported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.training.writers import CONFIGURED_ONCE, LOG_FILES, LOGURU_CALLS, log_file
from rewriter.changes import Arguments, Change, template, wrap
from rewriter.rules.imports import imports
from rewriter.rules.one_rank import written_once
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_HINTS = (b"logging", b"setLevel", b"loguru", b"coloredlogs", b"Console")
_HIGH = {"WARNING", "WARN", "ERROR", "CRITICAL", "FATAL"}
_WARNING = 30
_HANDLER = re.compile(r"(^|\.)[A-Z]\w*Handler$")
_CONSOLE = "rich.console.Console"
_MESSAGE = "one rank logs, the others warn"


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or not any(hint in file.source.data for hint in _HINTS):
        return
    told = False
    for call in file.calls:
        if facts.scripts.in_kept_guard(file, call):
            continue
        name = facts.project.external(file, call.func)
        path = log_file(file, facts.project, call)
        if path is not None:
            yield from _log_file(file, facts, call, path)
        if _logs_by_rank(file, facts):
            continue
        if name in CONFIGURED_ONCE:
            yield Conversion(RULE.code, call.lineno, _MESSAGE, (wrap(call.func, "{bmt}.on_rank_0({it})"),))
        elif name == _CONSOLE and not any(keyword.arg in {"quiet", None} for keyword in call.keywords):
            quiet = Arguments(call, added=(template("quiet={bmt}.rank() != 0"),))
            yield Conversion(RULE.code, call.lineno, "one rank prints", (quiet,))
        elif name in LOGURU_CALLS and not told and not _has_sinks(facts):
            told = True
            message = (
                "every rank logs this, by loguru's own sink: with logger.remove() and logger.add(sys.stderr) in the "
                "script, one rank does, and the others warn"
            )
            yield Remark(RULE.code, call.lineno, message)
        else:
            yield from _level(file, facts, call, name, path)


def _level(file: File, facts: Facts, call: ast.Call, name: str, path: ast.expr | None) -> Iterator[Finding]:
    """``logger.setLevel(logging.INFO)``, ``logging.basicConfig(level=...)``: other ranks log what is wrong only."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == "level"]
    warning = '"WARNING"'
    more: tuple[Change, ...] = ()
    if isinstance(call.func, ast.Attribute) and call.func.attr == "setLevel":
        values += call.args[:1]
        warning, more = "logging.WARNING", tuple(imports(file, "logging"))
    elif name == "logging.basicConfig":
        warning, more = "logging.WARNING", tuple(imports(file, "logging"))
    elif name == "absl.logging.set_verbosity" and isinstance(call.func, ast.Attribute):
        values, warning = call.args[:1], f"{file.source.code(call.func.value)}.WARNING"
    elif name in {"coloredlogs.install", "loguru.logger.add"}:
        if not values and path is None and not any(keyword.arg is None for keyword in call.keywords):
            own = "INFO" if name == "coloredlogs.install" else "DEBUG"
            added = Arguments(call, added=(template(f'level="{own}" if {{bmt}}.rank() == 0 else "WARNING"'),))
            yield Conversion(RULE.code, call.lineno, _MESSAGE, (added,))
            return
    else:
        return
    for value in values:
        if isinstance(value, ast.Starred) or _is_high(file, facts, value) or not file.source.is_exact(value):
            continue
        change = wrap(value, f"{{it}} if {{bmt}}.rank() == 0 else {warning}")
        yield Conversion(RULE.code, call.lineno, _MESSAGE, (*more, change))


def _is_high(file: File, facts: Facts, value: ast.expr) -> bool:
    """Whether a level leaves out all but warnings, if only on ranks that do not log."""
    match value:
        case ast.Constant(value=str(name)):
            return name.upper() in _HIGH
        case ast.Constant(value=int(number)):
            return number >= _WARNING
        case ast.IfExp(test=ast.Compare(left=ast.Call(func=func)), orelse=other):
            of_rank = facts.project.external(file, func) == "bmtrain.rank"
            return of_rank and _is_high(file, facts, other)
        case ast.Name() | ast.Attribute():
            module, _, name = facts.project.external(file, value).rpartition(".")
            return module in {"logging", "absl.logging"} and name in _HIGH
    return False


def _log_file(file: File, facts: Facts, call: ast.Call, path: ast.expr) -> Iterator[Finding]:
    inside = [item for item in ast.walk(path) if isinstance(item, ast.expr)]
    if any(facts.project.external(file, item) in {"os.devnull", "bmtrain.rank"} for item in inside):
        return
    if (chosen := _chosen(file, call)) is not None:
        if any(
            facts.project.external(file, i.func) == "bmtrain.rank" for i in ast.walk(chosen) if isinstance(i, ast.Call)
        ):
            return
    name = facts.project.external(file, call.func)
    if isinstance(path, ast.Starred) or not file.source.is_exact(path):
        message = "every rank writes this log file: one rank is to open it"
        yield Remark(RULE.code, call.lineno, message, differs=True)
        return
    changes: tuple[Change, ...] = written_once(file, path)
    if not _is_printed(facts):
        if name == "logging.basicConfig":
            changes = (wrap(path, "{it} if {bmt}.rank() == 0 else None"),)
        elif name.startswith("logging.") and file.source.is_exact(call):
            changes = (
                *imports(file, "logging"), wrap(call, "{it} if {bmt}.rank() == 0 else logging.StreamHandler()"),
            )  # fmt: skip
    yield Conversion(RULE.code, call.lineno, "one rank writes this log file", changes)


def _chosen(file: File, call: ast.Call) -> ast.expr | None:
    """The test under which a conditional expression makes a handler."""
    parent = file.names.parents[call]
    return parent.test if isinstance(parent, ast.IfExp) and call is parent.body else None


def _is_printed(facts: Facts) -> bool:
    """Whether some handler of the scripts, beside those of files, sees to what is logged."""
    for file in facts.scripts.training:
        for call in file.calls if b"andler" in file.source.data or b"basicConfig" in file.source.data else ():
            name = facts.project.external(file, call.func)
            if name == "logging.basicConfig":
                if log_file(file, facts.project, call) is None:
                    return True
            elif name not in LOG_FILES and _HANDLER.search(name or dotted(call.func) or ""):
                parent = file.names.parents[call]
                if not isinstance(parent, ast.IfExp) or call is not parent.orelse:  # not one that took a file's place
                    return True
    return False


def _has_sinks(facts: Facts) -> bool:
    """Whether the scripts say themselves where loguru prints."""
    return any(
        facts.project.external(file, call.func) in {"loguru.logger.remove", "loguru.logger.configure"}
        for file in facts.scripts.training
        for call in (file.calls if b"loguru" in file.source.data else ())
    )


def _logs_by_rank(file: File, facts: Facts) -> bool:
    """Whether a script that was for several ranks says itself what each of them logs."""
    return facts.scripts.was_parallel(file) or facts.scripts.started


RULE = Rule(
    code="BMT046",
    title="one rank logs, the others warn",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import logging
import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
logger = logging.getLogger()
logger.addHandler(logging.FileHandler("train.log"))
optim_manager.backward(model(x).mean())
""",
            """import logging
import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
logger = logging.getLogger()
logger.addHandler(logging.FileHandler("train.log") if bmt.rank() == 0 else logging.StreamHandler())
optim_manager.backward(model(x).mean())
""",
        ),
    ),
)
