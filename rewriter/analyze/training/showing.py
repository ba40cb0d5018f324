"""Functions of the project that only show, write or keep what they are given."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import Function, names_in, walk_own
from rewriter.analyze.training.roles import Roles
from rewriter.analyze.training.writers import SHOWING_METHODS, WRITERS

_DEEP = 3
_PASSED = {
    "float", "int", "round", "str", "repr", "abs", "sorted", "list", "tuple", "dict", "enumerate", "zip", "sum", "min",
    "max", "format", "map", "tqdm",
}  # fmt: skip
_VIEWS = {
    "item", "items", "values", "get", "tolist", "numpy", "detach", "cpu", "float", "double", "data", "mean", "to",
    "clone", "copy", "squeeze",
}  # fmt: skip
_TAKING = SHOWING_METHODS | {
    "write", "writelines", "writerow", "writerows", "join", "format", "log", "set_description",
    "add_histogram", "warning", "error", "log_metrics",
}  # fmt: skip
_KEEPING = {"append", "extend", "put"}
_CUTS = {"item", "tolist", "numpy", "detach", "data"}
_TRAINS = {"backward", "step", "zero_grad"}


class Showing:
    """Answers for all files of a project."""

    def __init__(self, roles: dict[File, Roles]) -> None:
        self._roles = roles
        self._only: dict[tuple[Function, bool], set[str]] = {}

    def given(self, file: File, call: ast.Call) -> list[ast.expr]:
        """What a call gives a function that only shows, writes or keeps it."""
        function = self._roles[file].function_called(call.func)
        if function is None or not (isinstance(file.names.parents[call], ast.Expr) or gives_text(function)):
            return []
        rest, given = function.node.args.kwarg, list(function.given(call))
        if rest is not None:
            given = [(name if name in function.parameters else rest.arg, value) for name, value in given]
        shown = {number: self._shown_only(function, number) for number in (False, True)}
        return [value for name, value in given if name in shown[_is_number(value)]]

    def _shown_only(self, function: FunctionInfo, number: bool) -> set[str]:
        """The parameters of which nothing else becomes, if they are given tensors, or a ``number``."""
        key = function.node, number
        if key not in self._only:
            self._only[key] = set()  # while it is asked, if it calls itself
            own = [item for statement in function.node.body for item in walk_own(statement)]
            if not any(map(_trains if gives_text(function) else _does_more, own)):
                rest = function.node.args.kwarg
                names = {*function.parameters, *([rest.arg] if rest is not None else [])} - {"self", "cls"}
                self._only[key] = {name for name in names if self.only(function.file, own, name, number)}
        return self._only[key]

    def only(self, file: File, own: list[ast.AST], name: str, number: bool = False, deep: int = 0) -> bool:
        """Whether what a name holds is shown, written or kept among the nodes of a function, and nothing else."""
        uses = [item for item in own if isinstance(item, ast.Name) and item.id == name]
        read = [item for item in uses if isinstance(item.ctx, ast.Load)]
        return deep < _DEEP and bool(read) and all(self._ends_in_show(file, own, item, number, deep) for item in read)

    def _ends_in_show(self, file: File, own: list[ast.AST], node: ast.AST, cut: bool, deep: int) -> bool:
        """Whether what is made of a value is shown, written or kept, and nothing else.

        ``cut`` says whether it is a number, that no gradient comes back to.
        """
        parents = file.names.parents
        while not isinstance(parent := parents[node], ast.stmt):
            match parent:
                case ast.FormattedValue() | ast.Compare() | ast.BinOp(left=ast.Constant(value=str()), op=ast.Mod()):
                    return True
                case ast.Attribute(attr=attr) if attr not in _VIEWS:
                    return attr == "keys"
                case ast.Attribute(attr=attr):
                    cut = cut or attr in _CUTS
                case ast.Call(func=ast.Name(id="float" | "int" | "round")):
                    cut = True
                case ast.Call(func=ast.Name(id="str" | "repr" | "format")):
                    return True
                case ast.Call() if parent.func is not node and not _passes(parent):
                    keeps = isinstance(parent.func, ast.Attribute) and parent.func.attr in _KEEPING
                    return cut if keeps else self._takes(file, parent, node)
                case ast.Subscript(ctx=ast.Load()) if parent.value is not node:
                    return True
                case ast.Subscript() if not isinstance(parent.ctx, ast.Load):
                    return False
                case ast.Lambda():
                    return False
                case ast.comprehension():
                    return all(self.only(file, own, name, cut, deep + 1) for name in _items(parent))
            node = parent
        match parent:
            case ast.Expr() | ast.If() | ast.Assert():
                return True
            case ast.AugAssign():
                return cut
            case ast.For():
                return all(self.only(file, own, name, cut, deep + 1) for name in _items(parent))
            case ast.Assign(targets=[target]) if parent.value is node:
                if not isinstance(target, (ast.Name, ast.Tuple)):
                    return cut
                names = names_in(target)
                return all(self.only(file, own, name, cut, deep + 1) for name in names)
        return False

    def _takes(self, file: File, call: ast.Call, node: ast.AST) -> bool:
        """Whether a call shows, writes or keeps what it is given."""
        match call.func:
            case ast.Name(id="print" | "len" | "isinstance" | "type" | "hasattr" | "callable"):
                return True
            case ast.Attribute(attr=attr) if attr in _TAKING:
                return True
        roles = self._roles[file]
        if roles.project.external(file, call.func) in WRITERS:
            return True
        return any(value is node for value in self.given(file, call))


def _passes(call: ast.Call) -> bool:
    """Whether a call gives what it gets, or a number made of it: ``float(x)``, ``sorted(losses.items())``."""
    return isinstance(call.func, ast.Name) and call.func.id in _PASSED


def _items(loop: ast.For | ast.comprehension) -> Iterator[str]:
    """The names of what a loop takes out of a dict or list, without its keys."""
    keyed = isinstance(loop.iter, ast.Call) and getattr(loop.iter.func, "attr", "") == "items"
    keys = isinstance(loop.iter, ast.Call) and getattr(loop.iter.func, "attr", "") == "keys"
    if keyed and isinstance(loop.target, ast.Tuple):
        yield from names_in(loop.target.elts[-1])
    elif not keys:
        yield from names_in(loop.target)


def _is_number(value: ast.expr) -> bool:
    """Whether a value, or all in a dict that is written out, are read out of tensors: ``x.item()``, ``len(x)``."""
    if isinstance(value, ast.Dict):
        return bool(value.values) and all(map(_is_number, value.values))
    called = {
        getattr(item.func, "attr", getattr(item.func, "id", ""))
        for item in ast.walk(value)
        if isinstance(item, ast.Call)
    }
    return isinstance(value, ast.Constant) or bool(called & {"item", "tolist", "float", "int", "len", "size", "numel"})


def _does_more(node: ast.AST) -> bool:
    """Whether a function gives something back, or trains."""
    match node:
        case ast.Return(value=value):
            return value is not None and not (isinstance(value, ast.Constant) and value.value is None)
        case ast.Yield() | ast.YieldFrom() | ast.Await() | ast.Global() | ast.Nonlocal():
            return True
    return _trains(node)


def _trains(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TRAINS


def gives_text(function: FunctionInfo) -> bool:
    """Whether a function gives text, in which it shows what it is handed."""
    own = [node for statement in function.node.body for node in walk_own(statement)]
    texts = {
        target.id
        for node in own
        if isinstance(node, ast.Assign) and any(map(spells, joined_texts(node.value)))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    returned = [node.value for node in own if isinstance(node, ast.Return) and node.value is not None]
    return bool(returned) and all(
        (isinstance(value, ast.Name) and value.id in texts) or any(map(spells, joined_texts(value)))
        for value in returned
    )


def joined_texts(node: ast.expr) -> Iterator[ast.expr]:
    """The parts of ``"accuracy " + str(x)``; anything else as it is."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [part for side in (node.left, node.right) for part in joined_texts(side)]
        if any(map(spells, parts)):
            yield from parts
            return
    yield node


def spells(node: ast.expr) -> bool:
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return constant or is_text(node) or (isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"str", "repr"})


def is_text(node: ast.expr) -> bool:
    """Whether a value is text, whose parts are looked at where it shows them."""
    match node:
        case ast.JoinedStr() | ast.BinOp(left=ast.Constant(value=str()), op=ast.Mod()):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str()))):
            return True
    return False
