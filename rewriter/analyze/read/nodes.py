"""Syntax nodes: walking over them, and the dotted names that they spell."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = Function | ast.ClassDef
BENT = {"exp", "expm1", "exp2", "sqrt", "rsqrt", "log", "log2", "log10", "log1p"}
"""Functions of which the mean is another than that of what they are given: perplexities, roots of mean squares."""
OF_TWO = {"min", "max", "minimum", "maximum", "fmin", "fmax"}
"""Functions that give one of what they are given."""
_MODULES = {"math", "torch", "np", "numpy"}

_NO_NODES = {"ctx", "id", "attr", "kind", "conversion", "level", "module", "type_comment", "lineno", "asname"}
"""Fields that hold no node, or none that anybody asks for."""
_FIELDS = {
    kind: tuple(field for field in kind._fields if field not in _NO_NODES)
    for kind in vars(ast).values()
    if isinstance(kind, type) and issubclass(kind, ast.AST)
}
_FIELDS[ast.Constant] = ()
_BACKWARDS = {kind: fields[::-1] for kind, fields in _FIELDS.items()}


def children(node: ast.AST) -> list[ast.AST]:
    """The nodes right under a node, in source order."""
    found: list[ast.AST] = []
    for name in _FIELDS[node.__class__]:
        value = getattr(node, name, None)
        if value.__class__ is list:
            found += [item for item in value if item.__class__ in _FIELDS]
        elif value.__class__ in _FIELDS:
            found.append(value)
    return found


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all nodes under it in source order; a faster ``ast.walk``."""
    stack = [node]
    pop, push = stack.pop, stack.append
    while stack:
        current = pop()
        yield current
        for name in _BACKWARDS[current.__class__]:  # as children() has them, which is asked too often here
            value = getattr(current, name, None)
            if value.__class__ is list:
                stack += [item for item in value[::-1] if item.__class__ in _BACKWARDS]
            elif value.__class__ in _BACKWARDS:
                push(value)


def names_in(node: ast.AST) -> set[str]:
    """The names that are read or bound in ``node``."""
    return {item.id for item in walk(node) if isinstance(item, ast.Name)}


_GRAPH = {"retain_graph", "create_graph"}


def is_backward(node: ast.AST) -> bool:
    """``loss.backward(...)``, whatever ``loss`` is."""
    return loss_of(node) is not None


def loss_of(node: ast.AST) -> ast.expr | None:
    """What ``backward`` is called on, in ``loss.backward(...)``; None of every other node.

    ``torch.autograd.backward(loss)`` is that of a loss; with gradients, ``backward(y, dy)``, it is of none.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
        if not is_of_autograd(node.func):
            return node.func.value
        gradients = any(keyword.arg not in _GRAPH for keyword in node.keywords)
        return node.args[0] if len(node.args) == 1 and not gradients else None
    return None


def is_of_autograd(func: ast.Attribute) -> bool:
    """Whether ``backward`` is torch's function, ``torch.autograd.backward``."""
    return dotted(func.value) in {"torch.autograd", "autograd"}


def positional(function: Function) -> list[str]:
    """The names of the parameters that arguments without a keyword fill, ``self`` of a method among them."""
    return [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]


def all_arguments(call: ast.Call) -> list[ast.expr]:
    """What a call is given, with and without a keyword."""
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def item_of(loop: ast.For, given: Callable[[ast.Name], list[ast.expr]] | None = None) -> ast.expr:
    """What a loop calls an item, without the number that ``enumerate`` or a ``zip`` with ``range(9)`` gives it.

    ``given`` says which values a name has got: ``bar = tqdm(enumerate(loader))``, and then ``for i, x in bar``.
    """
    target = loop.target
    if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
        return target
    place = _beside_numbers(loop.iter, given, 0)
    return target if place is None else target.elts[place]


def _beside_numbers(node: ast.expr, given: Callable[[ast.Name], list[ast.expr]] | None, deep: int) -> int | None:
    """The place of the items in what an iterable gives with their numbers; ``None`` if it gives no numbers."""
    if isinstance(node, ast.Name) and given is not None and deep < 4:
        places = (_beside_numbers(value, given, deep + 1) for value in given(node))
        return next((place for place in places if place is not None), None)
    if not isinstance(node, ast.Call) or not node.args:
        return None
    called = (dotted(node.func) or "").split(".")[-1]
    if called in {"tqdm", "iter", "list", "track"}:
        return _beside_numbers(node.args[0], given, deep)
    if called == "zip" and len(node.args) == 2:
        return next((1 - place for place, part in enumerate(node.args) if _numbers(part)), None)
    return 1 if called == "enumerate" else None


def _numbers(node: ast.expr) -> bool:
    called = (dotted(node.func) or "").split(".")[-1] if isinstance(node, ast.Call) else ""
    return called in {"range", "trange", "count", "arange"}


def walk_own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement without those of functions and classes defined in it."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack += [
            child
            for child in children(current)
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))
        ]


def dotted(node: ast.AST) -> str | None:
    """``a.b.c`` for a chain of attributes on a name, else None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    parts.append(node.id)
    return ".".join(reversed(parts))


def self_path(node: ast.AST, me: str) -> str:
    """``a.b`` for ``self.a.b`` and ``self.a["b"]``, else an empty string."""
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            if node.attr != "_modules":  # the same members
                parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            if not isinstance(node.slice.value, str):
                return ""
            parts.append(node.slice.value)
            node = node.value
        else:
            break
    if not parts or not isinstance(node, ast.Name) or node.id != me or not me:
        return ""
    return ".".join(reversed(parts))


def same(left: ast.AST | None, right: ast.AST | None) -> bool:
    """Whether two pieces of code are equal but for layout."""
    if left is None or right is None:
        return left is right
    return ast.dump(left) == ast.dump(right)


def held_in(node: ast.expr) -> Iterator[ast.expr]:
    """What a display holds, whatever it is held in; else the value itself."""
    match node:
        case ast.Dict(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
            for part in parts:
                yield from held_in(part)
        case _:
            yield node


def assigned_by(statement: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Each target and what it is given, also in ``a, b = x, y``."""
    for target in statement.targets:
        match target, statement.value:
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                yield from zip(targets, values, strict=True)
            case _:
                yield target, statement.value


def read_out(node: ast.AST) -> ast.expr | None:
    """``x`` where ``x.item()``, ``x.tolist()``, ``x.numpy()``, ``float(x)`` or ``int(x)`` reads numbers."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr="item" | "tolist" | "numpy"), args=[]):
            return value
        case ast.Call(func=ast.Name(id="float" | "int"), args=[value]):
            return value
    return None


def reduction_of(call: ast.Call) -> object:
    """What stands in ``reduction=``; None if nothing does, or no constant."""
    return next((getattr(k.value, "value", None) for k in call.keywords if k.arg == "reduction"), None)


def bent(node: ast.AST) -> ast.expr | None:
    """``x`` of ``math.exp(x)``, ``x.log()`` and ``2 ** x``, of which a mean is another than that of ``x``."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=attr), args=[value]) if module in _MODULES:
            return value if attr in BENT else None
        case ast.Call(func=ast.Attribute(value=value, attr=attr), args=[], keywords=[]) if attr in BENT:
            return value
        case ast.BinOp(left=base, op=ast.Pow(), right=value) if _is_base(base):
            return value
        case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr="pow" | "power"), args=[base, value]):
            return value if module in _MODULES and _is_base(base) else None
    return None


def _is_base(node: ast.expr) -> bool:
    """``2`` of ``2 ** x``, ``math.e``."""
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Attribute) and node.attr == "e")
