"""What code changes beside the value that it gives, so that all ranks have to run it or none."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import walk, walk_own
from rewriter.analyze.training.instances import Instances

_DEEP = 3
_CHANGING = {
    "append", "appendleft", "extend", "extendleft", "insert", "add", "push", "put", "pop", "popleft", "popitem",
    "remove", "discard", "clear", "reset", "rotate", "sort", "reverse", "setdefault", "update", "subtract",
}  # fmt: skip
_DRAWING = {
    "random", "randint", "randrange", "integers", "choice", "choices", "shuffle", "permutation", "permuted", "normal",
    "uniform", "gauss", "sample", "rsample", "standard_normal", "rand", "randn", "randperm", "multinomial", "bernoulli",
    "rand_like", "randn_like", "randint_like", "random_", "normal_", "uniform_", "bernoulli_",
}  # fmt: skip
_CHANGING_FUNCTIONS = {
    "heapq.heappop", "heapq.heappush", "heapq.heappushpop", "heapq.heapreplace", "heapq.heapify", "bisect.insort",
    "setattr", "delattr", "builtins.setattr", "builtins.delattr",
}  # fmt: skip


def changes_state(file: File, instances: Instances, node: ast.AST, deep: int = 0) -> bool:
    """Whether code changes what code outside of it may read: a list, an attribute, an iterator, a generator's state."""
    own = {item.id for item in walk_own(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
    for item in walk(node):
        match item:
            case ast.NamedExpr() if deep == 0:
                return True
            case ast.Global() | ast.Nonlocal():
                return True
            case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
                if _root(item) not in own:
                    return True
            case ast.Call(func=ast.Name(id="next")):
                return True
            case ast.Call() if _calls(file, instances, item, own, deep):
                return True
    return False


def _calls(file: File, instances: Instances, call: ast.Call, own: set[str], deep: int) -> bool:
    """Whether a call changes what was there before."""
    func = call.func
    if deep < _DEEP:
        seen = list(functions(file, instances, func))
        if seen:
            return any(changes_state(info.file, instances, info.node, deep + 1) for info in seen)
    if instances.project.external(file, func) in _CHANGING_FUNCTIONS:
        return True
    if not isinstance(func, ast.Attribute):
        return False
    return func.attr in _DRAWING or (func.attr in _CHANGING and _root(func.value) not in own)


def functions(file: File, instances: Instances, func: ast.expr) -> Iterator[FunctionInfo]:
    """The functions of the project that a call may run: of an object whose class is not seen all of that name."""
    found = instances.project.resolve(file, func)
    if isinstance(found, FunctionInfo):
        yield found
    elif found is None and isinstance(func, ast.Attribute):
        known = instances.class_of(file, func.value) is not None
        yield from instances.methods(file, func) if known else instances.named(func.attr)


def _root(node: ast.AST) -> str:
    """``a`` of ``a.b[0].c``; nothing where it starts with anything else than a name."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
