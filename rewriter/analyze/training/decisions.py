"""Tests that decide whether a rank makes a call that all ranks must make, and whether ranks may answer differently."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from rewriter.analyze.read.file import ClassInfo, File
from rewriter.analyze.read.nodes import dotted, item_of, names_in, walk_own
from rewriter.analyze.training.caught import EXITS, Caught, caught_names, leaves
from rewriter.analyze.training.collectives import as_guard, asks_for_launcher, is_other_rank_test, is_rank_test
from rewriter.analyze.training.folders import fails_if_there, is_asked_for
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.shares import Place, Share, loop_over
from rewriter.analyze.training.truths import Truths
from rewriter.analyze.training.varying import Varying, of_rank, strides_by_rank
from rewriter.analyze.training.writers import is_open_file, opens_for_writing

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_PLAIN = (
    ast.Name, ast.Attribute, ast.Constant, ast.JoinedStr, ast.FormattedValue, ast.BinOp, ast.operator, ast.expr_context,
    ast.Subscript,
)  # fmt: skip
_OF_PATHS = {"join", "Path", "str", "fspath", "expanduser", "abspath"}
_OF_FILES = {"OSError", "IOError", "FileNotFoundError", "EnvironmentError"}
_READS = {"open", "torch.load", "numpy.load", "pickle.load", "json.load"}
_MAKING = {"torch.nn.parallel.DistributedDataParallel", "torch.nn.DataParallel", "torch.compile"}
_TRAINED = {"parameters", "named_parameters"}
_NO_CALLS_OF_ALL = (
    "bmtrain.optim.", "bmtrain.lr_scheduler.", "bmtrain.shard_", "bmtrain.print_", "bmtrain.compile", "bmtrain.config",
    "bmtrain.init_distributed", "bmtrain.see_memory", "bmtrain.nn.", "bmtrain.utils.", "bmtrain.loss.",
)  # fmt: skip
Decider = ast.If | ast.While | ast.IfExp | ast.BoolOp | ast.For | ast.AsyncFor | ast.Try | ast.With


@dataclass(eq=False)
class Decision:
    """``node`` decides whether ``call`` is made; ``jumps`` if a jump under it leads past the call."""

    node: Decider
    call: ast.expr | ast.stmt
    jumps: bool = False


@dataclass(eq=False)
class Verdict:
    """What is to be made equal under one decision, or why the file cannot be converted."""

    decision: Decision
    tests: list[ast.expr] = field(default_factory=list)
    shares: dict[ast.expr, Share] = field(default_factory=dict)
    """Totals and means in tests of a batch, which are to be the whole batch's."""
    joined: dict[ast.expr, str] = field(default_factory=dict)
    """Tests that hold for a batch if they hold on ``all`` ranks, or on ``any``."""
    unjoined: ast.expr | None = None
    """A test of a rank's share of the batch that rank 0 alone decides."""
    listed: list[ast.expr] = field(default_factory=list)
    missed: list[ast.expr] = field(default_factory=list)
    """Paths of files that are read where one that is not there is caught: all ranks are to find it, or none."""
    raised: list[ast.ExceptHandler] = field(default_factory=list)
    """Handlers in which a rank would go on alone: with more ranks than one, errors are to pass them."""
    interrupted: ast.stmt | None = None
    """What is for all ranks behind an interruption, which each of them meets elsewhere."""
    reason: str = ""
    as_before: bool = False
    """Whether the ranks of the unconverted script differ here, too."""


class Decisions:
    """Answers for all files of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts
        self.collectives = scripts.collectives
        self.project = scripts.project
        self.caught = Caught(scripts)
        self.truths = Truths(scripts.project)
        self._found: dict[File, dict[Decider, Decision]] = {}
        self._for_all_of: dict[File, dict[ast.expr | ast.stmt, None]] = {}

    @cached_property
    def varying(self) -> Varying:
        """What varies, given that all decisions of the project are made equal."""
        found = Varying(self.collectives)
        for file in self.scripts.training:
            found.settled.update(self.of(file))
        return found

    def verdicts(self, file: File) -> Iterator[Verdict]:
        """The decisions of a file on which ranks may differ."""
        for decision in self.of(file).values():
            verdict = self._judge(file, decision)
            found = (verdict.tests, verdict.shares, verdict.joined, verdict.listed, verdict.raised, verdict.missed)
            if verdict.reason or verdict.interrupted is not None or any(found):
                yield verdict

    # Finding ---------------------------------------------------------------------------------------------------

    def of(self, file: File) -> dict[Decider, Decision]:
        if file not in self._found:
            found: dict[Decider, Decision] = {}
            last: dict[ast.AST, ast.expr | ast.stmt] = {}
            self._for_all_of[file] = dict.fromkeys(self._for_all(file))
            for call in self._for_all_of[file]:
                for decision in self._above(file, call):
                    found.setdefault(decision.node, decision)
                for parent in file.names.ancestors(call):
                    if isinstance(parent, (*_FUNCTIONS, *_LOOPS)):
                        if parent not in last or last[parent].lineno < call.lineno:
                            last[parent] = call
                    if isinstance(parent, _FUNCTIONS):
                        break
                else:
                    last[file.tree] = call
            if last:
                for decision in self._jumps(file, last):
                    found.setdefault(decision.node, decision)
            self._found[file] = found
        return self._found[file]

    def _for_all(self, file: File) -> Iterator[ast.expr | ast.stmt]:
        """What all ranks must do, in source order, but what one rank alone reaches and what models do inside."""
        gathered = {node for node in self.collectives.values(file).gathered if isinstance(node, ast.stmt)}
        models = self._models_made(file)
        for node in file.nodes:
            reading = isinstance(node, ast.expr) and node in self.collectives.readings(file)
            if reading or node in gathered or (isinstance(node, ast.Call) and self._is_for_all(file, node, models)):
                assert isinstance(node, (ast.expr, ast.stmt))
                if not self._is_inside_a_model(file, node) and not self.scripts.in_kept_guard(file, node):
                    yield node

    def _models_made(self, file: File) -> set[ast.expr]:
        roles = self.scripts.roles[file]
        trained = {v for v, methods in roles.methods_called.items() if methods & _TRAINED and v in roles.models}
        return {value for variable, value, _, part in roles.assignments if variable in trained and not part}

    def _is_for_all(self, file: File, call: ast.Call, models: set[ast.expr]) -> bool:
        name = self.project.external(file, call.func)
        if name.startswith(_NO_CALLS_OF_ALL) or name in _MAKING:
            return False
        if name == "torch.save" or name == "torch.nn.utils.clip_grad_norm_" or name == "torch.distributed.barrier":
            return True
        roles = self.scripts.roles[file]
        if isinstance(call.func, ast.Attribute) and call.func.attr in {"step", "unscale_"}:
            if roles.var(call.func.value) in roles.scalers:
                return True
        if call in models and not (isinstance(call.func, ast.Attribute) and roles.is_model(call.func.value)):
            return True
        if fails_if_there(file, self.project, call) and not is_asked_for(file, call):
            return file in self.scripts.programs
        found = self.project.resolve(file, call.func)
        if isinstance(found, ClassInfo) and self.collectives.classes.kind(found) in {"module", "distributed"}:
            return True
        return self.collectives.is_collective(file, call)

    def _is_inside_a_model(self, file: File, node: ast.AST) -> bool:
        owner = file.names.class_of(node)
        if owner is None or not self.collectives.classes.is_module(file.class_info(owner)):
            return False
        function = file.names.function_of(node)
        return function is None or not any(
            isinstance(item, ast.Attribute) and item.attr == "backward"
            for statement in function.body
            for item in walk_own(statement)
        )

    def _above(self, file: File, call: ast.expr | ast.stmt) -> Iterator[Decision]:
        """What decides whether a call is made, in its function."""
        child: ast.AST = call
        for parent in file.names.ancestors(call):
            if isinstance(parent, _FUNCTIONS):
                return
            match parent:
                case ast.If(test=test) | ast.IfExp(test=test) if child is not test:
                    yield Decision(parent, call)
                case ast.While():
                    yield Decision(parent, call)
                case ast.BoolOp(values=values) if child is not values[0]:
                    yield Decision(parent, call)
                case ast.For(iter=iterated) | ast.AsyncFor(iter=iterated) if child is not iterated:
                    yield Decision(parent, call)
                case ast.Try() | ast.With():
                    yield Decision(parent, call)
            child = parent

    def _jumps(self, file: File, last: dict[ast.AST, ast.expr | ast.stmt]) -> Iterator[Decision]:
        """Tests under which a ``continue``, ``break``, ``return`` or an exit leads past a call that is for all."""
        for node in file.nodes:
            leaves = isinstance(node, ast.Return) or (isinstance(node, ast.Call) and (dotted(node.func) or "") in EXITS)
            leaves = leaves or (isinstance(node, ast.Raise) and self._ends(file, node))
            if not leaves and not isinstance(node, (ast.Break, ast.Continue)):
                continue
            above: list[ast.If | ast.While] = []
            child: ast.AST = node
            for parent in file.names.ancestors(node):
                if isinstance(parent, _LOOPS) and any(child is item for item in parent.body):
                    reached = last.get(parent)
                    if reached is not None and (not isinstance(node, ast.Continue) or reached.lineno > _line(node)):
                        yield from (Decision(test, reached, jumps=True) for test in above)
                        above = []
                    if not leaves:
                        break
                if isinstance(parent, _FUNCTIONS) or parent is file.tree:
                    reached = last.get(parent)
                    if reached is not None and reached.lineno > _line(node):
                        yield from (Decision(test, reached, jumps=True) for test in above)
                    break
                if isinstance(parent, (ast.If, ast.While)) and child is not parent.test:
                    above.append(parent)
                child = parent

    def _ends(self, file: File, node: ast.Raise) -> bool:
        """``raise SystemExit``, ``raise StopTraining()`` of the project: what is raised to leave, and no mistake."""
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        if raised is None:
            return False
        return dotted(raised) in {"SystemExit", "KeyboardInterrupt"} or isinstance(
            self.project.resolve(file, raised), ClassInfo
        )

    # Judging ---------------------------------------------------------------------------------------------------

    def _judge(self, file: File, decision: Decision) -> Verdict:
        verdict = Verdict(decision)
        match decision.node:
            case ast.If() as node if (lifted := self.scripts.lifted_exits(file).get(node)) is not None:
                for operand in lifted.rest:
                    self._judge_test(file, operand, verdict)
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                if isinstance(decision.node, ast.If) and as_guard(file, decision.node) is not None:
                    self._judge_guard(file, decision, verdict)
                else:
                    self._judge_test(file, test, verdict)
            case ast.BoolOp(values=values):
                for value in values[:-1]:
                    self._judge_test(file, value, verdict)
                if verdict.tests and not _is_only_tested(file, decision.node):
                    verdict.reason = "it follows an `and` or `or` whose value is used: write it as an if"
            case ast.For(iter=iterated) | ast.AsyncFor(iter=iterated):
                if strides_by_rank(file, iterated):
                    verdict.reason = "each rank goes through a share of its own, which may be longer than another's"
                else:
                    verdict.listed = list(self._listed(file, iterated))
            case ast.Try() as node:
                self._judge_caught(file, node, verdict)
            case ast.With() as node if self.caught.suppressed(file, node):
                verdict.reason = "a rank that passes over an error goes on alone"
        return verdict

    def _judge_guard(self, file: File, decision: Decision, verdict: Verdict) -> None:
        assert isinstance(decision.node, ast.If)
        guard = as_guard(file, decision.node)
        assert guard is not None
        if decision.node in self.scripts.opened_guards(file):
            for operand in guard.rest:
                self._judge_test(file, operand, verdict)
        elif decision.jumps and not decision.node.orelse:
            verdict.reason = "one rank alone leaves here"
            verdict.as_before = self.scripts.was_parallel(file)

    def _judge_test(self, file: File, test: ast.expr, verdict: Verdict) -> None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self._judge_test(file, test.operand, verdict)
        elif isinstance(test, ast.BoolOp):
            for value in test.values:
                self._judge_test(file, value, verdict)
        elif is_rank_test(file, test) or asks_for_launcher(file, test):
            return
        elif is_other_rank_test(file, test):
            if not self._is_barrier(file, verdict.decision.call):
                verdict.reason = verdict.reason or "every rank but one comes here"
                verdict.as_before = self.scripts.was_parallel(file)
        elif of_rank(file, test):
            verdict.reason = verdict.reason or "every rank has another answer here"
        elif (place := self._share_asked(file, test)) is not None:
            self._judge_share(file, test, place, verdict)
        elif self.varying.varies(file, test):
            self._judge_made(file, test, verdict)

    def _is_barrier(self, file: File, call: ast.expr | ast.stmt) -> bool:
        """Whether it is a barrier, which scripts pair up: ``if rank != 0: dist.barrier()``."""
        name = self.project.external(file, call.func) if isinstance(call, ast.Call) else ""
        return name in {"torch.distributed.barrier", "bmtrain.synchronize"}

    def _listed(self, file: File, iterated: ast.expr) -> Iterator[ast.expr]:
        """The list of files, or other list that may differ, that a loop goes through."""
        if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name):
            if iterated.func.id in {"enumerate", "tqdm", "zip", "reversed", "trange"}:
                for argument in iterated.args:
                    yield from self._listed(file, argument)
                return
            if iterated.func.id == "range":
                return
        if self.varying.lists(file, iterated):
            yield iterated

    def _judge_caught(self, file: File, node: ast.Try, verdict: Verdict) -> None:
        """An error that one rank alone catches would leave the others waiting."""
        if any(caught_names(handler) & _OF_FILES and not leaves(handler.body) for handler in node.handlers):
            paths = [path for s in node.body for item in walk_own(s) for path in self._read_at(file, item)]
            if all(path is not None and _is_plain(path) for path in paths):
                verdict.missed = [path for path in paths if path is not None and not _is_agreed(file, node, path)]
            else:
                verdict.reason = (
                    "a rank that does not find the file goes on alone: test bmt.agree(os.path.exists(...)) instead"
                )
        for_all = self._for_all_of[file]
        verdict.raised = list(self.caught.alone(file, node, for_all))
        verdict.interrupted = self.caught.interrupted(file, node, for_all)

    def _read_at(self, file: File, item: ast.AST) -> Iterator[ast.expr | None]:
        """The path that a call reads a file at; None where that is not seen."""
        if not isinstance(item, ast.Call):
            return
        name = self.project.external(file, item.func) or dotted(item.func) or ""
        if name not in _READS or (item.args and is_open_file(file, item.args[0])):
            return
        yield item.args[0] if item.args and not opens_for_writing(item) else None

    # Batches ---------------------------------------------------------------------------------------------------

    def _share_asked(self, file: File, test: ast.expr) -> Place | None:
        """The loop or function whose batch a test asks for the size or the values of."""
        if self.scripts.started or _is_of_kind(test):
            return None
        handed = self.scripts.handed
        place = handed.around(file, test)
        if place is None or not handed.asks(file, place, test):
            return None
        if handed.of(file)[place].known or self.scripts.shares_data(file):
            return place
        # Nothing shares out the data yet; that the user is asked to will make this a test of a share.
        direct = isinstance(place, ast.For) and names_in(test) & names_in(item_of(place, file.names.values_of))
        return place if direct else None

    def _judge_made(self, file: File, test: ast.expr, verdict: Verdict) -> None:
        """What a model or a loss makes of a batch is each rank's own; else ranks differ by what is no matter."""
        handed = self.scripts.handed
        place = None if self.scripts.started or _is_of_kind(test) else self._place_of(file, test)
        kinds = handed.kinds(file, place) if place is not None else None
        if place is None or kinds is None or not kinds.of_batch(test):
            verdict.tests.append(test)
        elif truth := self.truths.of(file, kinds, test):
            verdict.joined[test] = truth
        elif self.scripts.was_parallel(file):
            verdict.tests.append(test)
        elif not self._is_made_whole(file, test, place, verdict):
            verdict.tests.append(test)
            verdict.unjoined = test

    def _place_of(self, file: File, test: ast.expr) -> Place | None:
        """The loop or function that a test stands in, or the loop whose last batch left what it asks for."""
        handed, asked = self.scripts.handed, names_in(test)
        if (place := handed.around(file, test)) is not None:
            return place
        for place in handed.of(file):
            if isinstance(place, (ast.For, ast.While)) and asked & handed.kinds(file, place).made.keys():
                here = file.names.function_of(place) is file.names.function_of(test)
                end = place.end_lineno or 0
                assigned = self.scripts.roles[file].assignments
                again = any(v[1] in asked and statement.lineno > end for v, _, statement, _ in assigned)
                if here and not again and handed.kinds(file, place).of_batch(test):
                    return place
        return None

    def _is_made_whole(self, file: File, test: ast.expr, place: Place, verdict: Verdict) -> bool:
        """Whether a test is of totals and means alone, which become the batch's."""
        handed = self.scripts.handed
        kinds, known = handed.kinds(file, place), handed.of(file)[place].known
        parts = kinds.whole(test)
        loader = None if known or not isinstance(place, ast.For) else loop_over(place)
        if not parts or not kinds.comes_once(verdict.decision.node):
            return False
        if not known and (loader is None or not self.scripts.shares_data(file)):
            return False
        verdict.shares |= {part: Share(kind, loader) for part, kind in parts}
        return True

    def _judge_share(self, file: File, test: ast.expr, place: Place, verdict: Verdict) -> None:
        """Every rank sees its share of the batch."""
        kinds = self.scripts.handed.kinds(file, place)
        if self.scripts.was_parallel(file):
            parts = kinds.whole(test)
            if parts and all(kinds.is_size(part) for part, _ in parts):
                verdict.tests.append(test)  # its samplers give all ranks as many
                return
        elif self._is_made_whole(file, test, place, verdict):
            return
        if (truth := self.truths.of(file, kinds, test)) and kinds.comes_once(verdict.decision.node):
            verdict.joined[test] = truth
            return
        verdict.reason = verdict.reason or "a rank sees its share of the batch only, and this test is of the batch"


def _is_only_tested(file: File, node: ast.expr) -> bool:
    """Whether only the truth of an expression matters."""
    child: ast.AST = node
    for parent in file.names.ancestors(node):
        if isinstance(parent, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            return child is parent.test
        if isinstance(parent, ast.Expr):
            return True
        if not isinstance(parent, ast.BoolOp) and not (
            isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)
        ):
            return False
        child = parent
    return False


def _is_plain(path: ast.expr) -> bool:
    """Whether a path may be computed twice."""
    return all(
        isinstance(item, _PLAIN)
        or (isinstance(item, ast.Call) and (dotted(item.func) or "").split(".")[-1] in _OF_PATHS)
        for item in ast.walk(path)
    )


def _is_agreed(file: File, node: ast.Try, path: ast.expr) -> bool:
    """Whether ``if not bmt.agree(os.path.exists(path)): raise`` stands in front, in the block that is tried."""
    wanted = f"agree(os.path.exists({ast.unparse(path)}))"
    return any(
        isinstance(item, ast.If) and wanted in ast.unparse(item.test) and isinstance(item.body[0], ast.Raise)
        for statement in node.body
        for item in walk_own(statement)
    )


def _is_of_kind(test: ast.expr) -> bool:
    """Whether a test asks what is there at all, and not for values or sizes."""
    match test:
        case ast.Compare(ops=[ast.In() | ast.NotIn() | ast.Is() | ast.IsNot()]):
            return True
        case ast.Call(func=ast.Name(id="isinstance" | "hasattr" | "callable")):
            return True
    return False


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)
