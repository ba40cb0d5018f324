"""Folders whose names are made of the clock or of chance: every rank would make one under the name that it sees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo, ModuleRef
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.folders import asks
from rewriter.analyze.training.roles import Var
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.settings import Held, Setting, Settings
from rewriter.analyze.training.varying import State, Varying

_CLOCK = {
    "time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.asctime", "time.strftime",
    "datetime.datetime.now", "datetime.datetime.today", "datetime.datetime.utcnow", "datetime.date.today",
    "uuid.uuid1", "uuid.uuid4", "os.getpid", "secrets.token_hex", "secrets.token_urlsafe", "tempfile.mktemp",
}  # fmt: skip
_IN_TEXT = (ast.Attribute, ast.FormattedValue, ast.JoinedStr, ast.BinOp, ast.Subscript)
_ELSEWHERE = (
    ast.For, ast.While, ast.Try, ast.With, ast.ListComp, ast.GeneratorExp, ast.Lambda, ast.FunctionDef,
    ast.AsyncFunctionDef, ast.ClassDef,
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """A folder named by the time, and how its name becomes rank 0's on all ranks.

    ``wrapped``: what the clock gives, where the script itself asks it; else ``named``, the path, is made equal in front
    of the statement ``where``. ``settings``: it is made of them, and their programs share them. None of these where not
    all ranks are known to come there.
    """

    call: ast.Call
    wrapped: tuple[ast.expr, ...] = ()
    named: ast.expr | None = None
    where: ast.stmt | None = None
    settings: bool = False

    def statements(self, file: File) -> list[ast.stmt]:
        """The statements that need the ranks."""
        found = [file.names.statement_of(item) for item in self.wrapped]
        return [*found, *([self.where] if self.where is not None else [])]


class Moments(Varying):
    """What in a project is made of the clock or of chance."""

    def __init__(self, scripts: Scripts) -> None:
        super().__init__(scripts.collectives)
        self.scripts = scripts
        self.settings = Settings(scripts)
        self._found: dict[File, list[Moment]] = {}
        self._held_in: dict[File, list[Held]] = {}
        self._of_clock: dict[Setting, bool] = {}
        self._of_paths: dict[ast.expr, list[tuple[File, ast.expr]]] = {}
        self._shared_in: dict[File, set[Var]] = {}
        self._imported: dict[File, dict[str, tuple[ast.ImportFrom, str]]] = {}

    def folders(self, file: File) -> list[Moment]:
        """The folders with such names that a file makes."""
        if file not in self._found:
            block = self.scripts.entries.get(file, []) if file in self.scripts.programs else []
            made = any(word in file.source.data for word in (b"mkdir", b"makedirs", b"load(", b"read_csv"))
            self._found[file] = list(self._folders(file, block)) if made else []
        return self._found[file]

    def _folders(self, file: File, block: list[ast.stmt]) -> Iterator[Moment]:
        for call in file.calls:
            path = _made(self.project.external(file, call.func), call)
            sources = self._of_path_given(file, path) if path is not None else []
            if path is None or not sources:
                continue
            settings = [found for other, source in sources if (found := self._setting(other, source)) is not None]
            if settings:
                shared = [self._held(file, setting) for setting in settings]
                whole = len(settings) == len(sources) and all(shared)
                yield Moment(call, settings=whole)
                continue
            if all(other is file and self._is_for_all(file, source, block) for other, source in sources):
                yield Moment(call, tuple(dict.fromkeys(_text(file, source) for _, source in sources)))
            elif self._is_for_all(file, call, block) and dotted(path) is not None:
                yield Moment(call, (), path, _where(file, call))
            elif self._is_for_all(file, call, block):
                yield Moment(call, (path,))
            else:
                yield Moment(call)

    def shared(self, program: File) -> list[Held]:
        """The settings of a program that name such folders, in whatever files, and are not rank 0's yet."""
        if program not in self._held_in:
            found: dict[str, Held] = {}
            files = self.scripts.reach(program) if program in self.scripts.programs else ()
            for file in sorted(files, key=lambda item: item.place):
                for call in file.calls:
                    path = _made(self.project.external(file, call.func), call)
                    if path is None or self.scripts.in_kept_guard(file, call):
                        continue
                    for other, source in self._of_path_given(file, path):
                        setting = self._setting(other, source)
                        held = self.settings.held(program, setting) if setting is not None else None
                        if held is not None:
                            found.setdefault(held.access, held)
            self._held_in[program] = list(found.values())
        return self._held_in[program]

    def _held(self, file: File, setting: Setting) -> bool:
        """Whether every program with a file holds a setting where it can be shared."""
        programs = [program for program in self.scripts.programs if file in self.scripts.reach(program)]
        return bool(programs) and all(self.settings.held(program, setting) is not None for program in programs)

    def _setting(self, file: File, node: ast.AST) -> Setting | None:
        """The setting that a node reads, where it is made of the clock by default and is not rank 0's already."""
        setting = self.settings.read(file, node)
        if setting is None:
            return None
        if setting not in self._of_clock:
            self._of_clock[setting] = False
            defaults = self.settings.defaults(setting)
            made = any(self.sources(other, value) for other, value in defaults)
            self._of_clock[setting] = made and not self._is_shared(setting)
        return setting if self._of_clock[setting] else None

    def _is_shared(self, setting: Setting) -> bool:
        """Whether a program makes a setting rank 0's: ``args.out = bmt.store.broadcast_object(args.out)``."""
        for file in self.scripts.programs if self.scripts.started else ():
            for node in file.nodes:
                match node:
                    case ast.Assign(targets=[target], value=ast.Call(func=func)):
                        given = self.settings.read(file, target)
                        if given is not None and given.name == setting.name:
                            if self.project.external(file, func) == "bmtrain.store.broadcast_object":
                                return True
        return False

    def _is_for_all(self, file: File, node: ast.AST, block: list[ast.stmt]) -> bool:
        """Whether all ranks come to a place: it stands where the script starts, in no loop, under tests of options."""
        for parent in file.names.ancestors(node):
            if isinstance(parent, _ELSEWHERE):
                return False
            if isinstance(parent, (ast.If, ast.IfExp)) and "rank" in ast.unparse(parent.test).lower():
                return False
            if isinstance(parent, ast.stmt) and any(parent is statement for statement in block):
                return True
        return False

    def sources(self, file: File, node: ast.expr) -> list[tuple[File, ast.expr]]:
        """The calls of the clock that a value is made of, and what reads settings that are so by default."""
        start: State = (file, node, False, None)
        seen, stack, found = {start}, [start], list[tuple[File, ast.expr]]()
        while stack:
            current = stack.pop()
            if isinstance(current[1], ast.expr) and self._is_source(*current[:3]):
                found.append((current[0], current[1]))
                continue
            for following in self._made_of(*current):
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
        return sorted(found, key=lambda item: item[1].lineno)

    def _of_path_given(self, file: File, path: ast.expr) -> list[tuple[File, ast.expr]]:
        """``sources`` of a path that a call is given, sought once: many programs may reach it."""
        if path not in self._of_paths:
            self._of_paths[path] = self.sources(file, path)
        return self._of_paths[path]

    def _is_source(self, file: File, node: ast.AST | Var, only_none: bool) -> bool:
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not only_none:
            return self._setting(file, node) is not None
        if not isinstance(node, ast.Call) or only_none:
            return False
        name = self.project.external(file, node.func)
        return name in _CLOCK and not (name in {"time.strftime", "time.asctime"} and len(node.args) > 1)

    def _tests_above(self, file: File, statement: ast.AST) -> Iterator[State]:
        return iter(())  # which of two names is taken is the options' choice

    def _of_path(self, file: File, node: ast.Name | ast.Attribute, only_none: bool, key: object) -> Iterator[State]:
        if self.roles[file].var(node) in self._shared(file):
            return
        yield from super()._of_path(file, node, only_none, key)
        other, name = self._elsewhere(file, node)
        if other is not None:
            yield other, (other.names.module.node, name), only_none, key

    def _of_argument(self, file: File, scope: ast.AST, name: str, only_none: bool, key: object) -> Iterator[State]:
        yield from super()._of_argument(file, scope, name, only_none, key)
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = scope.args
            listed = [*given.posonlyargs, *given.args]
            pairs = [*zip(reversed(listed), reversed(given.defaults), strict=False)]
            for argument, value in (*pairs, *zip(given.kwonlyargs, given.kw_defaults, strict=False)):
                if argument.arg == name and value is not None:
                    yield file, value, only_none, key

    def _shared(self, file: File) -> set[Var]:
        """Variables that are rank 0's already: ``run = bmt.store.broadcast_object(run)``."""
        if file not in self._shared_in:
            self._shared_in[file] = {
                variable
                for variable, value, _, _ in self.roles[file].assignments
                if isinstance(value, ast.Call)
                and self.project.external(file, value.func) == "bmtrain.store.broadcast_object"
            }
        return self._shared_in[file]

    def _elsewhere(self, file: File, node: ast.Name | ast.Attribute) -> tuple[File | None, str]:
        """Where ``settings.NOW``, or a name that is imported, is given its value."""
        if isinstance(node, ast.Attribute):
            owner = self.project.resolve(file, node.value)
            return (owner.file, node.attr) if isinstance(owner, ModuleRef) else (None, "")
        found = self._names_imported(file).get(node.id)
        if found is None or isinstance(
            self.project.resolve(file, node), (ClassInfo, FunctionInfo, External, ModuleRef)
        ):
            return None, ""
        statement, name = found
        return self.project.find_module(statement.module or "", file, statement.level), name

    def _names_imported(self, file: File) -> dict[str, tuple[ast.ImportFrom, str]]:
        """The statements that import names from modules, and what the names are there."""
        if file not in self._imported:
            statements = [node for node in file.nodes if isinstance(node, ast.ImportFrom)]
            self._imported[file] = {
                alias.asname or alias.name: (node, alias.name) for node in reversed(statements) for alias in node.names
            }
        return self._imported[file]


def _made(name: str, call: ast.Call) -> ast.expr | None:
    """The path of a folder that a call makes, or of a file that one rank may have written and all read."""
    if name in {"os.makedirs", "os.mkdir", "torch.load", "numpy.load", "pandas.read_csv"}:
        return call.args[0] if call.args else None
    if isinstance(call.func, ast.Attribute) and call.func.attr == "mkdir" and not name and not call.args:
        return call.func.value
    return None


def _text(file: File, source: ast.expr) -> ast.expr:
    """The text that is made of a time: ``datetime.now().strftime("%H")``, ``f"{now()}"``, ``"run-" + str(now())``."""
    node, parents = source, file.names.parents
    while True:
        parent = parents[node]
        called = isinstance(parent, ast.Call) and (parent.func is node or node in parent.args)
        if not isinstance(parent, ast.expr) or not (called or isinstance(parent, _IN_TEXT)):
            return node
        makes = isinstance(parent, ast.Call) and (dotted(parent.func) or "").split(".")[-1] in {"mkdir", "makedirs"}
        if makes or (isinstance(parent, ast.Attribute) and parent.attr == "mkdir"):
            return node
        node = parent


def _where(file: File, call: ast.Call) -> ast.stmt:
    """The statement that makes a folder, or the test above it of whether it is there."""
    statement = file.names.statement_of(call)
    for parent in file.names.ancestors(call):
        if isinstance(parent, ast.If) and asks(parent.test):
            return parent
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            break
    return statement


def contains(statement: ast.stmt, inner: list[ast.stmt]) -> bool:
    """Whether one of the statements is, or stands in, another."""
    return any(item is found for found in inner for item in walk(statement))
