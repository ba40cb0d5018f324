"""Branches that choose between calling a block and checkpointing it."""

from __future__ import annotations

import ast
from collections.abc import Callable

from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, positional, self_path, walk
from rewriter.analyze.read.project import Project


def collapse_whole(branch: ast.If, path: str, me: str) -> ast.Assign | None:
    """Plain side of ``if saving: x = checkpoint_seq(self.blocks, x) else: x = self.blocks(x)``, if both do the same."""
    if len(branch.body) != 1 or len(branch.orelse) != 1:
        return None
    plain: ast.Assign | None = None
    saved: ast.Assign | None = None
    for side in (branch.body[0], branch.orelse[0]):
        if not isinstance(side, ast.Assign) or not isinstance(side.value, ast.Call):
            return None
        call = side.value
        if self_path(call.func, me) == path:
            plain = side
        elif call.args and self_path(call.args[0], me) == path and "checkpoint" in (dotted(call.func) or ""):
            saved = side
    if plain is None or saved is None or not _pure_test(branch.test):
        return None
    return plain if _same_call(plain, saved) else None


_CHECKPOINTS = {"torch.utils.checkpoint.checkpoint", "torch.utils.checkpoint"}
_CHECKPOINT_OPTIONS = {"use_reentrant", "preserve_rng_state", "determinism_check", "context_fn", "debug", "early_stop"}


def collapse_checkpoint(
    file: File, is_element: Callable[[ast.AST], bool], branch: ast.If, project: Project
) -> ast.Assign | str:
    """The plain assignment of ``if saving: h = checkpoint(m, h) else: h = m(h)`` when both sides make the same call."""
    general = "the body is conditional"
    if len(branch.body) != 1 or len(branch.orelse) != 1:
        return general
    sides = [branch.body[0], branch.orelse[0]]
    if not all(isinstance(side, ast.Assign) and isinstance(side.value, ast.Call) for side in sides):
        return general
    plain: ast.Assign | None = None
    saved: ast.Assign | None = None
    for side in sides:
        assert isinstance(side, ast.Assign) and isinstance(side.value, ast.Call)
        if is_element(side.value.func):
            plain = side
        elif is_checkpoint(file, side.value, project) and side.value.args and is_element(side.value.args[0]):
            saved = side
    if plain is None or saved is None:
        return general
    if not _pure_test(branch.test):
        return "the checkpoint branch depends on more than a flag"
    if not _same_call(plain, saved):
        return "the two branches of the checkpoint test make different calls"
    return plain


def is_checkpoint(file: File, call: ast.Call, project: Project) -> bool:
    """Whether a call is torch's checkpoint, a function around it, or one known by name only."""
    found = project.resolve(file, call.func)
    if isinstance(found, External) and found.name in _CHECKPOINTS:
        return True
    if isinstance(found, FunctionInfo):
        return _only_checkpoints(found.file, found.node, project)
    owner, _, name = (dotted(call.func) or "").rpartition(".")
    if name not in {"checkpoint", "_gradient_checkpointing_func"}:
        return False
    holder = file.names.class_of(call) if owner else None
    method = _method(file.class_info(holder), name, project) if holder is not None else None
    return method is None or _only_checkpoints(method[0], method[1], project)


def _method(info: ClassInfo, name: str, project: Project) -> tuple[File, Function] | None:
    """A method of a class or of its bases in the project."""
    if name in info.methods:
        return info.file, info.methods[name]
    bases = (project.resolve(info.file, base) for base in info.node.bases)
    found = (_method(base, name, project) for base in bases if isinstance(base, ClassInfo) and base is not info)
    return next((method for method in found if method is not None), None)


def _only_checkpoints(file: File, function: Function, project: Project) -> bool:
    """Whether a function does nothing but to call its first argument with the others, by torch's checkpoint perhaps."""
    given = positional(function)
    given = given[1:] if given[:1] == ["self"] else given
    rest = {*given[1:], *(a.arg for a in (function.args.vararg, function.args.kwarg) if a)}
    returned = [node.value for node in walk(function) if isinstance(node, ast.Return)]
    for value in returned:
        if not isinstance(value, ast.Call) or not given:
            return False
        saved = project.external(file, value.func) in _CHECKPOINTS
        parts = [value.args[0] if saved and value.args else value.func, *value.args[saved:]]
        names = [part.value if isinstance(part, ast.Starred) else part for part in parts]
        ids = [part.id if isinstance(part, ast.Name) else "" for part in names]
        if ids[0] != given[0] or not set(ids[1:]) <= rest:
            return False
    return bool(returned)


def _pure_test(test: ast.expr) -> bool:
    for node in walk(test):
        if isinstance(node, ast.Call):
            name = (dotted(node.func) or "").split(".")[-1]
            if name not in {
                "is_scripting",
                "is_tracing",
                "is_grad_enabled",
                "getattr",
                "hasattr",
                "isinstance",
                "bool",
            }:
                return False
        if isinstance(node, (ast.NamedExpr, ast.Await, ast.Yield)):
            return False
    return True


def _same_call(plain: ast.Assign, saved: ast.Assign) -> bool:
    left, right = plain.value, saved.value
    assert isinstance(left, ast.Call) and isinstance(right, ast.Call)
    keywords = [keyword for keyword in right.keywords if keyword.arg not in _CHECKPOINT_OPTIONS]
    if ast.dump(plain.targets[0]) != ast.dump(saved.targets[0]):
        return False
    if [ast.dump(item) for item in left.args] != [ast.dump(item) for item in right.args[1:]]:
        return False
    ordered = [sorted(ast.dump(keyword) for keyword in found) for found in (left.keywords, keywords)]
    return ordered[0] == ordered[1]
