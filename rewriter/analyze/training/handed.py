"""Which names hold a rank's share of a batch: in loops that take it, and in the code that these hand it on to."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, is_backward, item_of, names_in, walk, walk_own
from rewriter.analyze.training.collectives import Collectives
from rewriter.analyze.training.feeds import Feeds
from rewriter.analyze.training.keepers import takes
from rewriter.analyze.training.shares import Kinds, Place

_DEEP = 4
_PASSED_ON = {"enumerate", "tqdm", "iter"}
_OF_KIND = {"dim", "is_floating_point", "keys"}
_FIELDS_OF_KIND = {"dtype", "device", "ndim", "is_cuda", "requires_grad"}


@dataclass
class Held:
    """``names`` hold the batch that a place gets, or parts of it; ``known`` if it is known to be a share."""

    names: set[str] = field(default_factory=set)
    known: bool = True


class Handed:
    """Answers for all files of a project; ``taking`` gives the loops of a file that take batches."""

    def __init__(
        self,
        collectives: Collectives,
        feeds: Feeds,
        taking: Callable[[File], dict[Place, Held]],
        kinds: Callable[[File, Place, set[str]], Kinds],
    ) -> None:
        self.collectives, self.feeds, self.instances = collectives, feeds, collectives.instances
        self._taking, self._kinds = taking, kinds
        self._found: dict[File, dict[Place, Held]] = {}
        self._parts: dict[Place, set[str]] = {}
        self._showing: dict[File, dict[Function, tuple[FunctionInfo, set[str]]]] | None = None

    def of(self, file: File) -> dict[Place, Held]:
        """The loops of a file that take batches, and the functions and loops that batches are handed to."""
        if not self._found:
            self._found = {other: self._taking(other) for other in self.instances.files()}
            queue = [(other, place) for other, places in self._found.items() for place in places]
            for _ in range(_DEEP):
                queue = [following for other, place in queue for following in self._hand_on(other, place)]
        return self._found.get(file, {})

    def kinds(self, file: File, place: Place) -> Kinds:
        """What the values in a place are, as far as they come of its batch."""
        return self._kinds(file, place, self.of(file)[place].names)

    def gets_shares(self, file: File, place: Place) -> bool:
        """Whether a place is known, by now, to get shares of batches, and nothing else."""
        held = self._found.get(file, {}).get(place)
        return held is not None and held.known

    def showing(self, file: File) -> list[tuple[FunctionInfo, Kinds]]:
        """The functions of a file, no models, that a loop over shares hands what it made of its batch, and no more."""
        if self._showing is None:
            self._showing = {}
            for other in self.instances.files():
                for place in (place for place, held in list(self.of(other).items()) if held.known):
                    for function, names in self._showing_for(self.kinds(other, place)):
                        found = self._showing.setdefault(function.file, {})
                        if function.node not in self.of(function.file):
                            found.setdefault(function.node, (function, set()))[1].update(names)
        return [
            (function, self._kinds(file, function.node, names))
            for function, names in self._showing.get(file, {}).values()
        ]

    def _showing_for(self, kinds: Kinds) -> Iterator[tuple[FunctionInfo, set[str]]]:
        for node in kinds.nodes:
            if isinstance(node, ast.Call) and kinds.of_batch(node):
                for function in self.feeds.functions(kinds.file, node):
                    owner = function.file.names.class_of(function.node)
                    if owner is not None and self.instances.classes.is_module(function.file.class_info(owner)):
                        continue
                    given = function.given(node) if not self.feeds.steps(function) else ()
                    names = {n for n, v in given if kinds.of_batch(v) and kinds.kind(v) in {"samples", "unknown"}}
                    if names:
                        yield function, names

    def around(self, file: File, node: ast.AST) -> Place | None:
        """The innermost place that a node stands in, within its function."""
        found = self.of(file)
        for parent in file.names.ancestors(node):
            if isinstance(parent, (ast.For, ast.While, Function)) and parent in found:
                return parent
            if isinstance(parent, Function):
                return None
        return None

    def asks(self, file: File, place: Place, test: ast.expr) -> bool:
        """Whether a test asks for the size or the values of what the data gave, and not for what kind it is."""
        return bool(self._read(test) & self.parts(file, place))

    def parts(self, file: File, place: Place) -> set[str]:
        """The names of a place that hold its batch, or what is made of that without a model."""
        if place not in self._parts:
            names = self._parts[place] = set(self.of(file)[place].names)
            given = [pair for statement in place.body for node in walk_own(statement) for pair in _assigned(node)]
            made = {name for bound, _ in given for name in bound}
            for _ in range(3):
                for bound, value in given:
                    if not names_in(value) & made - names and self._is_of_data(file, value, names):
                        names |= bound
        return self._parts[place]

    def _is_of_data(self, file: File, value: ast.expr, names: set[str]) -> bool:
        roles = self.collectives.roles[file]
        return bool(self._read(value) & names) and not any(
            (isinstance(node, (ast.Name, ast.Attribute)) and (roles.is_model(node) or roles.var(node) in roles.losses))
            or (isinstance(node, ast.Call) and self.collectives.is_collective(file, node))
            for node in walk(value)
        )

    def _read(self, node: ast.AST) -> set[str]:
        """The names in a value whose size or values it asks for."""
        match node:
            case ast.Name(id=name):
                return {name}
            case ast.Attribute(attr=attr) if attr in _FIELDS_OF_KIND:
                return set()
            case ast.Call(func=ast.Attribute(attr=attr)) if attr in _OF_KIND:
                return set()
            case ast.Call(func=ast.Name(id="isinstance" | "hasattr" | "callable" | "type")):
                return set()
        return {name for child in ast.iter_child_nodes(node) for name in self._read(child)}

    # Handing on ------------------------------------------------------------------------------------------------

    def _hand_on(self, file: File, place: Place) -> Iterator[tuple[File, Place]]:
        """The places that a batch is handed to and that were not known yet."""
        kinds, own = self.kinds(file, place), self.parts(file, place)
        for node in kinds.nodes:
            if isinstance(node, ast.Call):
                for function in self.feeds.functions(file, node):
                    if self.feeds.steps(function):
                        names = {name for name, value in function.given(node) if self._is_batch(kinds, own, value)}
                        yield from self._note(function.file, function.node, names, self._known(function, file, place))
            elif isinstance(node, ast.Yield) and node.value is not None:
                generator = file.names.function_of(node)
                for other, call in self.instances.calls(file, generator) if generator is not None else ():
                    loop = _loop_over(other, call)
                    if loop is not None:
                        names = {
                            n for n, value in _yielded(other, loop, node.value) if self._is_batch(kinds, own, value)
                        }
                        yield from self._note(other, loop, names, self.of(file)[place].known)

    def _known(self, function: FunctionInfo, file: File, place: Place) -> bool:
        """Whether all calls of a function stand in places of which a share is known."""
        calls = self.instances.calls(function.file, function.node)
        places = [(other, self.around(other, call)) for other, call in calls if takes(function.node, call)]
        return self.of(file)[place].known and all(p is not None and self.of(o)[p].known for o, p in places)

    def _note(self, file: File, place: Place, names: set[str], known: bool) -> Iterator[tuple[File, Place]]:
        found = self._found.setdefault(file, {})
        if names and place not in found:
            found[place] = Held(names, known)
            yield file, place

    @staticmethod
    def _is_batch(kinds: Kinds, own: set[str], value: ast.expr) -> bool:
        """Whether a value is a batch or a part of one, and no size or mean of it."""
        return bool(names_in(value) & own) and kinds.kind(value) in {"samples", "unknown"}

    # What takes batches itself ----------------------------------------------------------------------------------

    def pulled(self, file: File) -> Iterator[tuple[ast.Call, Place, set[str]]]:
        """``x, y = next(batches)`` in a loop, or in a function without one: the call, where it is, and the names."""
        for call in file.calls:
            if not isinstance(call.func, ast.Name) or call.func.id != "next" or self.feeds.sets_aside(file, call):
                continue
            parents = list(file.names.ancestors(call))
            functions = [number for number, parent in enumerate(parents) if isinstance(parent, Function)]
            within = parents[: functions[0]] if functions else parents
            place: Place | None = next((parent for parent in within if isinstance(parent, (ast.For, ast.While))), None)
            if place is None and functions and isinstance(function := parents[functions[0]], Function):
                place = function
            target = next((_bound(p.target) for p in within if isinstance(p, ast.NamedExpr)), None)
            statement = file.names.statement_of(call)
            if target is None and isinstance(statement, ast.Assign):
                target = {name for item in statement.targets for name in _bound(item)}
            if place is not None and target:
                yield call, place, target

    def goes_back(self, place: Place) -> bool:
        """Whether a loop or function calls backward itself, and no loop in it does."""
        stack: list[ast.AST] = list(place.body)
        while stack:
            node = stack.pop()
            if is_backward(node):
                return True
            if not isinstance(node, (ast.For, ast.While, Function, ast.ClassDef, ast.Lambda)):
                stack.extend(ast.iter_child_nodes(node))
        return False


def _assigned(node: ast.AST) -> Iterator[tuple[set[str], ast.expr]]:
    match node:
        case ast.Assign(targets=targets, value=value):
            yield {name for target in targets for name in _bound(target)}, value
        case ast.NamedExpr(target=target, value=value):
            yield _bound(target), value


def _bound(target: ast.expr) -> set[str]:
    """The names that a target binds."""
    return {node.id for node in walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _loop_over(file: File, call: ast.Call) -> ast.For | None:
    """The loop that goes through what a call gives: ``for i, x in enumerate(call)``."""
    child, parent = call, file.names.parents[call]
    while isinstance(parent, ast.Call) and (dotted(parent.func) or "").split(".")[-1] in _PASSED_ON:
        child, parent = parent, file.names.parents[parent]
    return parent if isinstance(parent, ast.For) and parent.iter is child else None


def _yielded(file: File, loop: ast.For, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The names of a loop over a generator, each with what is yielded for it."""
    target = item_of(loop, file.names.values_of)
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for part, given in zip(target.elts, value.elts, strict=True):
            yield from ((name, given) for name in _bound(part))
    else:
        yield from ((name, value) for name in _bound(target))
