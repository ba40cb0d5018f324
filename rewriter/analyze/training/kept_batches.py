"""Objects that keep a rank's share of a batch, as by ``trainer.set_input(x, y)``, and numbers made of it later."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property

from rewriter.analyze.read.file import ClassInfo, File
from rewriter.analyze.read.nodes import names_in, read_out, walk, walk_own
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.shares import Place, assigned

_OF_KIND = {"device", "dtype", "ndim", "shape", "size"}
_LOSS = re.compile(r"loss", re.I)
_ROUNDS = 3


class KeptBatches:
    """Answers for all files of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts

    def numbers(self, file: File) -> Iterator[ast.expr]:
        """What a file reads out of batches that objects keep: ``(self.out > 0).float().mean().item()``."""
        names = {name for kept in self._kept.values() for name in kept}
        for node in file.nodes if any(map(file.mentions, names)) else ():
            read = read_out(node)
            if read is not None and any(self._is_kept(file, item) for item in walk(read)):
                assert isinstance(node, ast.expr)
                yield node

    def _is_kept(self, file: File, node: ast.AST) -> bool:
        if not isinstance(node, ast.Attribute) or not any(node.attr in kept for kept in self._kept.values()):
            return False
        owner = file.names.class_of(node) if _own(node) else None
        instances = self.scripts.collectives.instances
        info = file.class_info(owner) if owner is not None else instances.class_of(file, node.value)
        if info is None or node.attr not in self._kept.get(info, ()):
            return False
        match file.names.parents[node]:
            case ast.Attribute(attr=attr):
                return attr not in _OF_KIND
            case ast.Subscript(slice=ast.Constant(value=0)):
                return False  # rank 0's first item is the batch's
        return True

    @cached_property
    def _kept(self) -> dict[ClassInfo, set[str]]:
        """By class, the attributes that hold a share of a batch, or what is made of one without a loss."""
        found: dict[ClassInfo, set[str]] = {}
        for file in self.scripts.training:
            for place, held in list(self.scripts.handed.of(file).items()):
                for info, names in self._kept_in(file, place) if held.known else ():
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
