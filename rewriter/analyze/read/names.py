"""Which binding a name refers to: scopes of one file, parents of its nodes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from rewriter.analyze.read.nodes import children

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, *_COMPREHENSIONS)
_BINDERS = {
    *_SCOPES, ast.Name, ast.arg, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.ExceptHandler, ast.MatchAs,
    ast.MatchStar,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Import:
    """``from module import name`` (``level`` dots) or ``import module``; ``name`` empty means the module itself."""

    module: str
    name: str = ""
    level: int = 0


@dataclass(frozen=True, slots=True)
class Binding:
    """One place where a scope gives a name a value. ``value`` is the node of an import, class, function or alias."""

    node: ast.AST
    value: Import | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.expr | None
    fallback: bool = False


@dataclass(slots=True)
class Scope:
    node: ast.AST
    parent: Scope | None
    bindings: dict[str, list[Binding]] = field(default_factory=dict)
    outer_names: set[str] = field(default_factory=set)
    stars: list[Import] = field(default_factory=list)

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    def bind(self, name: str, binding: Binding) -> None:
        self.bindings.setdefault(name, []).append(binding)


class Names:
    """Parents and scopes of a file's nodes."""

    def __init__(self, tree: ast.Module) -> None:
        self.parents: dict[ast.AST, ast.AST] = {}
        self.nodes: list[ast.AST] = []
        self.scopes: dict[ast.AST, Scope] = {tree: Scope(tree, None)}
        self.module = self.scopes[tree]
        self._scope_of: dict[ast.AST, Scope] = {}
        self._collect(tree)

    def scope_of(self, node: ast.AST) -> Scope:
        """The scope in which the node's names are looked up."""
        found = self._scope_of.get(node)
        if found is None:
            found = self._scope_of[node] = self._find_scope(node)
        return found

    def _find_scope(self, node: ast.AST) -> Scope:
        child, current = node, self.parents.get(node)
        while current is not None:
            if isinstance(current, _SCOPES) and not self._evaluated_outside(child, current):
                return self.scopes[current]
            child, current = current, self.parents.get(current)
        return self.module

    def lookup(self, name: str, scope: Scope) -> tuple[Scope, list[Binding]] | None:
        """The scope that binds ``name`` as seen from ``scope``, and its bindings there."""
        current: Scope | None = scope
        first = True
        while current is not None:
            visible = first or not current.is_class
            if visible and name in current.bindings and name not in current.outer_names:
                return current, current.bindings[name]
            first = first and isinstance(current.node, _COMPREHENSIONS)
            current = current.parent
        return None

    def values_of(self, node: ast.Name) -> list[ast.expr]:
        """The expressions that a name is assigned, where it is seen from."""
        found = self.lookup(node.id, self.scope_of(node))
        return [b.value for b in found[1] if isinstance(b.value, ast.expr)] if found is not None else []

    def enclosing(self, node: ast.AST, kinds: tuple[type[ast.AST], ...]) -> ast.AST | None:
        current = self.parents.get(node)
        while current is not None and not isinstance(current, kinds):
            current = self.parents.get(current)
        return current

    def function_of(self, node: ast.AST) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        found = self.enclosing(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        return found if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)) else None

    def class_of(self, node: ast.AST) -> ast.ClassDef | None:
        found = self.enclosing(node, (ast.ClassDef,))
        return found if isinstance(found, ast.ClassDef) else None

    def statement_of(self, node: ast.AST) -> ast.stmt:
        current = node
        while not isinstance(current, ast.stmt):
            current = self.parents[current]
        return current

    def siblings(self, statement: ast.stmt) -> list[ast.stmt]:
        """The statement list that holds the statement."""
        parent = self.parents[statement]
        for name in ("body", "orelse", "finalbody"):
            block = getattr(parent, name, None)
            if isinstance(block, list) and any(item is statement for item in block):
                return block
        return [statement]

    def top_of(self, node: ast.AST) -> ast.AST:
        """The statement at the top of the file that a node belongs to."""
        while (parent := self.parents[node]) is not self.module.node:
            node = parent
        return node

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        current = self.parents.get(node)
        while current is not None:
            yield current
            current = self.parents.get(current)

    # Building --------------------------------------------------------------------------------------------------

    @staticmethod
    def _evaluated_outside(child: ast.AST, scope: ast.AST) -> bool:
        """Whether a direct child of a scope's node is evaluated in the surrounding scope."""
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return child in scope.decorator_list or child is scope.args or child is scope.returns
        if isinstance(scope, ast.ClassDef):
            return isinstance(child, (ast.expr, ast.keyword))
        if isinstance(scope, ast.Lambda):
            return child is scope.args
        return False

    def _collect(self, tree: ast.Module) -> None:
        stack: list[tuple[ast.AST, Scope, bool]] = [(tree, self.module, False)]
        parents, nodes = self.parents, self.nodes
        while stack:
            node, scope, fallback = stack.pop()
            nodes.append(node)
            inner = scope
            if node.__class__ in _BINDERS:
                if node is not tree and isinstance(node, _SCOPES):
                    inner = self.scopes[node] = Scope(node, scope)
                self._bind(node, scope, inner, fallback)
                fallback = fallback or isinstance(node, ast.ExceptHandler)
            for child in reversed(children(node)):
                parents[child] = node
                stack.append((child, inner, fallback))

    def _bind(self, node: ast.AST, scope: Scope, inner: Scope, fallback: bool) -> None:
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                target = scope
                if isinstance(self.parents.get(node), ast.NamedExpr):
                    while isinstance(target.node, _COMPREHENSIONS) and target.parent is not None:
                        target = target.parent
                target.bind(node.id, Binding(node, self._alias(node), fallback))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            scope.bind(node.name, Binding(node, node, fallback))
        elif isinstance(node, ast.arg):
            scope.bind(node.arg, Binding(node, None))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            self._bind_import(node, scope, fallback)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            scope.outer_names.update(node.names)
        elif (isinstance(node, ast.ExceptHandler) and node.name) or (
            isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name
        ):
            scope.bind(node.name, Binding(node, None))

    def _alias(self, node: ast.Name) -> ast.expr | None:
        parent = self.parents.get(node)
        if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and parent.targets[0] is node:
            return parent.value
        if isinstance(parent, ast.AnnAssign):
            return parent.value
        return None

    @staticmethod
    def _bind_import(node: ast.Import | ast.ImportFrom, scope: Scope, fallback: bool) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                if alias.asname:
                    scope.bind(alias.asname, Binding(node, Import(alias.name), fallback))
                else:
                    top = alias.name.split(".")[0]
                    scope.bind(top, Binding(node, Import(top), fallback))
            elif alias.name == "*":
                scope.stars.append(Import(node.module or "", "*", node.level))
            else:
                target = Import(node.module or "", alias.name, node.level)
                scope.bind(alias.asname or alias.name, Binding(node, target, fallback))
