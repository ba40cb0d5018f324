"""The one call of a list that does what a loop over it does, where there is one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rewriter.analyze.model.checkpoints import collapse_checkpoint
from rewriter.analyze.model.flow import certain_names, names
from rewriter.analyze.model.loops import Loop, stored_names
from rewriter.analyze.read.nodes import dotted, self_path, walk
from rewriter.analyze.read.project import Project


@dataclass(frozen=True)
class CallForm:
    """``targets = container(carried + extras)``: what a loop becomes."""

    targets: tuple[str, ...]
    call: ast.Call
    checkpoint: bool = False


def call_form(loop: Loop, project: Project) -> CallForm | str:
    """The one call that does what the loop does, or the reason why there is none that provably does."""
    if loop.node.orelse:
        return "the loop has an else branch"
    reason = _header_reason(loop)
    if reason:
        return reason
    if len(loop.node.body) != 1:
        return "the body does more than call the block"
    statement, checkpoint = loop.node.body[0], False
    if isinstance(statement, ast.If):
        collapsed = collapse_checkpoint(loop.file, loop.is_element, statement, project)
        if isinstance(collapsed, str):
            return collapsed
        statement, checkpoint = collapsed, True
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return "the body does not assign the block's result"
    call = statement.value
    if not isinstance(call, ast.Call) or not loop.is_element(call.func):
        return "the body is not a plain call of the block"
    targets = _targets(statement.targets[0])
    if not targets:
        return "the result goes somewhere else than into plain names"
    reason = _argument_reason(loop, call, targets) or _escape_reason(loop)
    return reason or CallForm(targets, call, checkpoint)


def _header_reason(loop: Loop) -> str:
    if loop.header == "plain" or (loop.header == "enumerate" and loop.element):
        return ""
    if loop.header == "range":
        source = loop.node.iter
        assert isinstance(source, ast.Call)
        length = source.args[0] if len(source.args) == 1 else None
        if isinstance(length, ast.Call) and dotted(length.func) == "len" and len(length.args) == 1:
            if self_path(length.args[0], loop.me) == loop.path:
                return ""
        return "the range is not provably the length of the list"
    reasons = {
        "zip": "each block gets arguments of its own (zip)",
        "slice": "only a slice of the list runs",
        "reversed": "the list runs in reverse",
        "values": "the list is iterated through a method",
        "pairs": "the members are pairs, not blocks",
    }
    return reasons.get(loop.header, "the iteration is not a plain one")


def _targets(node: ast.expr) -> tuple[str, ...]:
    names = node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    found = tuple(name.id for name in names if isinstance(name, ast.Name))
    distinct = len(set(found)) == len(names) and (len(found) > 1 or isinstance(node, ast.Name))
    return found if distinct else ()


def _argument_reason(loop: Loop, call: ast.Call, targets: tuple[str, ...]) -> str:
    carried = [_name(argument) for argument in call.args[: len(targets)]]
    if tuple(carried) != targets:
        return "what is carried from block to block is not what the first arguments are"
    stored = {*targets, loop.element, loop.index, *stored_names(loop.node.body)}
    own = {"return_hidden_states", "self"} & {keyword.arg for keyword in call.keywords}
    if own:
        return f"the list has an argument named {own.pop()} of its own"
    vararg = loop.function.args.vararg
    for argument in call.args[len(targets) :]:
        if isinstance(argument, ast.Starred) and (vararg is None or dotted(argument.value) != vararg.arg):
            return "what is passed with a star may be used up by the first block"
    values = [*call.args[len(targets) :], *(keyword.value for keyword in call.keywords)]
    values = [value.value if isinstance(value, ast.Starred) else value for value in values]
    if not all(_invariant(value, stored, loop) for value in values):
        return "an argument is not the same for every block"
    known = certain_names(loop.function, loop.node)
    if not all(name.id in known for value in values for name in names(value)):
        return "an argument has perhaps no value when there are no blocks"
    return ""


def _invariant(node: ast.expr, stored: set[str], loop: Loop) -> bool:
    """Whether evaluating an expression once instead of once a block cannot make a difference."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.Name):
        return node.id not in stored
    if isinstance(node, ast.Attribute):
        # Only the module's own: of another object that is None, or that a block changes, it would differ.
        set_by_others = rf"(?<!\b{loop.me})\.{node.attr}\s*(?:[-+*/%@&|^]|//|\*\*)?=(?!=)".encode()
        mine = dotted(node) == f"{loop.me}.{node.attr}" and node.attr not in loop.owner.methods
        return mine and not re.search(set_by_others, loop.file.source.data)
    if isinstance(node, (ast.Tuple, ast.List)):
        # A fresh list a call could be changed by a block; a tuple cannot.
        return isinstance(node, ast.Tuple) and all(_invariant(item, stored, loop) for item in node.elts)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant) or (
            isinstance(node.op, ast.Not) and _invariant(node.operand, stored, loop)
        )
    return False


def _escape_reason(loop: Loop) -> str:
    """Whether a name of the loop's header is used after it, or in its body otherwise than allowed."""
    own = {name for name in (loop.element, loop.index) if name}
    nodes = list(walk(loop.function))
    if any(isinstance(node, (ast.Global, ast.Nonlocal)) and own & set(node.names) for node in nodes):
        return "the loop variable outlives the loop"
    if any(isinstance(node, ast.Call) and dotted(node.func) in {"locals", "eval", "exec"} for node in nodes):
        return "the function reads its variables by name"
    inside = set(walk(loop.node))
    rebound = {found for other in nodes if other is not loop.node for found in _rebound(other)}
    for node in nodes:
        if isinstance(node, ast.Name) and node.id in own and not isinstance(node.ctx, ast.Store):
            if node not in inside and (node.id, node) not in rebound:
                return "the loop variable is used after the loop"
    uses = sum(1 for s in loop.node.body for n in walk(s) if isinstance(n, ast.Name) and n.id == loop.index)
    allowed = len(list(loop.calls())) if loop.header == "range" else 0
    return "the index is used in the body" if loop.index and uses > allowed else ""


def _rebound(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names that a loop or comprehension gives values of its own, each with all that it means in there."""
    if isinstance(node, ast.For):
        targets, inside = [node.target], [item for statement in node.body for item in walk(statement)]
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        first = set(walk(node.generators[0].iter))  # what it runs over is looked up outside
        targets, inside = [g.target for g in node.generators], [item for item in walk(node) if item not in first]
    else:
        return
    for name in (item.id for target in targets for item in walk(target) if isinstance(item, ast.Name)):
        yield from ((name, item) for item in inside)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
