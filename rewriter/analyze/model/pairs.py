"""Lists of pairs of modules whose loop body could be a method of the pair."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from rewriter.analyze.model.elements import FROM_ELSEWHERE, Build
from rewriter.analyze.model.loops import Loop
from rewriter.analyze.model.stacks import Stacks
from rewriter.analyze.read.file import ClassInfo
from rewriter.analyze.read.nodes import self_path, walk

_MUTATING = {"append", "extend", "insert", "pop", "update", "add", "setdefault", "remove", "clear"}
_REFUSED = (
    ast.Break, ast.Continue, ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.For, ast.While, ast.With, ast.Try,
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Delete, ast.Global, ast.Nonlocal,
    ast.NamedExpr, ast.Match, ast.AnnAssign,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pairs:
    """``self.<path>`` holds groups, one loop unpacks them; ``carried`` comes out of it, ``extra`` only goes in."""

    owner: ClassInfo
    path: str
    build: Build
    groups: tuple[ast.Call, ...]
    loop: Loop
    members: tuple[str, ...]
    carried: tuple[str, ...]
    extra: tuple[str, ...]


def find_pairs(stacks: Stacks) -> Iterator[Pairs]:
    """Lists of pairs at the outermost level that can be outlined."""
    for loop in stacks.loops:
        target = loop.node.target
        if loop.header != "pairs" or not isinstance(target, (ast.Tuple, ast.List)) or loop.node.orelse:
            continue
        members = tuple(item.id for item in target.elts if isinstance(item, ast.Name))
        builds = stacks.containers.of(loop.owner).get(loop.path, [])
        if len(members) != len(target.elts) or len(builds) != 1 or loop.owner in stacks.inside:
            continue
        groups = tuple(_groups(stacks, builds[0]))
        if not groups or len(groups) != len(builds[0].elements) or not _used_once(stacks, loop, builds[0]):
            continue
        flow = _Flow(loop, members).result()
        if flow is not None:
            yield Pairs(loop.owner, loop.path, builds[0], groups, loop, members, *flow)


def _groups(stacks: Stacks, build: Build) -> Iterator[ast.Call]:
    """The members that are plain ``nn.ModuleList([...])`` calls."""
    for element in build.elements:
        node = element.node
        if isinstance(node, ast.Call) and stacks.project.external(build.file, node.func) == "torch.nn.ModuleList":
            if len(node.args) == 1 and not node.keywords:
                yield node


def _used_once(stacks: Stacks, loop: Loop, build: Build) -> bool:
    """Whether nothing but the building and this loop touches the list, in subclasses too."""
    if stacks.classes.descendants(loop.owner) or build.form in {*FROM_ELSEWHERE, "repeated"}:
        return False
    allowed = {node for append in build.appends for node in walk(append)} | {loop.container}
    for function in loop.owner.methods.values():
        me = function.args.args[0].arg if function.args.args else ""
        for node in walk(function):
            if isinstance(node, ast.Attribute) and self_path(node, me) == loop.path:
                if node not in allowed and not isinstance(node.ctx, ast.Store):
                    return False
    return True


class _Flow:
    """What goes into the body of a loop and what comes out of it."""

    def __init__(self, loop: Loop, members: tuple[str, ...]) -> None:
        self.loop = loop
        self.members = members
        arguments = loop.function.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        within = [node for node in walk(loop.function) if isinstance(node, ast.comprehension)]
        self.own = {node for item in within for node in walk(item.target)}  # names of comprehensions
        stored = {
            node.id
            for node in walk(loop.function)
            if isinstance(node, ast.Name) and node not in self.own and not isinstance(node.ctx, ast.Load)
        }
        self.local = {argument.arg for argument in given if argument} | stored
        self.incoming: dict[str, None] = {}
        self.stored: dict[str, None] = {}

    def result(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        body = self.loop.node.body
        if not all(self._allowed(node) for statement in body for node in walk(statement)):
            return None
        self._block(body, set(self.members))
        if self.loop.me in self.incoming or any(name in self.stored for name in self.members):
            return None
        inside = {node for statement in body for node in walk(statement)}
        later = {n.id for n in walk(self.loop.function) if isinstance(n, ast.Name) and n not in inside
                 and isinstance(n.ctx, ast.Load)}  # fmt: skip
        carried = tuple(name for name in self.stored if name in self.incoming)
        lost = [name for name in (*self.stored, *self.members) if name in later and name not in self.incoming]
        if not carried or lost:
            return None
        return carried, tuple(name for name in self.incoming if name not in carried)

    @staticmethod
    def _allowed(node: ast.AST) -> bool:
        if isinstance(node, _REFUSED):
            return False
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            return False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return node.func.attr not in _MUTATING
        return True

    def _block(self, body: list[ast.stmt], defined: set[str]) -> set[str]:
        for statement in body:
            if isinstance(statement, ast.If):
                self._loads(statement.test, defined)
                sides = [self._block(side, set(defined)) for side in (statement.body, statement.orelse)]
                defined |= sides[0] & sides[1]
                continue
            self._loads(statement, defined)
            for node in walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in self.own:
                    self.stored.setdefault(node.id)
                    defined.add(node.id)
        return defined

    def _loads(self, node: ast.AST, defined: set[str]) -> None:
        for item in walk(node):
            if isinstance(item, ast.AugAssign) and isinstance(item.target, ast.Name):
                name = item.target.id
            elif isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load):
                name = item.id
            else:
                continue
            if name in self.local and name not in defined:
                self.incoming.setdefault(name)
