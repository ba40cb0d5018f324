"""What becomes of a loader: the loops that its batches go through, and the names that it has on the way there."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, is_backward, walk, walk_own
from rewriter.analyze.training.collectives import Collectives
from rewriter.analyze.training.roles import Var

_PASSED_ON = {
    "enumerate", "iter", "zip", "list", "cycle", "islice", "tqdm", "trange", "chain", "Progbar", "track", "to_device",
    "skip_batches", "skip_first_batches",
}  # fmt: skip
_ENDLESS = ("cycle", "infinite", "inf_", "endless", "shard_loader")
_DEEP = 8
_EVERY = -1  # each place of what holds several
_CALLS = 100
"""Through how many functions, each called by the one before, a backward is looked for."""
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


@dataclass
class Feed:
    """Where a loader's batches go."""

    trained: bool = False
    """Some loop over them calls backward, whatever happens."""
    maybe: bool = False
    """Some loop over them calls backward under a test, or calls what is not known."""
    read: bool = False
    """Some loop goes through them without training on them."""
    lost: bool = False
    """It is handed to what is not known."""
    names: list[str] = field(default_factory=list)
    """Variables, parameters, attributes and keys that hold the loader."""
    loops: set[ast.For] = field(default_factory=set)
    pulled: set[ast.Call] = field(default_factory=set)
    """Where a batch is taken by ``next``."""
    entered: set[ast.AST] = field(default_factory=set)
    """Functions that it is handed to."""
    direct: bool = True
    """No function that is called more than once returns it, so that everything here is said of one loader."""

    @property
    def only_read(self) -> bool:
        """Whether nothing trains on the loader's batches, as far as can be seen."""
        return self.read and not (self.trained or self.maybe or self.lost)


class Feeds:
    """Answers for the loaders of a project."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.project = collectives.project
        self._steps: dict[ast.AST, str] = {}
        self._within = 0
        self._by_name: dict[File, dict[str, list[ast.expr]]] = {}

    def of(self, file: File, loader: ast.expr) -> Feed:
        feed = Feed()
        self._follow(file, loader, None, feed, set(), 0)
        return feed

    def _follow(self, file: File, node: ast.AST, place: int | None, feed: Feed, seen: set[object], deep: int) -> None:
        """Where a value goes; with ``place``, the value is that part of a tuple."""
        if (node, place) in seen or deep > _DEEP * 4:
            return
        seen.add((node, place))
        parent = file.names.parents.get(node)

        def go(to: ast.AST, part: int | None = place) -> None:
            self._follow(file, to, part, feed, seen, deep + 1)

        match parent:
            case ast.Call(args=args) if node in args:
                self._argument(file, parent, args.index(node), None, place, feed, seen, deep)
            case ast.keyword(arg=name):
                call = file.names.parents[parent]
                if name is not None and isinstance(call, ast.Call):
                    feed.names.append(name)
                    self._argument(file, call, None, name, place, feed, seen, deep)
            case ast.Call(func=func) if node is func:
                pass
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                go(parent, elts.index(node) if place is None else place)  # type: ignore[arg-type]
            case ast.IfExp() | ast.Starred() | ast.NamedExpr():
                go(parent)
            case ast.ListComp(elt=elt) | ast.GeneratorExp(elt=elt) if node is elt:
                feed.direct = False
                go(parent, _EVERY)
            case ast.Lambda(body=body) if node is body:
                self._given_by_lambda(file, parent, place, feed, seen, deep)
            case ast.Dict(keys=keys, values=values) if node in values:
                feed.names.append(str(getattr(keys[values.index(node)], "value", "")))
                feed.lost = True
            case ast.Assign(targets=targets):
                for target in targets:
                    self._held(file, target, place, feed, seen, deep)
            case ast.AnnAssign(target=target):
                self._held(file, target, place, feed, seen, deep)
            case ast.withitem(optional_vars=ast.expr() as target):
                self._held(file, target, place, feed, seen, deep)
            case ast.Return() | ast.Yield():
                function = file.names.function_of(node)
                if function is not None:
                    self._returned(file, function, place, feed, seen, deep)
            case ast.For(iter=ast.Tuple(elts=elts) | ast.List(elts=elts), target=target) if node is parent.iter:
                # for loader in (a, b), for name, loader in (("a", a), ("b", b))
                rows = any(isinstance(item, (ast.Tuple, ast.List)) for item in elts)
                self._held(file, target, place if rows else None, feed, seen, deep)
            case ast.For(iter=iterated, body=body) if node is iterated:
                feed.loops.add(parent)
                self._loop(file, body, feed)
            case ast.comprehension(iter=iterated) if node is iterated:
                made = file.names.parents[parent]
                kinds = [self.kind(file, item) for item in walk(made)]
                feed.trained |= "trains" in kinds
                feed.read |= "trains" not in kinds
            case ast.Attribute(value=value) if node is value:
                pass
            case None | ast.stmt() | ast.Compare() | ast.BoolOp() | ast.UnaryOp():
                pass
            case _:
                feed.lost = True

    def _given_by_lambda(
        self, file: File, made: ast.Lambda, place: int | None, feed: Feed, seen: set[object], deep: int
    ) -> None:
        """``make = lambda d: DataLoader(d)``, where it is called; ``map(lambda d: DataLoader(d), sets)``."""
        match file.names.parents[made]:
            case ast.Assign(targets=[target]):
                roles = self.collectives.roles[file]
                variable = roles.var(target)
                calls = [call for call in file.calls if variable is not None and roles.var(call.func) == variable]
                feed.direct &= len(calls) == 1 and not any(_is_repeated(file, call) for call in calls)
                feed.lost |= not calls
                for call in calls:
                    self._follow(file, call, place, feed, seen, deep + 1)
            case ast.Call(func=ast.Name(id="map")) as call:
                feed.direct = False
                self._follow(file, call, _EVERY, feed, seen, deep + 1)
            case _:
                feed.lost = True

    def _argument(
        self,
        file: File,
        call: ast.Call,
        index: int | None,
        name: str | None,
        place: int | None,
        feed: Feed,
        seen: set[object],
        deep: int,
    ) -> None:
        last = (dotted(call.func) or "").split(".")[-1]
        if last == "next":
            feed.pulled.add(call)
            if self._around(file, call):
                feed.trained = True
            elif self.sets_aside(file, call):
                feed.read = True
            else:
                feed.lost = True
            return
        if last in {"len", "print", "isinstance", "hasattr", "getattr", "id", "type"}:
            return
        functions = self.functions(file, call)
        for function in functions:
            listed = function.parameters
            if index is not None:
                parameter = listed[index] if index < len(listed) else None
            else:
                parameter = name if name in {*listed, *(a.arg for a in function.node.args.kwonlyargs)} else None
            if parameter is None:
                feed.lost = True
                continue
            feed.names.append(parameter)
            feed.entered.add(function.node)
            self._uses(function.file, (function.node, parameter), place, feed, seen, deep)
        if not functions:
            if last in _PASSED_ON or last.startswith(_ENDLESS) or last.endswith("Loader"):
                self._follow(file, call, None, feed, seen, deep + 1)
            else:
                feed.lost = True
        elif any(self._gives(function) and self.steps(function) != "trains" for function in functions):
            self._follow(file, call, None, feed, seen, deep + 1)

    @staticmethod
    def _gives(function: FunctionInfo) -> bool:
        """Whether a function is a generator, which hands on what it is given."""
        return any(isinstance(n, (ast.Yield, ast.YieldFrom)) for s in function.node.body for n in walk_own(s))

    def _held(self, file: File, target: ast.AST, place: int | None, feed: Feed, seen: set[object], deep: int) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            if place == _EVERY:
                for item in target.elts:
                    self._held(file, item, None, feed, seen, deep)
            elif place is None or any(isinstance(item, ast.Starred) for item in target.elts):
                feed.lost = True
            elif place < len(target.elts):
                self._held(file, target.elts[place], None, feed, seen, deep)
            return
        variable = self.collectives.roles[file].var(target)
        if variable is None:
            if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                feed.names.append(str(target.slice.value))
            feed.lost = True
            return
        feed.names.append(variable[1].split(".")[-1])
        self._uses(file, variable, place, feed, seen, deep)

    def _uses(self, file: File, variable: Var, place: int | None, feed: Feed, seen: set[object], deep: int) -> None:
        if (variable, place) in seen:
            return
        seen.add((variable, place))
        roles = self.collectives.roles[file]
        for node in self._loads(file).get(variable[1].split(".")[-1], ()):
            if roles.var(node) == variable:
                self._follow(file, node, place, feed, seen, deep + 1)

    def _loads(self, file: File) -> dict[str, list[ast.expr]]:
        if file not in self._by_name:
            table = self._by_name[file] = {}
            for node in file.nodes:
                if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                    name = node.id if isinstance(node, ast.Name) else node.attr
                    table.setdefault(name, []).append(node)
        return self._by_name[file]

    def _returned(
        self, file: File, function: Function, place: int | None, feed: Feed, seen: set[object], deep: int
    ) -> None:
        feed.names.append(function.name)
        calls = list(self.collectives.instances.calls(file, function))
        feed.direct &= len(calls) == 1 and not any(_is_repeated(other, call) for other, call in calls)
        for other, call in calls:
            self._follow(other, call, place, feed, seen, deep + 1)
        if not calls:
            feed.lost = True

    def trains(self, file: File, loop: ast.For) -> bool:
        """Whether what a loop goes through is trained on, perhaps under a test."""
        feed = Feed()
        self._loop(file, loop.body, feed)
        return feed.trained or feed.maybe

    # Loops -----------------------------------------------------------------------------------------------------

    def _loop(self, file: File, body: list[ast.stmt], feed: Feed) -> None:
        kinds: set[str] = set()
        for statement in body:
            for item in walk_own(statement):
                kind = self.kind(file, item)
                if kind == "trains" and self._under_test(file, item, body):
                    kind = "maybe"
                kinds.add(kind)
        if "trains" in kinds:
            feed.trained = True
        elif "maybe" in kinds:
            feed.maybe = True
        elif any(isinstance(n, (ast.Yield, ast.YieldFrom)) for statement in body for n in walk_own(statement)):
            function = file.names.function_of(body[0])
            if function is not None and function not in feed.entered:  # else it is followed from there
                for other, call in self.collectives.instances.calls(file, function):
                    self._follow(other, call, None, feed, set(), _DEEP)
        else:
            feed.read = True

    def kind(self, file: File, node: ast.AST) -> str:
        """``trains`` for a call that runs a backward, ``maybe`` for one that may."""
        if not isinstance(node, ast.Call):
            return ""
        if is_backward(node):
            return "trains"
        functions = self.functions(file, node)
        known = {self.steps(function) for function in functions}
        if known - {""}:
            return "trains" if "trains" in known else "maybe"
        if not functions and isinstance(node.func, ast.Attribute):
            named = self.collectives.instances.named(node.func.attr)
            if any(self.steps(function) for function in named):
                return "maybe"
        return ""

    def _under_test(self, file: File, node: ast.AST, body: list[ast.stmt]) -> bool:
        for parent in file.names.ancestors(node):
            if isinstance(parent, (ast.If, ast.IfExp)) and not _counts(parent.test):
                return True
            if parent in body:
                return False
        return False

    def _around(self, file: File, node: ast.AST) -> bool:
        """Whether a batch is trained on around the place where it is taken."""
        inside: ast.AST | None = None
        for parent in file.names.ancestors(node):
            if isinstance(parent, (ast.For, ast.While)):
                inside = parent
            elif isinstance(parent, Function):
                inside = inside or parent
                break
        if inside is None or self.sets_aside(file, node):
            return False
        return any(self.kind(file, item) == "trains" for item in walk(inside))

    def sets_aside(self, file: File, node: ast.AST) -> bool:
        """Whether a batch is taken in a block of a loop that does not train, and what is made of it stays there."""
        child = node
        for parent in file.names.ancestors(node):
            if isinstance(parent, (ast.For, ast.While, *_DEFINITIONS)):
                return False
            if isinstance(parent, (ast.If, ast.With)) and child in (block := _block_of(parent, child)):
                if any(self.kind(file, item) == "trains" for statement in block for item in walk(statement)):
                    return False
                if isinstance(parent, ast.If) or is_without_gradients(parent):
                    made = {n.id for s in block for n in walk(s) if isinstance(n, ast.Name) and _is_stored(n)}
                    return not made & _read_first(_what_follows(file, parent))
            child = parent
        return False

    def steps(self, function: FunctionInfo) -> str:
        """``trains`` if a function, or one that it calls, calls backward; ``maybe`` if it does so under a test."""
        if function.node not in self._steps and self._within >= _CALLS:
            return "maybe"  # too far to follow
        if function.node not in self._steps:
            self._steps[function.node] = ""
            self._within += 1
            kinds = set()
            for item in (item for statement in function.node.body for item in walk_own(statement)):
                kind = self.kind(function.file, item)
                under = kind and self._under_test(function.file, item, function.node.body)
                kinds.add("maybe" if under else kind)
            self._within -= 1
            self._steps[function.node] = "trains" if "trains" in kinds else "maybe" if "maybe" in kinds else ""
        return self._steps[function.node]

    def functions(self, file: File, call: ast.Call) -> list[FunctionInfo]:
        """The functions of the project that a call runs, as far as is seen."""
        found = self.project.resolve(file, call.func)
        if isinstance(found, FunctionInfo):
            return [found]
        if isinstance(found, ClassInfo):
            method = self.collectives.classes.method(found, "__init__")
            return [method[0].file.function_info(method[1])] if method is not None else []
        if isinstance(call.func, ast.Attribute):
            return self.collectives.instances.methods(file, call.func)
        return []


def _is_repeated(file: File, node: ast.AST) -> bool:
    """Whether a node stands in a loop, or in a function, which may be called more than once."""
    return any(
        isinstance(parent, (ast.For, ast.While, ast.comprehension, ast.Lambda))
        or (isinstance(parent, Function) and parent.name not in {"main", "__init__"})
        for parent in file.names.ancestors(node)
    )


def _counts(test: ast.expr) -> bool:
    """``(i + 1) % n == 0``: a test of when, not of whether."""
    return any(isinstance(item, ast.BinOp) and isinstance(item.op, ast.Mod) for item in walk(test))


def _block_of(statement: ast.If | ast.With, child: ast.AST) -> list[ast.stmt]:
    if isinstance(statement, ast.If) and child in statement.orelse:
        return statement.orelse
    return statement.body


def is_without_gradients(block: ast.With) -> bool:
    names = {(dotted(getattr(i.context_expr, "func", i.context_expr)) or "").split(".")[-1] for i in block.items}
    return bool(names & {"no_grad", "inference_mode"})


def _is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _what_follows(file: File, statement: ast.stmt) -> list[ast.AST]:
    """What runs after a statement, as far as the end of its loop and from the loop's start to the statement."""
    found: list[ast.AST] = []
    child: ast.AST = statement
    for parent in file.names.ancestors(statement):
        if isinstance(child, ast.stmt):
            block = file.names.siblings(child)
            found += block[block.index(child) + 1 :]
        if isinstance(parent, (ast.For, ast.While)):
            start: list[ast.AST] = [parent.target] if isinstance(parent, ast.For) else [parent.test]
            return [*found, *start, *parent.body]
        if isinstance(parent, Function):
            break
        child = parent
    return found


def _read_first(nodes: list[ast.AST]) -> set[str]:
    """The names that are read before they are given a value, where loops run at least once."""
    read: set[str] = set()
    _read(nodes, read, set())
    return read


def _read(nodes: list[ast.AST], read: set[str], given: set[str]) -> None:
    for node in nodes:
        below = [b for name in ("body", "orelse", "finalbody") for b in getattr(node, name, ())]
        if not isinstance(node, ast.stmt) or not below or isinstance(node, (*_DEFINITIONS, ast.Try)):
            names = [item for item in walk(node) if isinstance(item, ast.Name)]
            stored = {name.id for name in names if _is_stored(name)}
            read |= {name.id for name in names if not _is_stored(name)} - given
            read |= stored - given if isinstance(node, ast.AugAssign) else set()
            given |= stored
        elif isinstance(node, ast.If):
            _read([node.test], read, given)
            branches = [set(given), set(given)]
            for branch, held in zip((node.body, node.orelse), branches, strict=True):
                _read([*branch], read, held)
            given |= set.intersection(*branches)
        else:
            head = [child for child in ast.iter_child_nodes(node) if child not in below]
            head.sort(key=lambda child: child is getattr(node, "target", None))  # what is gone through is read first
            _read([*head, *below], read, given)
