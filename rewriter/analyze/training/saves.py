"""The checkpoints of a project's training, dictionaries in files: what is in them, who writes, moves and reads them.

A checkpoint of parts is a folder, so all of this changes, or nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, same, walk, walk_own
from rewriter.analyze.training.collectives import as_guard
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.writers import is_open_file

_MOVES = {
    "shutil.copy": "copy", "shutil.copyfile": "copy", "shutil.copy2": "copy", "os.replace": "rename",
    "os.rename": "rename", "shutil.move": "rename", "os.remove": "remove", "os.unlink": "remove",
}  # fmt: skip
_MOVING_METHODS = {"unlink", "rename", "replace", "hardlink_to", "symlink_to"}
_SENT = {"wandb.save", "mlflow.log_artifact", "os.symlink", "os.link", "os.path.getsize", "tarfile.open"}
_SENDING_METHODS = {"add_file", "log_artifact", "log_model", "upload_file"}
_OPENED = {
    "open", "io.open", "zipfile.ZipFile", "os.system", "os.stat", "subprocess.run", "subprocess.call",
    "subprocess.check_call", "subprocess.check_output", "subprocess.Popen", "huggingface_hub.upload_file",
}  # fmt: skip
_OPENING_METHODS = {"open", "read_bytes", "stat", "upload", "upload_file", "save"}
_PATHS = re.compile(r"ck\b|ckpt|checkpoint|\.pth?\b|resume|weights|snapshot|best|latest|(?:^|_)last|save", re.I)
_READERS = re.compile(r"^(?:load|resume)_(?:checkpoint|ckpt|snapshot|training_state)$")
_DEEP = 4


@dataclass(frozen=True)
class Resumed:
    """How a script is told to go on: what it asks, before which statement it is to hear that it was started again.

    ``kind``: "path" (the variable is what is loaded), "flag" (it is true or false), or "word" (it equals ``word``).
    """

    before: ast.stmt
    variable: ast.expr
    kind: str
    word: ast.expr | None = None


@dataclass
class OfFile:
    """What changes in one file, when all of it changes."""

    saves: list[ast.Call] = field(default_factory=list)
    opened: list[ast.If] = field(default_factory=list)
    """Rank guards with nothing but a save in them."""
    states: dict[ast.Call, ast.expr] = field(default_factory=dict)
    """``model.state_dict()`` in a dictionary that is saved, and the model."""
    loads: list[ast.Call] = field(default_factory=list)
    taken: list[ast.Call] = field(default_factory=list)
    """``model.load_state_dict(...)``."""
    moves: dict[ast.Call, str] = field(default_factory=dict)
    """Calls that copy, rename or remove a file, and which of it."""
    asked: list[ast.Attribute] = field(default_factory=list)
    """``os.path.isfile`` and ``path.is_file``, of what is loaded."""
    resumed: list[Resumed] = field(default_factory=list)
    alone: list[tuple[ast.AST, str]] = field(default_factory=list)
    """What is not told that it was started again, and why."""


class _Left(Exception):
    def __init__(self, file: File, node: ast.AST, why: str) -> None:
        super().__init__(why)
        self.file, self.node, self.why = file, node, why


class Saves:
    """Answers for a whole project."""

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._project, self._roles = scripts.project, scripts.roles
        self._instances = scripts.collectives.instances
        self._found: dict[File, OfFile] = {}
        self._made: set[ast.AST] = set()
        """Dictionaries that are saved, or are part of one."""
        self.left: tuple[File, ast.AST, str] | None = None
        """Why nothing changes, and where that is seen."""

    @cached_property
    def found(self) -> dict[File, OfFile]:
        """What changes; nothing where no checkpoint of the training is seen, or with ``left`` the reason."""
        try:
            self._see_saves()
            if self._found:
                self._see_others()
        except _Left as left:
            self.left = left.file, left.node, left.why
            return {}
        return self._found

    @cached_property
    def first(self) -> tuple[File, ast.Call] | None:
        """A call that saves the state of an optimizer."""
        return next((one for one in self._torch_saves if "optimizer" in self._kinds(*one)), None)

    @cached_property
    def unclear(self) -> tuple[File, ast.Call] | None:
        """A call that may save the state of an optimizer, in a project that has one, where none is seen to."""
        asks = (call for file in self._training for call in file.calls if self._of_optimizer(file, call))
        if self.first is not None or next(asks, None) is None:
            return None
        return next((one for one in self._torch_saves if self._may_save_optimizer(*one)), None)

    def _of_optimizer(self, file: File, node: ast.AST) -> bool:
        match node:
            case ast.Call(func=ast.Attribute(value=of, attr="state_dict" | "load_state_dict")):
                last = (dotted(of) or "").split(".")[-1]
                return self._kind(file, of) == "optimizer" or last.startswith("optim")
        return False

    def _may_save_optimizer(self, file: File, call: ast.Call) -> bool:
        value = _argument(call, 0, "obj")
        if value is None or self._is_state(file, value) == "model":
            return False
        try:
            made = list(self._sources(file, call, value, 0, False))
        except _Left:
            return True
        return any(self._of_optimizer(other, node) for other, one in made for node in walk(one))

    @cached_property
    def _torch_saves(self) -> list[tuple[File, ast.Call]]:
        return [(f, c) for f in self._training for c in f.calls if self._project.external(f, c.func) == "torch.save"]

    def _kinds(self, file: File, call: ast.Call) -> set[str]:
        """Of what a call saves, as far as it is seen."""
        return {self._is_state(f, entry) for f, made in self._quietly(file, call) for _, entry in _entries(made)}

    @cached_property
    def _training(self) -> list[File]:
        return [file for file in self._scripts.training if file.convert and file.notebook is None]

    def _of(self, file: File) -> OfFile:
        return self._found.setdefault(file, OfFile())

    # Saving ----------------------------------------------------------------------------------------------------

    def _see_saves(self) -> None:
        if self.unclear is not None:
            raise _Left(*self.unclear, "it is not seen that the state of an optimizer is an entry of what is saved")
        if self.first is None:
            return
        if self._project.partial:
            raise _Left(*self.first, "the project is converted in portions")
        for file, call in self._torch_saves:
            if "optimizer" in self._kinds(file, call):  # else weights for others to read: a plain file
                self._see_save(file, call)

    def _see_save(self, file: File, call: ast.Call) -> None:
        made = list(self._sources(file, call, _argument(call, 0, "obj"), 0, True))
        starred = bool(call.args) and isinstance(call.args[0], ast.Starred)
        if len(call.args) > 2 or (not starred and any(keyword.arg not in {"obj", "f"} for keyword in call.keywords)):
            raise _Left(file, call, "torch.save is given more than a dictionary and a path")
        if is_open_file(file, _argument(call, 1, "f")):
            raise _Left(file, call, "it is written to an open file")
        if self._scripts.in_kept_guard(file, call):
            self._of(file).opened.append(self._guard(file, call))
        self._of(file).saves.append(call)
        for other, one in made:
            for key, entry in _entries(one):
                if key is None:
                    raise _Left(other, one, "its entries are not all named")
                if self._is_state(other, entry):
                    assert isinstance(entry, ast.Call) and isinstance(entry.func, ast.Attribute)
                    self._of(other).states[entry] = entry.func.value

    def _guard(self, file: File, call: ast.Call) -> ast.If:
        """The rank guard that holds nothing but the call."""
        statement = file.names.statement_of(call)
        parent = file.names.parents[statement]
        if isinstance(parent, ast.If) and parent.body == [statement] and not parent.orelse:
            guard = as_guard(file, parent)
            alone = guard is not None and not guard.rest and not guard.either
            around = (other for other in file.names.ancestors(parent) if isinstance(other, ast.If))
            if alone and file.source.code(parent).startswith("if") and not any(as_guard(file, o) for o in around):
                return parent
        raise _Left(file, call, "one rank alone reaches it, with other things to do")

    def _quietly(self, file: File, call: ast.Call) -> list[tuple[File, ast.AST]]:
        """The dictionaries that a call may save, as far as they are seen."""
        found = []
        with suppress(_Left):
            for one in self._sources(file, call, _argument(call, 0, "obj"), 0, False):
                found.append(one)
        return found

    def _sources(
        self, file: File, call: ast.Call, value: ast.expr | None, deep: int, strict: bool
    ) -> Iterator[tuple[File, ast.AST]]:
        """The dictionaries that a value may be, and what is put into them; ``strict``: unless they are used otherwise.

        ``call`` is what gets the value.
        """
        if value is None or deep > _DEEP:
            raise _Left(file, call, "it is not seen what is saved")
        if isinstance(value, ast.Dict) or (isinstance(value, ast.Call) and dotted(value.func) == "dict"):
            yield file, value
            self._made.add(value)
            for one in _spread(value):
                yield from self._sources(file, call, one, deep + 1, strict)
            return
        if isinstance(value, ast.Call):
            found = next(iter(self._called(file, value)), None)
            returned = _returned(found.node) if found is not None else []
            if found is None or not returned:
                raise _Left(file, call, f"it is not seen what {file.source.code(value.func)}(...) gives to save")
            if strict and len(list(self._instances.calls(found.file, found.node))) > 1:
                raise _Left(file, call, f"{file.source.code(value.func)}(...) is called for more than saving")
            for one in returned:
                yield from self._sources(found.file, value, one, deep + 1, strict)
            return
        variable = self._roles[file].var(value) if isinstance(value, (ast.Name, ast.Starred)) else None
        if isinstance(value, ast.Starred):
            variable = self._roles[file].var(value.value)
        if variable is None or "." in variable[1]:
            raise _Left(file, call, f"it is not seen what {file.source.code(value)} holds")
        scope, name = variable
        yield from ((file, stored) for stored in self._stored(file, variable))
        last = _last_binding(file, value) if isinstance(value, ast.Name) else None
        if last is not None:
            if strict:
                self._only_saved(file, variable, last)
            yield from self._sources(file, call, last.value, deep + 1, strict)
            return
        assigned = [made for held, made, _, part in self._roles[file].assignments if held == variable and not part]
        assigned = [made for made in assigned if not (isinstance(made, ast.Constant) and made.value is None)]
        if strict:
            self._only_saved(file, variable)
        seen = False
        for made in assigned:
            seen = True
            yield from self._sources(file, call, made, deep + 1, strict)
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)) and self._roles[file].is_argument(variable):
            for other, given in self._given(file, scope, name):
                seen = True
                yield from self._sources(other, call, given, deep + 1, strict)
                if strict and self._scripts.in_kept_guard(other, given):
                    raise _Left(other, given, "one rank alone reaches it")
        if not seen:
            raise _Left(file, call, f"it is not seen what {name} holds")

    def _stored(self, file: File, variable: tuple[ast.AST, str]) -> Iterator[ast.Assign]:
        """``state["step"] = 3``."""
        for node in walk(variable[0]):
            match node:
                case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name) as held, slice=ast.Constant())]):
                    if name == variable[1] and self._roles[file].var(held) == variable:
                        yield node

    def _given(self, file: File, function: Function, name: str) -> Iterator[tuple[File, ast.expr]]:
        if function.args.vararg is not None and function.args.vararg.arg == name:
            for other, call in self._instances.calls(file, function):
                if len(call.args) != 2 or call.keywords or function.args.args:
                    raise _Left(other, call, "it is given more than a dictionary and a path")
                yield other, call.args[0]
            return
        yield from self._instances.given(file, function, name)

    def _only_saved(self, file: File, variable: tuple[ast.AST, str], since: ast.Assign | None = None) -> None:
        """Raises _Left where a variable with a dictionary to save is used for something else.

        ``since`` is where it gets the dictionary; what comes before, outside of loops around it, is of another value.
        """
        roles = self._roles[file]
        loop = None
        if since is not None:
            loops = [n for n in file.names.ancestors(since) if isinstance(n, (ast.For, ast.While))]
            loop = next((n for n in reversed(loops) if any(item is n for item in walk(variable[0]))), None)
        first = 0 if since is None else (since if loop is None else loop).lineno
        for node in walk(variable[0]):
            if getattr(node, "lineno", first) < first:
                continue
            if not isinstance(node, ast.Name) or node.id != variable[1] or roles.var(node) != variable:
                continue
            match file.names.parents[node]:
                case ast.Assign() | ast.AnnAssign() | ast.Delete() | ast.arg() | ast.For():
                    continue
                case ast.Call() as call if node in call.args and self._saves(file, call):
                    continue
                case ast.Starred() as star if self._saves(file, file.names.parents[star]):
                    continue
                case ast.keyword() as word if self._saves(file, file.names.parents[word]):
                    continue
                case ast.Dict() | ast.Call() as made if made in self._made and node in _spread(made):
                    continue
                case ast.keyword() as word if file.names.parents[word] in self._made and word.arg is None:
                    continue
                case ast.Subscript(value=held, slice=ast.Constant(value=key)) as part if held is node:
                    stored = isinstance(part.ctx, ast.Store)
                    if stored or key not in self._marked:
                        continue
                case ast.Compare(ops=[ast.In() | ast.NotIn()]):
                    continue
            raise _Left(file, node, f"{variable[1]} is used for more than saving")

    def _saves(self, file: File, node: ast.AST) -> bool:
        """Whether a call saves what it is given, or a function of the project that has a ``torch.save`` does."""
        if not isinstance(node, ast.Call):
            return False
        if self._project.external(file, node.func) == "torch.save":
            return True
        return any(
            isinstance(item, ast.Call) and (item is not node) and self._saves(info.file, item)
            for info in self._called(file, node)
            for item in walk(info.node)
        )

    def _called(self, file: File, call: ast.Call) -> list[FunctionInfo]:
        """The function or method of the project that a call runs."""
        found = self._project.resolve(file, call.func)
        if isinstance(found, FunctionInfo):
            return [found]
        return self._instances.methods(file, call.func) if isinstance(call.func, ast.Attribute) else []

    @cached_property
    def _marked(self) -> set[str | None]:
        """Keys under which the project saves states in parts."""
        return {
            key
            for file, call in self._torch_saves
            for other, made in self._quietly(file, call)
            for key, entry in _entries(made)
            if self._is_state(other, entry)
        }

    def _is_state(self, file: File, entry: ast.expr) -> str:
        """Of what ``x.state_dict()`` is: ``"model"``, ``"optimizer"``, ``"scaler"``, or another thing."""
        match entry:
            case ast.Call(func=ast.Attribute(value=of, attr="state_dict"), args=[], keywords=[]):
                return self._kind(file, of)
        return ""

    def _kind(self, file: File, of: ast.expr, deep: int = 0) -> str:
        """What a value is, also where a function gets it and does nothing else with it."""
        roles = self._roles[file]
        variable = roles.var(of)
        if variable is not None and variable in roles.scalers:
            return "scaler"
        if variable is not None and variable in roles.optimizers:
            return "optimizer"
        if roles.is_model(of):
            return "model"
        if deep > _DEEP or variable is None or not (isinstance(of, ast.Attribute) or roles.is_argument(variable)):
            return ""
        given = (
            (other, value)
            for other, value in self._instances.given_to(file, of)
            if not (isinstance(value, ast.Constant) and value.value is None)
        )
        kinds = {self._kind(other, value, deep + 1) for other, value in given}
        return kinds.pop() if len(kinds) == 1 else ""

    # Reading ---------------------------------------------------------------------------------------------------

    def _see_others(self) -> None:
        programs = [p for p in self._scripts.programs if any(file in self._found for file in self._scripts.reach(p))]
        beside = set().union(*(self._scripts.reach(program) for program in programs))
        for file in (one for one in self._project if one in self._scripts.training or one.mentions("load")):
            loads = [call for call in file.calls if self._project.external(file, call.func) == "torch.load"]
            if loads and (not file.convert or file.notebook is not None or file.source.skips_file):
                raise _Left(file, loads[0], f"{file.path.name}, which stays as it is, reads files, too")
            for call in loads:
                self._of(file).loads.append(call)
            if loads or file in self._scripts.training:
                self._see_taken(file)
            if file in beside or loads:
                self._see_paths(file, loads)
            for call in loads:
                if file in beside and file in self._scripts.training:
                    self._see_resume(file, call)

    def _see_taken(self, file: File) -> None:
        for call in file.calls:
            match call:
                case ast.Call(func=ast.Attribute(value=of, attr="load_state_dict"), args=[_, *_]):
                    if self._kind(file, of):
                        self._of(file).taken.append(call)

    def _see_paths(self, file: File, loads: list[ast.Call]) -> None:
        """What is done with files that may be checkpoints."""
        read = [path for call in loads if (path := _argument(call, 0, "f")) is not None]
        saved = [path for call in self._of(file).saves if (path := _argument(call, 1, "f")) is not None]
        paths = [path for path in (*read, *saved) if not isinstance(path, ast.Starred)]
        near = {file.names.function_of(call) for call in [*loads, *self._of(file).saves]}
        for call in file.calls:
            name = self._project.external(file, call.func)
            if isinstance(call.func, ast.Name) and call.func.id == "open":
                name = name or "open"
            code = " ".join(file.source.code(item) for item in [call.func, *call.args])
            method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            function = file.names.function_of(call)
            if function is not None and (method in _MOVING_METHODS or method in {"isfile", "is_file"}):
                code = file.source.code(function)  # of "path.unlink()" the call itself says little
            ours = function in near or bool(_PATHS.search(code))
            opens = name in _OPENED or (method in _OPENING_METHODS and not name and not self._called(file, call))
            if opens and any(same(item, path) for item in walk(call) for path in paths):
                raise _Left(file, call, f"{file.source.code(call.func)}(...) needs a file")
            if name in _MOVES and any(keyword.arg not in {"src", "dst", "path"} for keyword in call.keywords):
                raise _Left(file, call, f"{file.source.code(call.func)} is given more than paths")
            if name in _MOVES:
                self._of(file).moves[call] = _MOVES[name]
            elif ours and (name in _SENT or (name == "" and method in _SENDING_METHODS)):
                raise _Left(file, call, f"{file.source.code(call.func)}(...) needs a file")
            elif method in _MOVING_METHODS and ours and not (name or isinstance(call.func.value, ast.Constant)):  # type: ignore[attr-defined]
                if method == "replace" and len(call.args) == 2:
                    continue  # of a text
                raise _Left(file, call, f"{file.source.code(call.func)}(...) needs a file")
            elif method == "isfile" and ours:
                if not call.args or not any(same(call.args[0], path) for path in read):
                    raise _Left(file, call, "it is not seen whether it asks for a checkpoint, which is a folder then")
                assert isinstance(call.func, ast.Attribute)
                self._of(file).asked.append(call.func)
            elif method == "is_file" and ours:
                assert isinstance(call.func, ast.Attribute)
                if not any(same(call.func.value, path) for path in read):
                    raise _Left(file, call, "it is not seen whether it asks for a checkpoint, which is a folder then")
                self._of(file).asked.append(call.func)
            elif isinstance(call.func, ast.Name) and name == "os.path.isfile" and ours:
                raise _Left(file, call, "it may ask for a checkpoint, which is a folder then")
            elif name and not name.startswith("bmtrain.") and _READERS.match(name.split(".")[-1]):
                raise _Left(file, call, f"{name} reads a file")

    # Going on --------------------------------------------------------------------------------------------------

    def _see_resume(self, file: File, load: ast.Call) -> None:
        """How the training that a load serves is told to go on."""
        function = file.names.function_of(load)
        around: ast.AST = file.tree if function is None else function
        inside = walk(around) if function is not None else (n for s in file.tree.body for n in walk_own(s))
        if not any(
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "load_state_dict"
            and self._kind(file, call.func.value) == "optimizer"
            for call in inside
        ):
            return  # weights to begin with
        child: ast.AST = load
        outer: ast.If | None = None
        for parent in file.names.ancestors(load):
            if parent is around:
                break
            if isinstance(parent, (ast.For, ast.While)):
                self._of(file).alone.append((load, "the script resumes in a loop"))
                return
            if isinstance(parent, ast.If) and any(child is item for item in parent.body):
                outer = parent
            child = parent
        if outer is None:
            return
        test = outer.test
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            test = test.values[0]
        resumed = self._resumed(file, outer, test, load)
        if isinstance(resumed, str):
            if resumed:
                self._of(file).alone.append((outer, resumed))
        elif resumed not in self._of(file).resumed:
            self._of(file).resumed.append(resumed)

    def _resumed(self, file: File, outer: ast.If, test: ast.expr, load: ast.Call) -> Resumed | str:
        path = _argument(load, 0, "f")
        word: ast.expr | None = None
        match test:
            case ast.Name() | ast.Attribute():
                variable = test
            case ast.Compare(
                left=ast.Name() | ast.Attribute() as left,
                ops=[ast.IsNot() | ast.NotEq()],
                comparators=[ast.Constant(value=None | "")],
            ):
                variable = left
            case ast.Compare(
                left=ast.Name() | ast.Attribute() as left, ops=[ast.Eq()], comparators=[ast.Constant() as constant]
            ):
                variable, word = left, constant
            case ast.Call(func=ast.Attribute(attr="exists" | "isfile" | "is_file")):
                return ""  # it goes on from what is there
            case _:
                return f"it is not seen what {file.source.code(test)} asks"
        if dotted(variable) is None:
            return f"it is not seen what {file.source.code(test)} asks"
        if isinstance(variable, ast.Name):
            scope = file.names.scope_of(variable)
            if variable.id not in scope.bindings or variable.id in scope.outer_names:
                return f"{variable.id} is not this function's own"
        kind = "word" if word is not None else "path" if path is not None and same(path, variable) else "flag"
        if kind == "flag" and path is not None and any(same(item, variable) for item in walk(path)):
            return f"what is loaded is made of {file.source.code(variable)}"
        if kind != "path" and isinstance(path, ast.Attribute):
            return f"what is loaded is told by {file.source.code(path)}"
        before: ast.stmt = outer
        while isinstance(parent := file.names.parents[before], ast.If) and parent.orelse == [before]:
            before = parent
        return self._before_all(file, before, variable, kind, word)

    def _before_all(
        self, file: File, before: ast.stmt, variable: ast.expr, kind: str, word: ast.expr | None
    ) -> Resumed | str:
        """In front of whatever else asks for the variable, as ``if not args.resume: shutil.rmtree(out)`` does."""
        block, here = file.names.siblings(before), file.names.function_of(before)
        inside = set(walk(before))
        earliest = before
        programs = [program for program in self._scripts.programs if file in self._scripts.reach(program)]
        for other in {file}.union(*(self._scripts.reach(program) for program in programs)):
            for test in _tests(other):
                if not any(same(item, variable) for item in walk(test)) or test in inside:
                    continue
                if other is file and other.names.function_of(test) is here:
                    above = next((item for item in block if test in walk(item)), None)
                    if above is None and test.lineno < before.lineno:
                        return f"line {test.lineno} asks for {file.source.code(variable)}, too"
                    if above is not None and above.lineno < earliest.lineno:
                        earliest = above
                elif isinstance(variable, ast.Attribute):
                    return f"{other.path.name}:{test.lineno} asks for {file.source.code(variable)}, too"
        return Resumed(earliest, variable, kind, word)


def _last_binding(file: File, name: ast.Name) -> ast.Assign | None:
    """The statement in front of a use that certainly has given a name its value."""
    statement: ast.AST = file.names.statement_of(name)
    while isinstance(statement, ast.stmt) and not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        block = file.names.siblings(statement)
        for other in reversed(block[: block.index(statement)]):
            match other:
                case ast.Assign(targets=[ast.Name(id=bound)]) if bound == name.id:
                    return other
            if any(isinstance(n, ast.Name) and n.id == name.id and isinstance(n.ctx, ast.Store) for n in walk(other)):
                return None
        statement = file.names.parents[statement]
    return None


def _tests(file: File) -> list[ast.expr]:
    return [node.test for node in file.nodes if isinstance(node, (ast.If, ast.IfExp, ast.While))]


def _argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    """What a call is given for a parameter of torch's."""
    named = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return call.args[position] if len(call.args) > position else named


def _spread(made: ast.Dict | ast.Call) -> list[ast.expr]:
    """The dictionaries whose entries ``{**one}`` and ``dict(one, **other)`` take."""
    if isinstance(made, ast.Dict):
        return [value for key, value in zip(made.keys, made.values, strict=True) if key is None]
    return [*made.args, *(keyword.value for keyword in made.keywords if keyword.arg is None)]


def _entries(made: ast.AST) -> Iterator[tuple[str | None, ast.expr]]:
    """The entries of ``{...}``, ``dict(...)`` or ``state[key] = ...``; None for a key that is no text."""
    pairs: Iterable[tuple[ast.expr | None, ast.expr]] = ()
    if isinstance(made, ast.Dict):
        pairs = zip(made.keys, made.values, strict=True)
    elif isinstance(made, ast.Call):
        yield from ((keyword.arg, keyword.value) for keyword in made.keywords if keyword.arg is not None)
    elif isinstance(made, ast.Assign) and isinstance(made.targets[0], ast.Subscript):
        pairs = [(made.targets[0].slice, made.value)]
    for key, value in pairs:
        if key is not None:
            yield (key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None), value


def _returned(function: Function) -> list[ast.expr]:
    nodes = (node for statement in function.body for node in walk_own(statement))
    return [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
