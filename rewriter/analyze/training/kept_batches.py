"""Objects that keep a rank's share of a batch, as by ``trainer.set_input(x, y)``, and numbers made of it later."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property

from rewriter.analyze.read.file import ClassInfo, File
from rewriter.analyze.read.nodes import dotted, names_in, read_out, walk, walk_own
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.shares import Place, assigned

_OF_KIND = {"device", "dtype", "ndim"}
_SIZES = {"shape", "size"}
_LOSS = re.compile(r"loss", re.I)
_DATA = re.compile(r"batch|data|sample|item|graph", re.I)
_ROUNDS = 3


class KeptBatches:
    """Answers for all files of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def numbers(self, file: File) -> Iterator[ast.expr]:
        """What a file reads out of batches that objects keep, or counts: ``(self.out > 0).float().mean().item()``.

        Behind the loop, in the code that made the object, any use of such a batch.
        """
        names = {name for kept in self._kept.values() for name in kept}
        roles = self.scripts.roles[file]
        for node in file.nodes if any(map(file.mentions, names)) else ():
            read = read_out(node)
            if isinstance(node, ast.AugAssign):
                sums = not _LOSS.search(dotted(node.target) or "") and roles.var(node.target) not in roles.losses
                if sums and self._is_made_of_kept(file, node.value, sizes=True):
                    yield node.value
            elif read is not None and self._is_made_of_kept(file, read):
                assert isinstance(node, ast.expr)
                yield node
            elif isinstance(node, ast.Attribute) and self._is_left(file, node):
                yield node

    def _is_made_of_kept(self, file: File, value: ast.expr, sizes: bool = False) -> bool:
        """Whether a value, or a name of its function that it is made of, is of such a batch, or else its size."""
        function = file.names.function_of(value)
        own = [item for statement in function.body for item in walk_own(statement)] if function is not None else []
        held = {
            item.targets[0].id: item.value
            for item in own
            if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name)
        }
        known = [value, *(held[item.id] for item in walk(value) if isinstance(item, ast.Name) and item.id in held)]
        return any(self._is_kept(file, item, sizes) for made in known for item in walk(made))

    def _is_left(self, file: File, node: ast.Attribute) -> bool:
        """``learner.out`` behind the loop, where ``learner = Learner()`` was made."""
        if not isinstance(node.value, ast.Name) or not isinstance(node.ctx, ast.Load):
            return False
        made = [item for item in file.names.values_of(node.value) if isinstance(item, ast.Call)]
        if not any(isinstance(self.scripts.project.resolve(file, item.func), ClassInfo) for item in made):
            return False
        return self.scripts.handed.around(file, node) is None and self._is_kept(file, node)

    def _is_kept(self, file: File, node: ast.AST, sizes: bool = False) -> bool:
        if not isinstance(node, ast.Attribute) or not any(node.attr in kept for kept in self._kept.values()):
            return False
        owner = file.names.class_of(node) if _own(node) else None
        info = file.class_info(owner) if owner is not None else self._class_of(file, node)
        if info is None or node.attr not in self._kept.get(info, ()):
            return False
        match file.names.parents[node]:
            case ast.Attribute(attr=attr):
                return attr not in _OF_KIND and (sizes or attr not in _SIZES)
            case ast.Call(func=ast.Name(id="len")):
                return sizes
            case ast.Subscript(slice=ast.Constant(value=0)):
                return False  # rank 0's first item is the batch's
        return True

    def _class_of(self, file: File, node: ast.Attribute) -> ClassInfo | None:
        """Whose attribute this is: of what a callback is given, ``trainer.out``, the class that has all it reads."""
        found = self.scripts.collectives.instances.class_of(file, node.value)
        function = file.names.function_of(node)
        if found is not None or function is None or not isinstance(node.value, ast.Name):
            return found
        given = {argument.arg for argument in function.args.args}
        if node.value.id not in given or _DATA.search(node.value.id):
            return None
        read = {
            item.attr
            for item in walk(function)
            if isinstance(item, ast.Attribute) and dotted(item.value) == node.value.id
        }
        having = (info for info, kept in self._kept.items() if node.attr in kept)
        return next((info for info in having if read <= _attributes(info)), None)

    @cached_property
    def _kept(self) -> dict[ClassInfo, set[str]]:
        """By class, the attributes that hold a share of a batch, or what is made of one without a loss."""
        found: dict[ClassInfo, set[str]] = {}
        for file in self.scripts.training:
            for place in list(self.scripts.handed.of(file)):
                for info, names in self._kept_in(file, place):
                    if not self.scripts.classes.is_module(info):
                        found.setdefault(info, set()).update(names)
        for info, kept in found.items():
            roles = self.scripts.roles[info.file]
            for _ in range(_ROUNDS):
                for method in info.methods.values():
                    made = _stored(method, set(), kept)
                    kept |= {n for n, at in made.items() if not _LOSS.search(n) and roles.var(at) not in roles.losses}
        return found

    def _kept_in(self, file: File, place: Place) -> Iterator[tuple[ClassInfo, set[str]]]:
        """What a loop stores in its object, and what the functions store that it hands its batch to."""
        kinds = self.scripts.handed.kinds(file, place)
        for node in kinds.nodes:
            match node:
                case ast.Assign(targets=[target], value=value):
                    pairs = assigned(target, value)
                    names = {_own(part) for part, given in pairs if _own(part) and kinds.kind(given) == "samples"}
                    owner = file.names.class_of(node)
                    if owner is not None and names:
                        yield file.class_info(owner), names
                case ast.Call() if kinds.of_batch(node):
                    for function in self.scripts.feeds.functions(file, node):
                        given = [(n, v) for n, v in function.given(node) if kinds.of_batch(v)]
                        names = {n for n, value in given if kinds.kind(value) in {"samples", "unknown"}}
                        owner = function.file.names.class_of(function.node)
                        if owner is not None and names:
                            yield function.file.class_info(owner), set(_stored(function.node, names, set()))


def _own(node: ast.expr) -> str:
    """``x`` of ``self.x``."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=attr):
            return attr
    return ""


def _attributes(info: ClassInfo) -> set[str]:
    """What objects of a class have, as far as it says so itself."""
    stored = {_own(item) for item in walk(info.node) if isinstance(item, ast.Attribute)}
    return stored | info.methods.keys()


def _stored(method: ast.AST, names: set[str], kept: set[str]) -> dict[str, ast.expr]:
    """The attributes of ``self`` that get something of names, or of other attributes, with where."""
    found: dict[str, ast.expr] = {}
    for node in walk_own(method):
        if isinstance(node, ast.Assign):
            of_batch = names_in(node.value) & names or any(
                isinstance(item, ast.Attribute) and _own(item) in kept for item in walk(node.value)
            )
            targets = [item for target in node.targets for item in getattr(target, "elts", [target])]
            found |= {_own(target): target for target in targets if of_batch and _own(target)}
    return found
