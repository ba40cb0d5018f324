"""The files of a project and what a name in one of them means."""

from __future__ import annotations

import ast
import os.path
from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from itertools import product
from pathlib import Path

from rewriter.analyze.read.file import (
    ClassInfo,
    External,
    File,
    ModuleRef,
    Resolved,
    base_names,
    canonical,
)
from rewriter.analyze.read.names import Binding, Import, Scope
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.read.source import Source
from rewriter.types import InputError

# Names that a snippet without imports (a notebook cell, stdin) may use.
_UNBOUND = {"torch": "torch", "nn": "torch.nn", "F": "torch.nn.functional"}
# Packages whose names the rules know; they are never looked up as files.
_NEVER_PROJECT = {"torch", "bmtrain"}
_ADDING = {"sys.path.append", "sys.path.insert", "sys.path.extend", "site.addsitedir"}
_DEEP = 6


class Project:
    """Files by path, resolution of names across them.

    ``derived`` says which files have classes with a base of some name; files that are not loaded yet may be among them.
    """

    def __init__(self, roots: Iterable[Path] = (), derived: dict[bytes, list[Path]] | None = None) -> None:
        self.files: dict[Path, File] = {}
        self.derived: dict[bytes, list[Path]] = derived if derived is not None else {}
        self.partial = derived is not None
        self.roots = [root.resolve() for root in roots]
        self._missing: set[Path] = set()
        self._modules: dict[tuple[Path, str, int], File | None] = {}
        self._members: dict[tuple[File, str], Resolved] = {}
        self._resolved: dict[ast.AST, Resolved] = {}
        self._directories: dict[Path, tuple[Path, ...]] = {}

    def add(self, source: Source, convert: bool = True) -> File:
        file = File(source, convert)
        path = source.path.resolve()
        self.files[path] = file
        if not self.partial:
            for name in base_names(source.data):
                self.derived.setdefault(name, []).append(path)
        return file

    def with_base(self, name: str) -> Iterator[File]:
        """Files in which some class has a base of this name."""
        for path in self.derived.get(name.encode(), ()):
            file = self.files.get(path) or self._read(path)
            if file is not None:
                yield file

    def __iter__(self) -> Iterator[File]:
        return iter(list(self.files.values()))

    # Modules ---------------------------------------------------------------------------------------------------

    def _search_path(self, file: File) -> tuple[Path, ...]:
        folder = file.folder
        if folder not in self._directories:
            top = folder
            while (top / "__init__.py").exists() and top.parent != top:
                top = top.parent
            above = [parent for parent in top.parents if any(parent.is_relative_to(root) for root in self.roots)]
            self._directories[folder] = tuple(
                dict.fromkeys([top, folder, *self.roots, *(r.parent for r in self.roots), *above, *self._added])
            )
        return self._directories[folder]

    @cached_property
    def _added(self) -> tuple[Path, ...]:
        """The folders of the project that its files put on the path: ``sys.path.append("core")``."""
        found: dict[Path, None] = {}
        known = {folder for path in self.files for folder in path.parents}
        for file in self:
            if b"sys.path" not in file.source.data and b"addsitedir" not in file.source.data:
                continue
            for named in {text for node in file.nodes for value in _put_on_path(node) for text in _paths(file, value)}:
                for start in (file.folder, file.folder.parent, *self.roots) if named else ():
                    folder = Path(os.path.normpath(start / named.lstrip("/")))
                    if folder in known:
                        found[folder] = None
        return tuple(found)

    def find_module(self, name: str, origin: File, level: int = 0) -> File | None:
        """The project's file that an import of ``name`` in another file reaches."""
        key = (origin.folder, name, level)
        if key not in self._modules:
            self._modules[key] = self._find_module(name, origin, level)
        return self._modules[key]

    def _find_module(self, name: str, origin: File, level: int) -> File | None:
        parts = [part for part in name.split(".") if part]
        if not level and parts and parts[0] in _NEVER_PROJECT:
            return None
        if level:
            folder = origin.folder
            for _ in range(level - 1):
                folder = folder.parent
            return self._module_at(folder, parts)
        for folder in self._search_path(origin):
            found = self._module_at(folder, parts)
            if found is not None:
                return found
        return None

    def _module_at(self, folder: Path, parts: list[str]) -> File | None:
        base = folder.joinpath(*parts)
        candidates = [base / "__init__.py"]
        if parts:
            candidates.insert(0, base.with_name(base.name + ".py"))
        for path in candidates:
            file = self.files.get(path) or self._read(path)
            if file is not None:
                return file
        return None

    def _read(self, path: Path) -> File | None:
        """A module next to the given files: read for its meaning, not converted."""
        if path in self._missing:
            return None
        try:
            if path.is_file() and path.stat().st_size < 4_000_000:
                return self.add(Source(path, path.read_bytes()), convert=False)
        except (OSError, InputError):
            pass
        self._missing.add(path)
        return None

    def imported(self, file: File) -> set[File]:
        """The project's files that the imports at the top of a file reach, or take names from."""
        found: set[File] = set()
        for bindings in file.names.module.bindings.values():
            for binding in bindings:
                reached = self._import(file, binding.value, 0) if isinstance(binding.value, Import) else None
                if reached is not None and not isinstance(reached, External):
                    found.add(reached.file)
        return found

    # Names -----------------------------------------------------------------------------------------------------

    def resolve(self, file: File, node: ast.AST, depth: int = 0) -> Resolved:
        """What an expression made of names and attributes refers to; None when that is not certain."""
        if depth > 20:
            return None
        if node not in self._resolved:
            self._resolved[node] = self._resolve(file, node, depth)
        return self._resolved[node]

    def _resolve(self, file: File, node: ast.AST, depth: int) -> Resolved:
        if isinstance(node, ast.Subscript):
            return self.resolve(file, node.value, depth + 1)
        if isinstance(node, ast.Name):
            scope = file.names.scope_of(node)
            found = file.names.lookup(node.id, scope)
            if found is not None and found[0] is scope and len(found[1]) > 1:
                return self._bound(file, _made_before(file, node, found[1]), depth)
            return self._name(file, node.id, scope, depth)
        if isinstance(node, ast.Attribute):
            return self._member(self.resolve(file, node.value, depth + 1), node.attr, depth)
        return None

    def meanings(self, file: File, node: ast.Name) -> list[Resolved]:
        """All that a name refers to where it is bound more than once."""
        found = file.names.lookup(node.id, file.names.scope_of(node))
        return [self._value(file, binding, 1) for binding in found[1]] if found is not None else []

    def external(self, file: File, node: ast.AST) -> str:
        """The canonical dotted name of something outside the project, else an empty string."""
        found = self.resolve(file, node)
        return found.name if isinstance(found, External) else ""

    def calls_of(self, files: Iterable[File], names: Container[str]) -> Iterator[tuple[File, ast.Call]]:
        """The calls in ``files`` of what has one of these names, outside the project."""
        return ((f, c) for f in files for c in f.calls if self.external(f, c.func) in names)

    def member(self, file: File, name: str) -> Resolved:
        """What a module's own name refers to."""
        return self._member(ModuleRef(file), name, 0)

    def _name(self, file: File, name: str, scope: Scope, depth: int) -> Resolved:
        found = file.names.lookup(name, scope)
        if found is None:
            for star in file.names.module.stars:
                module = self.find_module(star.module, file, star.level)
                if module is None and star.module.startswith("torch") and star.level == 0:
                    return External(canonical(f"{star.module}.{name}"))
                if module is not None and module is not file and (module.mentions(name) or module.mentions("import *")):
                    member = self._member(ModuleRef(module), name, depth + 1)
                    if member is not None:
                        return member
            return External(_UNBOUND[name]) if name in _UNBOUND else None
        return self._bound(file, found[1], depth)

    def _bound(self, file: File, bindings: list[Binding], depth: int) -> Resolved:
        certain = [binding for binding in bindings if not binding.fallback] or bindings
        results = [self._value(file, binding, depth) for binding in certain]
        first = results[0]
        if all(isinstance(binding.value, Import) for binding in certain):
            return first
        if all(isinstance(binding.value, (ast.ClassDef, ast.FunctionDef)) for binding in certain):
            return results[-1]
        return first if len(results) == 1 else None

    def _value(self, file: File, binding: Binding, depth: int) -> Resolved:
        value = binding.value
        if isinstance(value, Import):
            return self._import(file, value, depth)
        if isinstance(value, ast.ClassDef):
            return file.class_info(value)
        if isinstance(value, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return file.function_info(value)
        if isinstance(value, (ast.Name, ast.Attribute)):
            return self.resolve(file, value, depth + 1)
        return None

    def _import(self, file: File, target: Import, depth: int) -> Resolved:
        if not target.name:
            module = self.find_module(target.module, file)
            return ModuleRef(module) if module is not None else External(canonical(target.module))
        module = self.find_module(target.module, file, target.level)
        if module is not None:
            member = self._member(ModuleRef(module), target.name, depth + 1) if module is not file else None
            if member is not None:
                return member
        dotted_name = f"{target.module}.{target.name}" if target.module else target.name
        submodule = self.find_module(dotted_name, file, target.level)
        if submodule is not None and submodule is not file:
            return ModuleRef(submodule)
        if module is not None or target.level:
            return None
        return External(canonical(dotted_name))

    def _member(self, owner: Resolved, name: str, depth: int) -> Resolved:
        if depth > 20:
            return None
        if isinstance(owner, External):
            return External(canonical(f"{owner.name}.{name}"))
        if isinstance(owner, ModuleRef):
            key = owner.file, name
            if key not in self._members:
                self._members[key] = None  # while it is being looked up, for modules that import each other
                self._members[key] = self._module_member(owner.file, name, depth)
            return self._members[key]
        if isinstance(owner, ClassInfo):
            for item in owner.node.body:
                if isinstance(item, ast.ClassDef) and item.name == name:
                    return owner.file.class_info(item)
        return None

    def _module_member(self, file: File, name: str, depth: int) -> Resolved:
        """A name of a module: bound there, a module of the package, or got by a star import."""
        bound = file.mentions(name) and name in file.names.module.bindings
        found = self._name(file, name, file.names.module, depth + 1) if bound else None
        found = found or self._submodule(file, name)
        if found is None and not bound and file.mentions("import *"):
            return self._name(file, name, file.names.module, depth + 1)
        return found

    def _submodule(self, package: File, name: str) -> Resolved:
        if package.path.name != "__init__.py":
            return None
        found = self._module_at(package.folder, [name])
        return ModuleRef(found) if found is not None else None


def _made_before(file: File, name: ast.Name, bindings: list[Binding]) -> list[Binding]:
    """What a name is bound to in front of where it is used, in the same scope; all, if a loop comes back to it."""
    place = _place(name)
    later = [binding for binding in bindings if place != (0, 0) and _place(binding.node) > place]
    above = {parent for parent in file.names.ancestors(name) if isinstance(parent, (ast.For, ast.While))}
    if len(later) == len(bindings) or any(not above.isdisjoint(file.names.ancestors(b.node)) for b in later):
        return bindings
    return [binding for binding in bindings if binding not in later]


def _place(node: ast.AST) -> tuple[int, int]:
    """Where a node stands; (0, 0) if it was made by no file."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _put_on_path(node: ast.AST) -> list[ast.expr]:
    """What Python is to find modules in, too: ``sys.path.insert(0, folder)``, ``sys.path += [folder]``."""
    match node:
        case ast.Call(func=func, args=[*_, value]) if dotted(func) in _ADDING:
            return [value]
        case ast.Assign(targets=[target], value=value) | ast.AugAssign(target=target, value=value):
            return (
                [value] if dotted(target.value if isinstance(target, ast.Subscript) else target) == "sys.path" else []
            )
    return []


def _paths(file: File, node: ast.AST, deep: int = 0) -> set[str]:
    """The paths that an expression may be, without what comes in front: ``lib`` for ``join(here, "lib")``."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.Attribute(attr="pardir"):
            return {".."}
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return set().union(*(_paths(file, item, deep + 1) for item in items))
        case ast.Name() if deep < _DEEP:
            return set().union(*(_paths(file, value, deep + 1) for value in _given(file, node)))
        case ast.Call() | ast.BinOp() | ast.Attribute() | ast.JoinedStr() | ast.FormattedValue() | ast.Subscript():
            parts = [_paths(file, child, deep + 1) or {""} for child in ast.iter_child_nodes(node)]
            return {"/".join(filter(None, chosen)) for chosen in product(*parts)} - {""}
    return set()


def _given(file: File, name: ast.Name) -> list[ast.expr]:
    """What a name is assigned, goes through in a loop, or is given as a parameter where its function is called."""
    found = file.names.lookup(name.id, file.names.scope_of(name))
    values = file.names.values_of(name)
    for binding in found[1] if found is not None else ():
        match file.names.parents.get(binding.node), binding.node:
            case ast.For(iter=iterated, target=target), target_:
                values += [iterated] if target is target_ else []
            case ast.arguments(args=listed), ast.arg():
                function = file.names.function_of(binding.node)
                calls = [call for call in file.calls if function is not None and dotted(call.func) == function.name]
                values += [call.args[listed.index(binding.node)] for call in calls if len(call.args) == len(listed)]
    return values
