"""The calls that go through an OptimManager: part of rule BMT022."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.managers import Manager, Managers
from rewriter.analyze.names import dotted
from rewriter.analyze.project import File
from rewriter.types import Edit, Span

Remark = tuple[int, str, bool]


def call_edits(file: File, facts: Facts, managers: Managers) -> Iterator[Edit | Remark]:
    """Edits of every backward, clip, step, zero_grad and scaler call of a file; remarks on those left."""
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
                yield from _optimizer(file, manager, node, node.func)
            elif node.func.attr == "zero_grad" and managers.roles.is_model(node.func.value):
                seen = managers.for_call(node)
                if seen is not None and not seen.existing:
                    yield Edit(file.source.span(node), (f"{seen.name}.zero_grad()",))


def _backward(
    file: File, facts: Facts, managers: Managers, node: ast.Call, func: ast.Attribute
) -> Iterator[Edit | Remark]:
    source, roles = file.source, managers.roles
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
    name = manager.name if manager is not None else f"{facts.alias(file)}.optim.OptimManager(loss_scale=None)"
    if manager is None and not roles.optimizers and not roles.scalers and function is None:
        return  # a demonstration that steps nothing
    if manager is None and roles.scalers:
        yield node.lineno, "backward here does not know the loss scale of the scaler elsewhere in the file", True
    if node.args or node.keywords:
        arguments = Span(source.span(func).end, source.span(node).end)
        yield Edit(source.span(node), (f"{name}.scale_loss(", source.span(loss), ").backward", arguments))
    else:
        yield Edit(source.span(node), (f"{name}.backward(", _bare(file, loss), ")"))


def _called(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node


def _bare(file: File, node: ast.expr) -> Span:
    """The span of an argument. Parentheses around it stay outside, as in ``(a / b).backward()``."""
    return file.source.span(node)


def _scaler(file: File, manager: Manager, node: ast.Call, func: ast.Attribute) -> Iterator[Edit | Remark]:
    source = file.source
    statement = file.names.statement_of(node)
    alone = isinstance(statement, ast.Expr) and statement.value is node
    if func.attr in {"unscale_", "update"} and alone:
        yield source.remove(statement)
    elif func.attr == "step":
        if len(node.args) > 1 or node.keywords:
            yield node.lineno, "step with a closure cannot be converted: every rank would have to call it alike", True
        yield Edit(source.span(node), (f"{manager.name}.step()",))
    elif func.attr == "get_scale":
        yield Edit(source.span(node), (f"{manager.name}.loss_scale",))
    elif func.attr == "is_enabled":
        yield Edit(source.span(node), (f"({manager.name}.loss_scale is not None)",))
    elif func.attr in {"state_dict", "load_state_dict"}:
        yield Edit(source.span(func.value), (manager.name,))
        yield node.lineno, f"the scaler's {func.attr} is now the manager's, which has another layout", False


def _optimizer(file: File, manager: Manager, node: ast.Call, func: ast.Attribute) -> Iterator[Edit | Remark]:
    if func.attr == "step":
        if node.args or node.keywords:
            yield node.lineno, "step with a closure cannot be converted: every rank would have to call it alike", True
        yield Edit(file.source.span(node), (f"{manager.name}.step()",))
    elif func.attr == "zero_grad":
        yield Edit(file.source.span(node), (f"{manager.name}.zero_grad()",))


def _in(function: str, span: Span) -> tuple[str | Span, ...]:
    return (f"{function}(", span, ")") if function else (span,)


def _clip(file: File, facts: Facts, managers: Managers, node: ast.Call) -> Iterator[Edit | Remark]:
    source, manager = file.source, managers.for_call(node)
    values = {keyword.arg: keyword.value for keyword in node.keywords}
    values.update(zip(("parameters", "max_norm", "norm_type"), node.args, strict=False))
    parameters, limit = values.get("parameters"), values.get("max_norm")
    if parameters is None or limit is None:
        yield node.lineno, "clip_grad_norm_ with arguments that are not understood", True
        return
    name = manager.name if manager is not None else f"{facts.alias(file)}.optim.OptimManager(loss_scale=None)"
    listed = isinstance(parameters, ast.List) or (
        isinstance(parameters, ast.Call) and dotted(parameters.func) == "list"
    )
    groups: tuple[str | Span, ...] = ('[{"params": ', *_in("" if listed else "list", source.span(parameters)), "}]")
    if manager is not None and len(manager.optimizers) == 1 and len(managers.all) == 1 and _whole(managers, parameters):
        groups = (f"{manager.optimizers[0][1]}.param_groups",)
    tail: tuple[str | Span, ...] = ()
    if "norm_type" in values:
        tail = (", norm_type=", source.span(values["norm_type"]))
    yield Edit(source.span(node), (f"{name}.clip_grad_norm(", *groups, ", ", source.span(limit), *tail, ")"))


def _whole(managers: Managers, node: ast.expr) -> bool:
    """Whether an expression is all parameters of the model."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parameters":
        path = (dotted(node.func.value) or "").removeprefix("self.")
        return "." not in path and managers.roles.is_model(node.func.value) and not node.args
    return False
