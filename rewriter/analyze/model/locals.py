"""What the names in one function stand for: arguments, defaults, lists that grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import Function, self_path, walk


class Locals:
    """The local names of a function; ``me`` is what a method calls its object."""

    def __init__(self, file: File, function: Function, method: bool) -> None:
        self.file = file
        self.function = function
        arguments = [*function.args.posonlyargs, *function.args.args]
        self.me = arguments[0].arg if arguments and method else ""

    @cached_property
    def assigned(self) -> dict[str, list[ast.expr]]:
        found: dict[str, list[ast.expr]] = {}
        for node in walk(self.function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                for target, value in _assignments(node.targets[0], node.value):
                    found.setdefault(target, []).append(value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found.setdefault(node.target.id, []).append(node.value)
        return found

    def value_of(self, name: ast.Name) -> ast.expr | None:
        """What a local name certainly stands for where it is used: the only thing it gets, or the last in any case."""
        values = self.assigned.get(name.id, [])
        if len(values) == 1:
            return values[0]
        always = [node.value for node in self.function.body if isinstance(node, ast.Assign) and node.value in values]
        last = max(values, key=lambda value: value.lineno, default=None)
        if last is None or last not in always:
            return None
        stored = [node for node in walk(self.function) if isinstance(node, ast.Name) and node.id == name.id]
        later = any(isinstance(node.ctx, ast.Store) and node.lineno > (last.end_lineno or 0) for node in stored)
        return None if later or name.lineno <= last.lineno else last

    def is_given(self, name: str) -> bool:
        """Whether a name is an argument of the function, and not given something else in any case."""
        arguments = self.function.args
        given_here = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if all(argument.arg != name for argument in given_here):
            return False
        always = (node for node in self.function.body if isinstance(node, ast.Assign))
        return not any(isinstance(target, ast.Name) and target.id == name for node in always for target in node.targets)

    @cached_property
    def defaults(self) -> dict[str, ast.expr]:
        """Defaults of the method's arguments: ``block_fn=Block``."""
        arguments = self.function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        found = dict(zip([a.arg for a in reversed(positional)], reversed(arguments.defaults), strict=False))
        found.update((a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d)
        return found

    def made_anew(self, node: ast.Name) -> bool:
        """Whether every loop around the use of a name assigns it too."""
        names = self.file.names
        around = [
            p for p in names.ancestors(node) if isinstance(p, (ast.For, ast.While, ast.ListComp, ast.GeneratorExp))
        ]
        stored = [
            n
            for n in walk(self.function)
            if isinstance(n, ast.Name) and n.id == node.id and n.ctx.__class__ is ast.Store
        ]
        return all(any(loop in names.ancestors(place) for place in stored) for loop in around)

    def appends(self, path: str, local: str) -> Iterator[ast.AST]:
        for node in walk(self.function):
            receiver: ast.expr | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in {"append", "extend", "insert", "add_module"}:
                    receiver = node.func.value
            elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
                receiver = node.target
            if receiver is None:
                continue
            if (local and isinstance(receiver, ast.Name) and receiver.id == local) or (
                path and self_path(receiver, self.me) == path
            ):
                yield node

    def stored_by_key(self, path: str, local: str) -> Iterator[ast.expr]:
        """Values of ``self.<path>[key] = value``."""
        for node in walk(self.function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Subscript):
                owner = node.targets[0].value
                if self_path(owner, self.me) == path or (local and isinstance(owner, ast.Name) and owner.id == local):
                    yield node.value


def _assignments(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Names and what they get, also of ``a, b = one, other``."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for name, part in zip(target.elts, value.elts, strict=True):
            yield from _assignments(name, part)
