"""The calls that go through an OptimManager: part of rule BMT022."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.training.managers import Manager, Managers
from rewriter.changes import Change, Remove, replace
from rewriter.rules.manager_creation import UNSCALED
from rewriter.types import Refusal, Remark

CODE = "BMT022"
_CLOSURE = "step with a closure cannot be converted: every rank would have to call it alike"

Item = Change | Remark | Refusal


def changed_calls(file: File, facts: Facts, managers: Managers) -> Iterator[Item]:
    """Changes of every backward, clip, step, zero_grad and scaler call of a file; remarks on those left."""
    for node in file.calls:
        if facts.project.external(file, node.func) == "torch.nn.utils.clip_grad_norm_":
            yield from _clip(file, facts, managers, node)
        elif isinstance(node.func, ast.Attribute):
            variable = managers.roles.var(node.func.value)
            manager = managers.of.get(variable) if variable is not None else None
            if node.func.attr == "backward":
                yield from _backward(file, facts, managers, node, node.func)
            elif manager is not None and variable == manager.scaler:
                yield from _scaler(file, manager, node, node.func)
            elif manager is not None and variable in manager.optimizers:
                yield from _optimizer(manager, node, node.func)
            elif node.func.attr == "zero_grad" and managers.roles.is_model(node.func.value):
                seen = managers.for_call(node)
                if seen is not None and not seen.existing:
                    yield replace(node, f"{seen.name}.zero_grad()")


def _backward(file: File, facts: Facts, managers: Managers, node: ast.Call, func: ast.Attribute) -> Iterator[Item]:
    roles = managers.roles
    if roles.var(func.value) in roles.managers or facts.project.external(file, _called(func.value)).startswith(
        "bmtrain."
    ):
        return
    function = file.names.function_of(node)
    receiver = func.value
    if isinstance(receiver, ast.Call) and isinstance(receiver.func, ast.Name) and receiver.func.id == "super":
        return
    if function is not None and function.name in {"backward", "forward"}:
        return
    loss, manager = receiver, managers.for_call(node)
    if isinstance(receiver, ast.Call) and isinstance(receiver.func, ast.Attribute):
        scaling = roles.var(receiver.func.value)
        if receiver.func.attr == "scale_loss":
            return
        if receiver.func.attr == "scale" and scaling in managers.of and len(receiver.args) == 1:
            loss, manager = receiver.args[0], managers.of[scaling]
    name = manager.name if manager is not None else UNSCALED
    if manager is None and not roles.optimizers and not roles.scalers and function is None:
        return  # a demonstration that steps nothing
    if manager is None and roles.scalers:
        message = "backward here does not know the loss scale of the scaler elsewhere in the file"
        yield Refusal(CODE, node.lineno, message)
    if node.args or node.keywords:
        yield replace(func, f"{name}.scale_loss({{loss}}).backward", loss=loss)
    else:
        yield replace(node, f"{name}.backward({{loss}})", loss=loss)


def _called(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node


def _scaler(file: File, manager: Manager, node: ast.Call, func: ast.Attribute) -> Iterator[Item]:
    statement = file.names.statement_of(node)
    alone = isinstance(statement, ast.Expr) and statement.value is node
    if func.attr in {"unscale_", "update"} and alone:
        yield Remove(statement)
    elif func.attr == "step":
        if len(node.args) > 1 or node.keywords:
            yield Refusal(CODE, node.lineno, _CLOSURE)
        yield replace(node, f"{manager.name}.step()")
    elif func.attr == "get_scale":
        yield replace(node, f"{manager.name}.loss_scale")
    elif func.attr == "is_enabled":
        yield replace(node, f"({manager.name}.loss_scale is not None)")
    elif func.attr in {"state_dict", "load_state_dict"}:
        yield replace(func.value, manager.name)
        message = f"the scaler's {func.attr} is now the manager's, which has another layout"
        yield Remark(CODE, node.lineno, message)


def _optimizer(manager: Manager, node: ast.Call, func: ast.Attribute) -> Iterator[Item]:
    if func.attr == "step":
        if node.args or node.keywords:
            yield Refusal(CODE, node.lineno, _CLOSURE)
        yield replace(node, f"{manager.name}.step()")
    elif func.attr == "zero_grad":
        yield replace(node, f"{manager.name}.zero_grad()")


def _clip(file: File, facts: Facts, managers: Managers, node: ast.Call) -> Iterator[Item]:
    manager = managers.for_call(node)
    values = {keyword.arg: keyword.value for keyword in node.keywords}
    values.update(zip(("parameters", "max_norm", "norm_type"), node.args, strict=False))
    parameters, limit = values.get("parameters"), values.get("max_norm")
    if parameters is None or limit is None:
        yield Refusal(CODE, node.lineno, "clip_grad_norm_ with arguments that are not understood")
        return
    holes = {"limit": limit}
    if manager is not None and len(manager.optimizers) == 1 and len(managers.all) == 1 and _whole(managers, parameters):
        groups = f"{manager.optimizers[0][1]}.param_groups"
    else:
        called = dotted(parameters.func) if isinstance(parameters, ast.Call) else ""
        listed = isinstance(parameters, ast.List) or called == "list"
        groups = '[{"params": {parameters}}]' if listed else '[{"params": list({parameters})}]'
        holes["parameters"] = parameters
    norm_type = ""
    if "norm_type" in values:
        norm_type, holes["norm_type"] = ", norm_type={norm_type}", values["norm_type"]
    name = manager.name if manager is not None else UNSCALED
    yield replace(node, f"{name}.clip_grad_norm({groups}, {{limit}}{norm_type})", **holes)


def _whole(managers: Managers, node: ast.expr) -> bool:
    """Whether an expression is all parameters of the model."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parameters":
        path = (dotted(node.func.value) or "").removeprefix("self.")
        return "." not in path and managers.roles.is_model(node.func.value) and not node.args
    return False
