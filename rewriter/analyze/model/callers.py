"""Who makes objects of a class, and what they give its constructor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, File
from rewriter.analyze.read.nodes import Function, positional, walk


@dataclass(frozen=True)
class Caller:
    """A call that makes an object of a class, and the function around it."""

    file: File
    function: Function | None
    owner: ClassInfo | None
    call: ast.Call
    method: bool = False

    def argument(self, function: Function, name: str) -> ast.expr | None:
        """What the call gives an argument of a constructor; None if that is not to be seen."""
        for keyword in self.call.keywords:
            if keyword.arg == name:
                return keyword.value
        names = positional(function)
        place = names.index(name) - (not self.method) if name in names else -1
        before = self.call.args[: place + 1]
        if place < 0 or len(before) <= place or any(isinstance(value, ast.Starred) for value in before):
            return None
        return before[place]


def callers(classes: Classes, owner: ClassInfo) -> Iterator[Caller]:
    """Every call in the project that runs the constructor of a class, subclasses' included."""
    below = [info for info in classes.descendants(owner) if _constructor(classes, info) is owner]
    takers = {owner, *(info for info in below if "__init__" not in info.methods)}
    for file in classes.project:
        if any(file.mentions(taker.name) for taker in takers):
            for call in file.calls:
                if classes.project.resolve(file, call.func) in takers:
                    yield _caller(file, call)
    for info in (owner, *classes.descendants(owner)):
        for name, function in info.methods.items():
            own = function.args.args[0].arg if function.args.args else ""
            for call in (node for node in walk(function) if isinstance(node, ast.Call)):
                if isinstance(call.func, ast.Name) and call.func.id == own and own != "self" and info in takers:
                    yield Caller(info.file, function, info, call)  # cls(...)
                elif name == "__init__" and _is_base_call(classes, info, owner, call):
                    by_name = isinstance(call.func, ast.Attribute) and not isinstance(call.func.value, ast.Call)
                    yield Caller(info.file, function, info, call, by_name)


def _constructor(classes: Classes, info: ClassInfo) -> ClassInfo | None:
    found = classes.method(info, "__init__")
    return found[0] if found else None


def _is_base_call(classes: Classes, info: ClassInfo, owner: ClassInfo, call: ast.Call) -> bool:
    """Whether this is ``super().__init__(...)`` or ``Owner.__init__(self, ...)`` in a class below the owner."""
    func = call.func
    if info is owner or not isinstance(func, ast.Attribute) or func.attr != "__init__":
        return False
    if isinstance(func.value, ast.Call) and isinstance(func.value.func, ast.Name) and func.value.func.id == "super":
        return next((base for base in classes.ancestors(info) if "__init__" in base.methods), None) is owner
    return classes.project.resolve(info.file, func.value) is owner


def _caller(file: File, call: ast.Call) -> Caller:
    around = list(file.names.ancestors(call))
    place = next((i for i, node in enumerate(around) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))), -1)
    if place < 0:
        return Caller(file, None, None, call)
    function, outside = around[place], around[place + 1]
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    owner = file.class_info(outside) if isinstance(outside, ast.ClassDef) else None
    return Caller(file, function, owner, call)


def required(function: Function, name: str) -> bool:
    """Whether a function has to be given an argument, and not None."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    with_default = arguments[len(arguments) - len(function.args.defaults) :] if function.args.defaults else []
    only = [argument for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
            if default is None]  # fmt: skip
    found = next((a for a in (*arguments, *only) if a.arg == name), None)
    if found is None or found in with_default:
        return False
    parts = list(walk(found.annotation)) if found.annotation else []
    return not any(
        getattr(node, "id", getattr(node, "attr", "")) == "Optional"
        or (isinstance(node, ast.Constant) and node.value is None)
        for node in parts
    )
