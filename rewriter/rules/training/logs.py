"""One rank logs, the others warn.

What: the level of a logger, handler or ``basicConfig`` is ``logging.WARNING`` on all ranks but one, however it is
written, and so are those of loguru's sinks, structlog, absl and coloredlogs. A log file of ``logging`` or loguru is one
rank's: on the others ``basicConfig(filename=...)`` and ``FileHandler`` write warnings to stderr, or to ``os.devnull``
where a handler of the script prints them already. One rank configures ``logging`` by ``dictConfig`` or ``fileConfig``;
of the sinks that ``configure`` gives loguru the others have one for warnings. What loguru and structlog print without a
line that says so is made one rank's where the script starts. A ``Console`` of rich is quiet on the others.
Why: each line would be there once for every rank, and a file that all ranks write is torn; what goes wrong on one rank
alone is to be seen.
Refuses when: only one rank reaches the call; the script was for several ranks and says itself what each of them logs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.training.default_sinks import STRUCTLOG_SETTINGS, sinks_given
from rewriter.analyze.training.writers import CONFIGURED_ONCE, LOG_FILES, log_file
from rewriter.changes import Arguments, Change, insert_behind, template, wrap
from rewriter.rules.imports import imports
from rewriter.rules.one_rank import written_once
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_HINTS = (b"logging", b"setLevel", b"loguru", b"structlog", b"coloredlogs", b"Console")
_HIGH = {"WARNING", "WARN", "ERROR", "CRITICAL", "FATAL"}
_WARNING = 30
_HANDLER = re.compile(r"(^|\.)[A-Z]\w*Handler$")
_CONSOLE = "rich.console.Console"
_MESSAGE = "one rank logs, the others warn"
_WARNINGS = '[{"sink": sys.stderr, "level": "WARNING"}]'
_FILTER = "structlog.make_filtering_bound_logger"


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or not any(hint in file.source.data for hint in _HINTS):
        return
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
        elif name == "loguru.logger.configure":
            yield from _sinks(file, facts, call)
        elif name in STRUCTLOG_SETTINGS | {_FILTER, "structlog.wrap_logger", "structlog.stdlib.recreate_defaults"}:
            yield from _structlog(file, facts, call, name)
        else:
            yield from _level(file, facts, call, name, path)


def _sinks(file: File, facts: Facts, call: ast.Call) -> Iterator[Finding]:
    """``logger.configure(handlers=[...])``: other ranks have a sink for warnings; the rest of it is for all."""
    given = sinks_given(call)
    if given is None or _asks_rank(file, facts, given.value) or not file.source.is_exact(given.value):
        return
    text = f"{{it}} if {{bmt}}.rank() == 0 else {_WARNINGS}"
    if given.arg is None:
        text = f'{{**{{it}}, **({{}} if {{bmt}}.rank() == 0 else {{"handlers": {_WARNINGS}}})}}'
    yield Conversion(RULE.code, call.lineno, _MESSAGE, (*imports(file, "sys"), wrap(given.value, text)))


def _structlog(file: File, facts: Facts, call: ast.Call, name: str) -> Iterator[Finding]:
    """A logger of structlog leaves out all but warnings, on other ranks; of ``logging``'s, their levels do so."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    only = "{bmt}.rank() == 0 else logging.WARNING"
    changes: tuple[Change, ...]
    if name in {_FILTER, "structlog.stdlib.recreate_defaults"}:
        level = next((named[key] for key in ("min_level", "log_level") if key in named), None)
        level = call.args[0] if level is None and call.args else level
        if level is None:
            if None in named or name == _FILTER:
                return
            changes = (Arguments(call, added=(template(f"log_level=logging.NOTSET if {only}"),)),)
        elif isinstance(level, ast.Starred) or _is_high(file, facts, level) or not file.source.is_exact(level):
            return
        else:
            changes = (wrap(level, f"{{it}} if {only}"),)
        yield Conversion(RULE.code, call.lineno, _MESSAGE, (*imports(file, "logging"), *changes))
        return
    at = 2 if name == "structlog.wrap_logger" else 1
    made = named.get("wrapper_class", call.args[at] if len(call.args) > at else None)
    factory = named.get("logger_factory")
    if factory is not None and _mentions(file, facts, factory, "structlog.stdlib.LoggerFactory"):
        return
    filtered = f"{_FILTER}(logging.WARNING)"
    if made is not None:
        if _mentions(file, facts, made, _FILTER) or not file.source.is_exact(made):
            return
        changes = (wrap(made, f"{{it}} if {{bmt}}.rank() == 0 else {filtered}"),)
    elif None in named or len(call.args) > at:
        statement = file.names.statement_of(call)
        if not isinstance(statement, ast.Expr) or _follows(file, statement):
            return
        lines = ("if {bmt}.rank() != 0:", f"    structlog.configure(wrapper_class={filtered})")
        changes = (insert_behind(statement, *lines),)
    elif name == "structlog.wrap_logger":
        return  # the one that is configured
    else:
        added = f"wrapper_class={_FILTER}(logging.NOTSET if {only})"
        changes = (Arguments(call, added=(template(added),)),)
    yield Conversion(RULE.code, call.lineno, _MESSAGE, (*imports(file, "logging", "structlog"), *changes))


def _follows(file: File, statement: ast.stmt) -> bool:
    """Whether what is inserted behind a statement is there."""
    block = file.names.siblings(statement)
    match block[block.index(statement) + 1 : block.index(statement) + 2]:
        case [ast.If(body=[ast.Expr(value=ast.Call() as call)])]:
            return (dotted(call.func) or "") == "structlog.configure"
    return False


def _mentions(file: File, facts: Facts, node: ast.expr, wanted: str) -> bool:
    """Whether an expression, or what its name holds, has something of another package in it."""
    held = [node, *(file.names.values_of(node) if isinstance(node, ast.Name) else ())]
    return any(
        facts.project.external(file, item) == wanted
        for value in held
        for item in ast.walk(value)
        if isinstance(item, (ast.Name, ast.Attribute))
    )


def _asks_rank(file: File, facts: Facts, node: ast.expr) -> bool:
    return any(
        facts.project.external(file, item.func) == "bmtrain.rank"
        for item in ast.walk(node)
        if isinstance(item, ast.Call)
    )


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
    if (chosen := _chosen(file, call)) is not None and _asks_rank(file, facts, chosen):
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
