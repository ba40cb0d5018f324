"""What a loop over shares of batches leaves in its names, and is read behind it: of the last batch, a rank's share."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import Scope, dotted, is_backward, item_of, names_in, reduction_of, walk, walk_own
from rewriter.analyze.read.project import Project
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.shares import Kinds, Loop, loop_over

_OF_KIND = {"dtype", "device", "ndim", "requires_grad", "is_cuda", "dim", "is_floating_point"}
_ASKING = {"type", "isinstance"}
_KEEPS_ROWS = {
    "to", "cuda", "cpu", "float", "long", "double", "half", "detach", "clone", "contiguous", "requires_grad_",
}  # fmt: skip
_LEAVES = (ast.Raise, ast.Return, ast.Break, ast.Continue)
_TURNS = {"t", "T", "mT", "transpose", "swapaxes", "permute", "movedim", "rearrange"}
_WRAPPING = {"Variable", "torch.autograd.Variable", "bmtrain.to_device"}


@dataclass(frozen=True)
class Left:
    """The names of a loop's batch that are read behind it, with the places.

    ``whole`` are those that hold tensors with a row for each sample, and can be made the batch's behind the loop;
    ``loader`` is what tells whether they hold shares, where that is not known.
    """

    loop: Loop
    reads: dict[str, list[ast.Name]]
    whole: set[str]
    loader: ast.expr | None


class LeftBehind:
    """Answers for all files of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts
        self._found: dict[File, list[Left]] = {}
        self._whole: dict[File, set[ast.Name]] = {}

    def of(self, file: File) -> list[Left]:
        if file not in self._found:
            found = self._found[file] = list(self._left(file))
            self._whole[file] = {read for left in found for name in left.whole for read in left.reads[name]}
        return self._found[file]

    def is_whole(self, file: File, value: ast.expr) -> bool:
        """Whether all that a value has of a batch was made whole before."""
        return bool(self.of(file)) and not self._whole[file].isdisjoint(walk(value))

    def _left(self, file: File) -> Iterator[Left]:
        handed = self.scripts.handed
        for loop, held in handed.of(file).items():
            if not isinstance(loop, (ast.For, ast.While)):
                continue
            loader = None if held.known or isinstance(loop, ast.While) else loop_over(loop)
            if not held.known and loader is None:
                continue
            kinds = handed.kinds(file, loop)
            taken = held.names | _looked_up(kinds, held.names)
            reads = self._reads(file, loop, kinds, taken | self._derived(file, kinds, taken))
            whole = {name for name in reads.keys() & taken if self._has_rows(file, loop, kinds, name)}
            together: dict[ast.stmt, set[str]] = {}
            for place in (place for places in reads.values() for place in places):
                together.setdefault(file.names.statement_of(place), set()).add(place.id)
            if self._is_padded or any(names & whole and names - whole for names in together.values()):
                whole = set()  # ranks' rows may differ in length; rows of a batch beside rows of a share
            if any(self._is_beside_counts(file, kinds, place) for name in whole for place in reads[name]):
                whole = set()
            whole -= {name for name in whole if any(self._is_left_early(file, loop, p) for p in reads[name])}
            reads |= self._reads(file, loop, kinds, self._counted(file, kinds) - reads.keys())
            if reads:
                yield Left(loop, reads, whole, loader)

    @cached_property
    def _is_padded(self) -> bool:
        """Whether a loader puts batches together in a way of its own, in which rows get as long as their batch's."""
        return any(
            keyword.arg == "collate_fn"
            and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is None)
            for file in self.scripts.training
            for call in file.calls
            for keyword in call.keywords
        )

    def _is_beside_counts(self, file: File, kinds: Kinds, read: ast.Name) -> bool:
        """Whether a number is made of a name, and of one that the loop's last pass has counted: ``hits / len(x)``."""
        made: ast.AST = read
        for parent in file.names.ancestors(read):
            if not isinstance(parent, ast.expr) or isinstance(parent, (ast.Tuple, ast.List, ast.Dict, ast.JoinedStr)):
                break
            made = parent if isinstance(parent, (ast.BinOp, ast.Compare)) else made
        counted = (kinds.made.get(item.id, ()) for item in walk(made) if isinstance(item, ast.Name))
        return any(kinds.kind(value) in {"total", "mean", "mixed"} for values in counted for value, _ in values)

    def _derived(self, file: File, kinds: Kinds, held: set[str]) -> set[str]:
        """The names of what a pass makes with a row for each sample: ``out = model(x)``, ``mean, std = model(x)``."""
        roles = self.scripts.roles[file]

        def has_rows(value: ast.expr, part: int | None) -> bool:
            if self._is_part(value, held) or self._is_per_item(file, value):
                return True
            of_model = isinstance(value, ast.Call) and roles.is_model(value.func) and kinds.of_batch(value)
            return of_model if part is not None else kinds.kind(value) == "samples"

        return {
            name
            for name, values in kinds.made.items()
            if name not in held and all(has_rows(*made) for made in values)
            if all(self._is_per_item(file, value) for value, _ in values)
            or not any(roles.var(target) in roles.losses for target in _targets(kinds.nodes, name))
        }

    def _is_per_item(self, file: File, value: ast.expr) -> bool:
        """``F.cross_entropy(out, y, reduction="none")``, or what such a criterion gives."""
        if not isinstance(value, ast.Call):
            return False
        called = (dotted(value.func) or "").split(".")[-1]
        return reduction_of(value) == "none" or called in self.scripts.across(file).of_items

    def _is_left_early(self, file: File, loop: Loop, read: ast.Name) -> bool:
        """Whether a name is read where the loop has not come to its end: inside of it, or after an error."""
        around = list(file.names.ancestors(read))
        if loop in around or any(isinstance(item, ast.ExceptHandler) for item in around):
            return True
        tries = (item for item in file.names.ancestors(loop) if isinstance(item, ast.Try) and item not in around)
        return any(not isinstance(handler.body[-1], _LEAVES) for item in tries for handler in item.handlers)

    def _counted(self, file: File, kinds: Kinds) -> set[str]:
        """The names of counts and means of a share, which are not made the batch's where they are made."""
        made, roles = self.scripts.collectives.shares(file), self.scripts.roles[file]
        return {
            name
            for name, values in kinds.made.items()
            if all(part is None and kinds.kind(value) in {"total", "mean"} for value, part in values)
            if made.keys().isdisjoint(item for value, _ in values for item in walk(value))
            if not any(roles.var(target) in roles.losses for target in _targets(kinds.nodes, name))
        }

    def _is_part(self, value: ast.expr, held: set[str]) -> bool:
        """Whether it is one of a batch's parts, by its name: ``batch["x"].to(device)``."""
        while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _KEEPS_ROWS:
            value = value.func.value
        match value:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str())):
                return name in held
        return False

    def _reads(self, file: File, loop: Loop, kinds: Kinds, names: set[str]) -> dict[str, list[ast.Name]]:
        found: dict[str, list[ast.Name]] = {}
        for read in _Behind(self.scripts.project, file, loop, names).reads:
            around = [item for item in file.names.ancestors(read) if isinstance(item, ast.expr)]
            if not _asks_for_kind(around) and not any(kinds.kind(item) == "item" for item in around):
                found.setdefault(read.id, []).append(read)
        return found

    def _has_rows(self, file: File, loop: Loop, kinds: Kinds, name: str) -> bool:
        """Whether a name of a batch holds a tensor with a row for each sample, as far as its uses show."""
        taken = names_in(item_of(loop, file.names.values_of)) if isinstance(loop, ast.For) else set[str]()
        for value, part in kinds.made.get(name, ()):
            if name in names_in(value):
                if part is not None or not self._keeps_rows(file, value, name):
                    return False
            elif name in taken or self._turns(file, value):
                return False
        uses = [n for n in walk(loop) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
        parents = [file.names.parents[use] for use in uses]
        if any(isinstance(p, (ast.Starred, ast.keyword, ast.For, ast.comprehension)) for p in parents):
            return False
        if any(isinstance(p, ast.Subscript) and p.value in uses and not _is_cut(p.slice) for p in parents):
            return False
        model = self.scripts.roles[file].is_model
        single = isinstance(loop, ast.For) and taken == {name}
        return not single or any(isinstance(p, ast.Call) and model(p.func) for p in parents)

    def _turns(self, file: File, value: ast.expr) -> bool:
        """Whether what makes a batch may put something else than samples in its rows: ``data[rows].t()``."""
        found = self.scripts.project.resolve(file, value.func) if isinstance(value, ast.Call) else None
        parts = [value, *([found.node] if isinstance(found, FunctionInfo) else [])]
        return any(isinstance(item, ast.Attribute) and item.attr in _TURNS for part in parts for item in walk(part))

    def _keeps_rows(self, file: File, value: ast.expr, name: str) -> bool:
        """``x.to(device)``, ``x.view(x.size(0), -1)``, ``x.reshape(-1, 784)``, ``Variable(x)``."""
        match value:
            case ast.Name(id=found):
                return found == name
            case ast.Call(func=ast.Attribute(value=inner, attr="view" | "reshape"), args=[first, _]):
                by_rows = isinstance(first, (ast.Call, ast.Subscript, ast.UnaryOp))
                return by_rows and self._keeps_rows(file, inner, name)
            case ast.Call(func=ast.Attribute(value=inner, attr=attr)) if attr in _KEEPS_ROWS:
                return self._keeps_rows(file, inner, name)
            case ast.Call(func=func, args=[inner, *_]) if self.scripts.project.external(file, func) in _WRAPPING:
                return self._keeps_rows(file, inner, name)
        return False


class _Behind:
    """The reads of names behind a loop, up to where they get other values, in its function or file."""

    def __init__(self, project: Project, file: File, loop: Loop, names: set[str]) -> None:
        self.reads: list[ast.Name] = []
        self._project, self._file, self._loop, self._called = project, file, loop, set[ast.AST]()
        self._read_at_leaving(names)
        alive = self._run(loop.orelse, set(names))
        statement: ast.stmt = loop
        while not isinstance(statement, Scope):
            block = file.names.siblings(statement)
            at = block.index(statement)
            alive = self._run(block[at + 1 :], alive)
            parent = file.names.parents[statement]
            if isinstance(parent, (ast.ExceptHandler, ast.match_case)):
                parent = file.names.parents[parent]
            match parent:
                case ast.For() | ast.While() if block is parent.body:
                    again = alive - names_in(parent.target) if isinstance(parent, ast.For) else alive
                    self._run(block[:at], again)  # in the next pass, in front of the loop
                    alive = self._run(parent.orelse, alive)
                case ast.Try():
                    ends = [self._run(handler.body, alive) for handler in parent.handlers if block is parent.body]
                    alive = self._run(parent.orelse, alive).union(*ends) if block is parent.body else alive
                    alive = self._run(parent.finalbody, alive) if block is not parent.finalbody else alive
            if not isinstance(parent, ast.stmt):
                break
            statement = parent

    def _read_at_leaving(self, names: set[str]) -> None:
        """What a loop that trains gives back from inside, and what others read of what its function shares."""
        own = [item for statement in self._loop.body for item in walk_own(statement)]
        if any(map(is_backward, own)):
            self._read((item for item in own if isinstance(item, (ast.Return, ast.Yield))), names)
        function = self._file.names.function_of(self._loop)
        for told in walk_own(function) if function is not None else ():
            if isinstance(told, (ast.Global, ast.Nonlocal)):
                for name in names.intersection(told.names):
                    self._read_elsewhere(name, function, isinstance(told, ast.Global))

    def _read_elsewhere(self, name: str, function: ast.AST | None, of_module: bool) -> None:
        names = self._file.names

        def home(node: ast.AST) -> object:
            found = names.lookup(name, names.scope_of(node))
            return found[0] if found is not None else names.module

        shared = names.module if of_module else home(self._loop)
        for read in self._file.nodes:
            if isinstance(read, ast.Name) and isinstance(read.ctx, ast.Load) and read.id == name:
                if home(read) is shared and not any(around is function for around in names.ancestors(read)):
                    self.reads.append(read)

    def _run(self, block: list[ast.stmt], alive: set[str]) -> set[str]:
        """Which names still hold what they held when the block is through."""
        for statement in block:
            match statement:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    alive = alive - {statement.name}
                case ast.For():
                    self._read([statement.iter], alive)
                    alive = self._run([*statement.body, *statement.orelse], alive - names_in(statement.target))
                case ast.If() | ast.While():
                    self._read([statement.test], alive)
                    alive = self._run(statement.body, alive) | self._run(statement.orelse, alive)
                case ast.With():
                    self._read([item.context_expr for item in statement.items], alive)
                    bound = [item.optional_vars for item in statement.items if item.optional_vars is not None]
                    alive = self._run(statement.body, alive - {name for target in bound for name in names_in(target)})
                case ast.Try():
                    ends = [self._run(handler.body, alive) for handler in statement.handlers]
                    alive = self._run([*statement.body, *statement.orelse], alive).union(*ends)
                    alive = self._run(statement.finalbody, alive)
                case _:
                    self._read([statement], alive)
                    if isinstance(statement, ast.AugAssign) and isinstance(target := statement.target, ast.Name):
                        self.reads += [target] if target.id in alive else []
                    stored = (item for item in walk_own(statement) if isinstance(item, ast.Name))
                    alive = alive - {item.id for item in stored if not isinstance(item.ctx, ast.Load)}
        return alive

    def _read(self, nodes: Iterable[ast.AST], alive: set[str]) -> None:
        for node in nodes:
            own = list(walk_own(node))
            bound = {name for item in own if isinstance(item, ast.comprehension) for name in names_in(item.target)}
            names = (item for item in own if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load))
            self.reads += [item for item in names if item.id in alive - bound]
            self._read_within([item for item in walk(node) if isinstance(item, ast.Lambda)], alive)
            for call in (item for item in own if isinstance(item, ast.Call)):
                found = self._project.resolve(self._file, call.func)
                if isinstance(found, FunctionInfo) and found.file is self._file and found.node not in self._called:
                    self._called.add(found.node)
                    self._read_within([found.node], alive)

    def _read_within(self, functions: Iterable[ast.AST], alive: set[str]) -> None:
        """What functions read that is of the scope of the loop."""
        names = self._file.names
        for read in (item for function in functions for item in walk(function)):
            if isinstance(read, ast.Name) and isinstance(read.ctx, ast.Load) and read.id in alive:
                seen, held = (names.lookup(read.id, names.scope_of(node)) for node in (read, self._loop))
                self.reads += [read] if seen is not None and held is not None and seen[0] is held[0] else []


def _looked_up(kinds: Kinds, held: set[str]) -> set[str]:
    """The names of rows that a batch of places gives: ``x, y = X[rows], Y[rows]``."""
    return {
        name
        for name, values in kinds.made.items()
        if all(
            part is None and isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Name)
            and value.slice.id in held and not kinds.of_batch(value.value)
            for value, part in values
        )
    }  # fmt: skip


def _targets(nodes: list[ast.AST], name: str) -> Iterator[ast.Name]:
    for node in nodes:
        if isinstance(node, ast.Assign):
            stored = (item for target in node.targets for item in walk(target) if isinstance(item, ast.Name))
            yield from (item for item in stored if item.id == name)


def _is_cut(index: ast.expr) -> bool:
    """Whether what stands in brackets is for a tensor, and no key or place: ``x[:, 0]``."""
    return isinstance(index, ast.Slice) or (isinstance(index, ast.Tuple) and any(map(_is_cut, index.elts)))


def _asks_for_kind(around: list[ast.expr]) -> bool:
    """``x.device``, ``isinstance(x, dict)``: what is the same of a share and of a batch."""
    match around:
        case [ast.Attribute(attr=attr), *_]:
            return attr in _OF_KIND
        case [ast.Call(func=ast.Name(id=name)), *_]:
            return name in _ASKING
    return False
