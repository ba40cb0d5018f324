"""Functions of a project that make what they are given that of all ranks: ``reduce_dict(losses)``."""

from __future__ import annotations

import ast
import re

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import names_in, walk
from rewriter.analyze.read.project import Project

_PACKAGED = {"timm.utils.reduce_tensor", "timm.utils.distributed.reduce_tensor"}
_COLLECTIVES = {
    "all_reduce", "reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "gather", "gather_object",
}  # fmt: skip
_OF_RANKS = re.compile(r"world|rank|dist|initialized|replica|process|gpu", re.I)
_DEEP = 3


def gives_whole(project: Project, file: File, call: ast.Call, deep: int = 0) -> bool:
    """Whether a call gives what a collective has made of all ranks' values, wherever there are several."""
    if project.external(file, call.func) in _PACKAGED:
        return True
    function = project.resolve(file, call.func)
    return isinstance(function, FunctionInfo) and deep < _DEEP and _returns_whole(project, function, deep)


def _returns_whole(project: Project, function: FunctionInfo, deep: int) -> bool:
    file = function.file
    if not any(word in file.source.data for word in (b"reduce", b"gather")):
        return False
    own = [node for node in walk(function.node) if file.names.function_of(node) is function.node]
    whole, calls = set[str](), set[ast.AST]()
    for node in own:
        if isinstance(node, ast.Call):
            package, _, name = project.external(file, node.func).rpartition(".")
            if package.startswith(("torch.distributed", "bmtrain.distributed")) and name in _COLLECTIVES:
                whole |= names_in(node.args[0]) if node.args else set()
                calls.add(node)
            elif gives_whole(project, file, node, deep + 1):
                calls.add(node)
    if not calls:
        return False

    def is_whole(value: ast.AST) -> bool:
        return not names_in(value).isdisjoint(whole) or any(node in calls for node in walk(value))

    for _ in range(_DEEP):
        for node in own:
            match node:
                case ast.Assign(targets=targets, value=value) if is_whole(value):
                    whole |= {name for target in targets for name in names_in(target)}
                case ast.For(target=target, iter=value) if is_whole(value):
                    whole |= names_in(target)
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value]):
                    whole |= {name} if is_whole(value) else set()
    returned = [node for node in own if isinstance(node, ast.Return) and node.value is not None]
    told = [node for node in returned if node.value is not None and is_whole(node.value)]
    return bool(told) and all(node in told or _is_of_one(file, node) for node in returned)


def _is_of_one(file: File, node: ast.Return) -> bool:
    """Whether a test that asks for the number of ranks leads to a ``return``."""
    tests = (parent.test for parent in file.names.ancestors(node) if isinstance(parent, ast.If))
    return any(_OF_RANKS.search(file.source.code(test)) for test in tests)
