"""Whether a loop is a chain: whether what one member computes goes into what a later one computes."""

from __future__ import annotations

import ast
from collections.abc import Callable

from rewriter.analyze.model.loops import Loop, is_pairs, iterated
from rewriter.analyze.read.nodes import walk

_MUTATING = {"append", "appendleft", "extend", "insert", "add", "update", "setdefault", "push", "put"}


def passes_on(loop: Loop) -> bool:
    """Whether what a member gives goes into what a later member gets: a result of calling it, its methods or parts."""
    bound = {node.id for node in walk(loop.node.target) if isinstance(node, ast.Name)}
    members = bound - {loop.index} if is_pairs(loop) else set()
    for node in (node for statement in loop.node.body for node in walk(statement)):
        if isinstance(node, ast.For) and any(map(loop.is_element, iterated(node))):
            part = node.target.elts[-1] if isinstance(node.target, ast.Tuple) else node.target
            members |= {part.id} if isinstance(part, ast.Name) else set()

    def is_member(node: ast.expr) -> bool:
        return loop.is_element(node) or (isinstance(node, ast.Name) and node.id in members)

    def has_member(call: ast.Call) -> bool:
        owner: ast.expr = call.func
        while isinstance(owner, (ast.Attribute, ast.Subscript)) and not is_member(owner):
            owner = owner.value
        return is_member(owner) or any(is_member(value) for value in _given(call))

    return carries(loop.node.body, bound, loop.me, has_member)


def carries(body: list[ast.stmt], fresh: set[str], me: str, is_call: Callable[[ast.Call], bool]) -> bool:
    """Whether the result of a call that ``is_call`` accepts may reach the arguments of such a call in a later turn.

    ``fresh`` are names that every turn binds to others, ``me`` is what the method calls its object. Lists and objects
    that get a value count as that value.
    """
    flow = _Flow(me, fresh, is_call)
    carried: set[str] = set()
    while True:
        flow.skipped = set()
        after = flow.run(body, carried - fresh, True) | flow.skipped | carried
        if after == carried:
            break
        carried = after
    flow.reached = False
    flow.run(body, carried - fresh, False)
    return flow.reached


class _Flow:
    """Follows results through names. Names that are given something else on every way lose what they had."""

    def __init__(self, me: str, fresh: set[str], is_call: Callable[[ast.Call], bool]) -> None:
        self.me = me
        self.fresh = fresh
        self.is_call = is_call
        self.reached = False
        self.skipped: set[str] = set()

    def run(self, body: list[ast.stmt], state: set[str], results: bool) -> set[str]:
        """The names that hold results after some statements; with ``results``, those of the statements' calls, too."""
        for statement in body:
            state = self._statement(statement, state, results)
        return state

    def _statement(self, node: ast.stmt, state: set[str], results: bool) -> set[str]:
        if isinstance(node, ast.If):
            self._look(node.test, state)
            return self.run(node.body, set(state), results) | self.run(node.orelse, set(state), results)
        if isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            head = node.test if isinstance(node, ast.While) else node.iter
            self._look(head, state)
            for _ in range(2):
                inner = set(state)
                if not isinstance(node, ast.While):
                    self._bind(node.target, head, inner, results)
                state = state | self.run(node.body, inner, results)
            return self.run(node.orelse, state, results)
        if isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                self._look(item.context_expr, state)
            return self.run(node.body, state, results)
        if isinstance(node, ast.Try):
            tried = state | self.run(node.body, set(state), results)
            handled = [self.run(handler.body, set(tried), results) for handler in node.handlers]
            return self.run(node.finalbody, self.run(node.orelse, tried, results).union(*handled), results)
        if isinstance(node, ast.Continue):
            self.skipped |= state
        return self._simple(node, state, results)

    def _simple(self, node: ast.stmt, state: set[str], results: bool) -> set[str]:
        self._look(node, state)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value, state, results)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._bind(node.target, node.value, state, results)
        elif isinstance(node, ast.AugAssign) and self._holds(node.value, state, results):
            self._mark(node.target, state)
        for call in (item for item in walk(node) if isinstance(item, ast.Call)):
            func = call.func
            if isinstance(func, ast.Attribute) and (func.attr in _MUTATING or func.attr.endswith("_")):
                if any(self._holds(value, state, results) for value in _given(call)):
                    self._mark(func.value, state)
        return state

    def _bind(self, target: ast.expr, value: ast.expr, state: set[str], results: bool) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            same = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            parts = value.elts if same and isinstance(value, (ast.Tuple, ast.List)) else [value] * len(target.elts)
            before = set(state)
            for item, part in zip(target.elts, parts, strict=True):
                self._give(item, self._holds(part, before, results), state)
        else:
            self._give(target, self._holds(value, state, results), state)

    def _give(self, target: ast.expr, holds: bool, state: set[str]) -> None:
        if isinstance(target, ast.Starred):
            target = target.value
        if isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self._give(item, holds, state)
        elif holds:
            self._mark(target, state)
        elif isinstance(target, ast.Name):
            state.discard(target.id)

    def _mark(self, node: ast.expr, state: set[str]) -> None:
        root = self._root(node)
        if root:
            state.add(f"{root}[]" if self._is_own(node) else root)

    def _look(self, node: ast.AST, state: set[str]) -> None:
        """Note whether a call that counts gets something that a turn before has computed."""
        for call in (item for item in walk(node) if isinstance(item, ast.Call)):
            if self.is_call(call) and any(self._holds(value, state, False) for value in _given(call)):
                self.reached = True

    def _holds(self, node: ast.AST, state: set[str], results: bool) -> bool:
        if isinstance(node, ast.Subscript) and self._is_own(node):
            return self._root(node.value) in state  # what turns before have put at their own places does not count
        if isinstance(node, (ast.Name, ast.Attribute)) and state & {self._root(node), f"{self._root(node)}[]"}:
            return True
        if results and isinstance(node, ast.Call) and self.is_call(node):
            return True
        return any(self._holds(child, state, results) for child in ast.iter_child_nodes(node))

    def _is_own(self, node: ast.expr) -> bool:
        """Whether this is ``things[i]`` with the loop's own ``i``."""
        return isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name) and node.slice.id in self.fresh

    def _root(self, node: ast.expr) -> str:
        """The name, or the attribute of the method's own object, that an expression is a part of."""
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.me:
                return f"{self.me}.{node.attr}"
            node = node.value
        return node.id if isinstance(node, ast.Name) and node.id != self.me else ""


def _given(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]
