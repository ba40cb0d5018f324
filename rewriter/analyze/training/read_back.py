"""Files that one rank writes before all ranks read them, or look into their folder, and where the ranks are to wait."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import Function, dotted, walk, walk_own
from rewriter.analyze.training.decisions import Decisions
from rewriter.analyze.training.reached import Reached
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.writers import COMMANDS, MADE_ONCE, opens_for_writing, runs_command, takes_path

_READERS = {
    "torch.load", "numpy.load", "numpy.loadtxt", "numpy.genfromtxt", "numpy.memmap", "numpy.fromfile",
    "pandas.read_csv", "pandas.read_pickle", "pandas.read_parquet", "pandas.read_json", "pandas.read_feather",
    "pandas.read_excel", "safetensors.torch.load_file", "joblib.load", "torchaudio.load", "datasets.load_from_disk",
    "PIL.Image.open",
}  # fmt: skip
_RUNNING = {"subprocess.check_output", "subprocess.getoutput", "subprocess.Popen", "os.popen"}
_READING_METHODS = {"read_text", "read_bytes"}
_LOADING_METHODS = {"from_pretrained", "load_from_disk", "from_file"}
"""Methods of classes that read the file or folder they are given."""
_SAVERS = {"numpy.save": 0, "numpy.savez": 0, "numpy.savetxt": 0, "torchaudio.save": 0}
_SAVERS_BEHIND = {
    "torch.save", "joblib.dump", "safetensors.torch.save_file", "shutil.copy", "shutil.copyfile", "shutil.move",
    "shutil.copytree", "os.rename", "os.replace", "torchvision.utils.save_image",
}  # fmt: skip
"""Calls whose second argument is what they write."""
_WRITING_METHODS = {"write_text", "write_bytes"}
_SAVING_METHODS = {
    "to_csv", "to_parquet", "to_pickle", "to_json", "to_feather", "to_excel", "save_pretrained", "save_to_disk",
}  # fmt: skip
_BARRIERS = {"barrier", "synchronize", "wait_for_everyone", "agree", "rank_0_first", "broadcast_object"}
_LISTING = {"os.listdir", "os.scandir", "os.walk", "os.chdir", "glob.glob", "glob.iglob"}
_ASKING = {"os.path.isdir", "os.path.exists"}
_LISTING_METHODS = {"iterdir", "glob", "rglob"}
_FOLDERS = {"log_dir", "logdir", "repo", "dir"}
"""Names under which writers of logs are given a folder."""
_AS_PATH = {"str", "Path", "fspath"}
_LEAVES = (ast.Return, ast.Continue, ast.Break)
_DEEP = 2

Key = tuple[ast.AST | None, str]
"""How a path is spelled; with the scope of its name where it is only known as a name."""
Place = tuple[File, ast.expr, Key]
"""A node that writes or reads a file, or a call of the function that does."""


@dataclass(frozen=True)
class Race:
    """A file that one rank writes and ``call`` reads on all.

    Ranks are to wait ``behind`` a statement of ``where``, or in ``front`` of one; or rank 0 answers ``test`` for all.
    ``reached`` says whether all ranks are known to come there.
    """

    file: File
    call: ast.expr
    where: File
    behind: ast.stmt | None = None
    front: ast.stmt | None = None
    test: ast.If | None = None
    reached: bool = False


class ReadBack:
    """Answers for all files of a project."""

    def __init__(self, scripts: Scripts, decisions: Decisions) -> None:
        self.scripts = scripts
        self.project = scripts.project
        self.decisions = decisions
        self.reached = Reached(scripts, decisions)

    def races(self, file: File, node: ast.AST) -> list[Race]:
        """Where ranks may read what a statement, or a call that opens a file, writes: too early, or while it does."""
        found: list[Race] = []
        for call, path in self._written(file, node):
            for place in self._levels(file, call, path):
                readers = self._reads.get(place[2], [])
                for other in sorted(readers, key=lambda item: (item[0] is not file, item[0].place, _line(item[1]))):
                    if other[1] is not place[1] and not any(item is other[1] for item in walk(node)):
                        found += self._race(place, other, whole=node if place[1] is call else place[1])
        return found

    def _race(self, writes: Place, reads: Place, whole: ast.AST) -> Iterator[Race]:
        (file, _, key), (other, call, _) = writes, reads
        function = file.names.function_of(whole)
        if self.scripts.in_kept_guard(other, call) or self._is_of_another_program(file, function, other):
            return
        if other.names.function_of(call) is not function and self._is_for_others(other, call):
            return
        if other is not file or other.names.function_of(call) is not function:
            known = key[0] is None or isinstance(key[0], ast.ClassDef)
            if known and not _stays_open(file, whole) and not self._is_for_another_run(file, whole):
                top = _in_block_of(file, whole, function)
                yield self._waiting(other, call, file, top)
            return
        one, two, block = _parted(file, whole, call)
        test: ast.AST | None = None
        if block is not None and block.index(two) < block.index(one):
            if not _leaves_in_body(two, call):
                return
            test = two
        elif block is not None and _leaves_in_body(one, whole):
            test = one
        elif block is None:
            test = file.names.parents[one]
        if isinstance(test, ast.If):
            varies = self.decisions.varying.varies(file, test.test)
            if any(test is guard for guard in self.scripts.kept_guards(file)):
                yield Race(other, call, file)
            elif varies or any(isinstance(item, ast.Call) for item in walk(test.test)):
                yield Race(other, call, file, test=test, reached=self.reached.by_all(file, test))
        elif self._waits_between(file, function, whole, call):
            return
        elif block is not None and _stays_open(file, whole):
            yield Race(other, call, file, front=two, reached=self.reached.by_all(file, two))
        else:
            yield self._waiting(other, call, file, one if block is not None else None)

    def _is_of_another_program(self, file: File, function: Function | None, other: File) -> bool:
        """Whether no program that writes a file comes to the one that reads it."""
        instances = self.scripts.collectives.instances
        callers = {caller for caller, _ in instances.calls(file, function)} if function is not None else set()
        writing = [p for p in self.scripts.programs if self.scripts.reach(p) & (callers or {file})]
        return bool(writing) and not any(other in self.scripts.reach(program) for program in writing)

    def _is_for_others(self, file: File, node: ast.AST) -> bool:
        """Whether a node is in a function of a module that nothing in the project names: a notebook's, or nobody's."""
        function = file.names.function_of(node)
        if function is None or file.names.parents[function] is not file.tree or function.decorator_list:
            return False
        own = set(walk(function))
        return not any(
            _names(item, function.name)
            for other in self.project
            if other.mentions(function.name)
            for item in other.nodes
            if item not in own
        )

    def _waiting(self, other: File, call: ast.expr, file: File, behind: ast.stmt | None) -> Race:
        if behind is None or any(isinstance(item, _LEAVES) for item in _own_jumps(behind)):
            return Race(other, call, file)
        return Race(other, call, file, behind=behind, reached=self.reached.by_all(file, behind))

    def _is_for_another_run(self, file: File, node: ast.AST) -> bool:
        """Whether a function that trains writes a file: others read it when training goes on."""
        function = file.names.function_of(node)
        loops = [parent for parent in file.names.ancestors(node) if isinstance(parent, ast.For)]
        return any(self.scripts.feeds.trains(file, loop) for loop in loops) or (
            function is not None and self.scripts.steps(file, function)
        )

    def _waits_between(self, file: File, function: Function | None, one: ast.AST, two: ast.AST) -> bool:
        """Whether a barrier stands between two nodes of a function."""
        return any(
            (dotted(call.func) or "").split(".")[-1] in _BARRIERS
            and _line(one) <= call.lineno <= _line(two)
            and file.names.function_of(call) is function
            for call in file.calls
        )

    def waits_beside(self, file: File, node: ast.AST) -> bool:
        """Whether ranks wait for each other somewhere in the function of a node."""
        function = file.names.function_of(node)
        return any(
            (dotted(call.func) or "").split(".")[-1] in _BARRIERS and file.names.function_of(call) is function
            for call in file.calls
        )

    # Paths -----------------------------------------------------------------------------------------------------

    @cached_property
    def _reads(self) -> dict[Key, list[Place]]:
        """By path, all that reads it in files that train."""
        found: dict[Key, list[Place]] = {}
        for file in self.scripts.training:
            for call in file.calls:
                for path in self._paths_read(file, call):
                    for place in self._levels(file, call, path):
                        found.setdefault(place[2], []).append(place)
        return found

    def _levels(self, file: File, node: ast.expr, path: ast.expr, deep: int = 0) -> Iterator[Place]:
        """A node with a path; where that is a parameter, also the calls of its function with what they give."""
        path = _bare(path)
        yield file, node, self._key(file, path)
        yield from ((file, node, key) for key in _kept(file, node, path))
        function = file.names.function_of(node)
        if isinstance(path, ast.Name) and function is not None and deep < _DEEP:
            for other, given in self.scripts.collectives.instances.given(file, function, path.id):
                call = other.names.enclosing(given, (ast.Call,))
                if isinstance(call, ast.Call):
                    yield from self._levels(other, call, given, deep + 1)

    def _key(self, file: File, path: ast.expr, deep: int = 0) -> Key:
        path = _bare(path)
        if isinstance(path, ast.Name):
            found = file.names.lookup(path.id, file.names.scope_of(path))
            bindings = found[1] if found is not None else []
            value = bindings[0].value if len(bindings) == 1 else None
            if isinstance(value, ast.expr) and deep < _DEEP:
                return self._key(file, value, deep + 1)
            return (found[0].node if found is not None else file.tree), path.id
        return None, ast.dump(path)

    def _written(self, file: File, node: ast.AST) -> Iterator[tuple[ast.Call, ast.expr]]:
        """The calls in a node that write, with the file that they write and the folder it is in."""
        for call, path in self._written_files(file, node):
            yield call, path
            if (folder := _folder(path)) is not None:
                yield call, folder

    def _written_files(self, file: File, node: ast.AST) -> Iterator[tuple[ast.Call, ast.expr]]:
        for call in (item for item in walk(node) if isinstance(item, ast.Call)):
            name = self.project.external(file, call.func)
            if name in MADE_ONCE:
                yield from ((call, path) for path in _given_folder(call))
            method = call.func.attr if isinstance(call.func, ast.Attribute) and not name else ""
            opened = takes_path(call) and opens_for_writing(call) and not _appends(call)
            if isinstance(call.func, ast.Attribute) and (
                method in _WRITING_METHODS or (method == "open" and opens_for_writing(call) and not _appends(call))
            ):
                yield call, call.func.value
            elif call.args and (opened or name in _SAVERS or method in _SAVING_METHODS):
                yield call, _of_one_rank(call.args[0])
            elif len(call.args) > 1 and name in _SAVERS_BEHIND:
                yield call, call.args[1]

    def _paths_read(self, file: File, call: ast.Call) -> Iterator[ast.expr]:
        if self.project.external(file, call.func) in _RUNNING | COMMANDS:
            # A command whose result is used, so that all ranks run it; another is one rank's.
            if not runs_command(file, self.project, file.names.statement_of(call)):
                given = (item for argument in call.args for item in walk(argument))
                yield from (item for item in given if isinstance(item, (ast.Name, ast.Attribute, ast.JoinedStr)))
        elif (path := self._path_read(file, call)) is not None:
            yield path

    def _path_read(self, file: File, call: ast.Call) -> ast.expr | None:
        if takes_path(call):
            return call.args[0] if call.args and not opens_for_writing(call) else None
        name = self.project.external(file, call.func)
        if name in _LISTING:
            folder = _folder(call.args[0]) if call.args and name.startswith("glob.") else None
            return folder if folder is not None else next(iter(call.args), None)
        if name in _ASKING:
            return call.args[0] if call.args and isinstance(file.names.statement_of(call), ast.Assert) else None
        if name in _READERS or name.split(".")[-1] in _LOADING_METHODS:
            return call.args[0] if call.args else None
        if isinstance(call.func, ast.Attribute) and not name:
            if call.func.attr in _LOADING_METHODS and call.args:
                return call.args[0]
            if call.func.attr in _LISTING_METHODS and len(call.args) == (call.func.attr != "iterdir"):
                return call.func.value
            if call.func.attr in _READING_METHODS or (call.func.attr == "open" and not opens_for_writing(call)):
                return call.func.value
        return None


def _kept(file: File, node: ast.AST, path: ast.expr) -> Iterator[Key]:
    """Where an object keeps a path that is written or read: ``self.files.append(path)``, ``self.files[i]``."""
    owner, function = file.names.class_of(node), file.names.function_of(node)
    if owner is None or function is None:
        return
    sources = [path]
    if isinstance(path, ast.Name):
        found = file.names.lookup(path.id, file.names.scope_of(path))
        sources = [binding.value for binding in (found[1] if found else ()) if isinstance(binding.value, ast.expr)]
        for item in walk(function):
            match item:
                case ast.Call(func=ast.Attribute(value=holder, attr="append"), args=[ast.Name(id=name)]) if (
                    name == path.id and (kept := _of_self(holder))
                ):
                    yield owner, kept
                case ast.Assign(targets=[ast.Subscript(value=holder)], value=ast.Name(id=name)) if name == path.id and (
                    kept := _of_self(holder)
                ):
                    yield owner, kept
                case ast.For(target=ast.Name(id=name), iter=holder) if name == path.id and (kept := _of_self(holder)):
                    yield owner, kept
    for source in sources:
        if isinstance(source, ast.Subscript) and (kept := _of_self(source.value)):
            yield owner, kept


def _names(node: ast.AST, wanted: str) -> bool:
    """Whether a node may stand for what is called so; a text that holds the word may."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return name == wanted
        case ast.Constant(value=str() as text):
            return wanted in text
    return False


def _of_self(node: ast.expr) -> str:
    """``self.files``; empty for what is no attribute of the object."""
    named = dotted(node) or ""
    return named if named.startswith("self.") and named.count(".") == 1 else ""


def _bare(path: ast.expr) -> ast.expr:
    """``path`` in ``str(path)`` and ``Path(path)``."""
    match path:
        case ast.Call(func=func, args=[inner], keywords=[]) if (dotted(func) or "").split(".")[-1] in _AS_PATH:
            return _bare(inner)
    return path


def _folder(path: ast.expr) -> ast.expr | None:
    """``folder`` in ``os.path.join(folder, name)``, ``folder / name``, ``folder + "/a"`` and ``f"{folder}/{name}"``."""
    match _bare(path):
        case ast.Call(func=ast.Attribute(attr="join"), args=[folder, _]):
            return folder
        case ast.BinOp(left=folder, op=ast.Div()):
            return folder
        case ast.BinOp(left=folder, op=ast.Add(), right=ast.Constant(value=str(name))) if name.startswith("/"):
            return folder
        case ast.JoinedStr(values=[ast.FormattedValue(value=folder), ast.Constant(value=str(name)), *_]):
            return folder if name.startswith("/") else None
        case ast.Constant(value=str(name)) if "/" in name:
            return ast.copy_location(ast.Constant(name.rpartition("/")[0]), path)
    return None


def _given_folder(call: ast.Call) -> Iterator[ast.expr]:
    """The folder that a writer of logs is given."""
    yield from (item for item in call.args[:1] if not isinstance(item, ast.Starred))
    yield from (keyword.value for keyword in call.keywords if keyword.arg in _FOLDERS)


def _of_one_rank(path: ast.expr) -> ast.expr:
    """``path`` in ``path if bmt.rank() == 0 else os.devnull``."""
    return path.body if isinstance(path, ast.IfExp) else path


def _appends(call: ast.Call) -> bool:
    given = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    return any(isinstance(mode, ast.Constant) and mode.value in {"a", "ab", "at", "a+", "ab+"} for mode in given)


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def _stays_open(file: File, node: ast.AST) -> bool:
    """Whether a node opens a file, under a name."""
    return isinstance(node, ast.Call) and isinstance(file.names.statement_of(node), (ast.Assign, ast.AnnAssign))


# Blocks -------------------------------------------------------------------------------------------------------


def _parted(file: File, one: ast.AST, two: ast.AST) -> tuple[ast.stmt, ast.stmt, list[ast.stmt] | None]:
    """The statements that hold one node and not the other, and the block in which both stand, if there is one."""
    above = [one, *file.names.ancestors(one)]
    known = set(above)
    child = two
    for parent in file.names.ancestors(two):
        if parent in known:
            other = above[above.index(parent) - 1]
            first, second = file.names.statement_of(other), file.names.statement_of(child)
            block = file.names.siblings(first)
            return first, second, block if any(second is item for item in block) else None
        child = parent
    raise AssertionError("two nodes of one function")


def _in_block_of(file: File, node: ast.AST, function: Function | None) -> ast.stmt:
    """The statement of a function's own block, or the file's, that a node belongs to."""
    around = function if function is not None else file.tree
    current = node
    while (parent := file.names.parents[current]) is not around:
        current = parent
    assert isinstance(current, ast.stmt)
    return current


def _leaves_in_body(statement: ast.AST, inner: ast.AST) -> bool:
    """Whether a statement is a test with a node in its body, and what passes the test leaves at its end."""
    if not isinstance(statement, ast.If) or not _ends(statement.body[-1]):
        return False
    return any(inner is item for line in statement.body for item in walk(line))


def _ends(statement: ast.stmt) -> bool:
    """Whether nothing behind a statement runs."""
    match statement:
        case ast.With(body=body):
            return _ends(body[-1])
        case ast.If(body=body, orelse=orelse):
            return bool(orelse) and _ends(body[-1]) and _ends(orelse[-1])
    return isinstance(statement, _LEAVES)


def _own_jumps(statement: ast.stmt) -> Iterator[ast.AST]:
    """What leads out of a statement: ``return``, and ``break`` and ``continue`` of loops around it."""
    looped = {
        item
        for loop in walk_own(statement)
        if isinstance(loop, (ast.For, ast.While))
        for item in walk(loop)
        if isinstance(item, (ast.Break, ast.Continue))
    }
    yield from (item for item in walk_own(statement) if isinstance(item, _LEAVES) and item not in looped)
