"""What a loop over shares of batches leaves in its names, and is read behind it: of the last batch, a rank's share."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import item_of, names_in, walk, walk_own
from rewriter.analyze.training.scripts import Scripts
from rewriter.analyze.training.shares import Kinds, Loop, loop_over

_OF_KIND = {"dtype", "device", "ndim", "requires_grad", "is_cuda", "dim", "is_floating_point"}
_ASKING = {"type", "isinstance"}
_KEEPS_ROWS = {
    "to",
    "cuda",
    "cpu",
    "float",
    "long",
    "double",
    "half",
    "detach",
    "clone",
    "contiguous",
    "requires_grad_",
}
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

    def of(self, file: File) -> list[Left]:
        if file not in self._found:
            self._found[file] = list(self._left(file))
        return self._found[file]

    def is_whole(self, file: File, value: ast.expr) -> bool:
        """Whether all that a value has of a batch was made whole before."""
        made = {read for left in self.of(file) for name in left.whole for read in left.reads[name]}
        return any(item in made for item in walk(value))

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
            together = [
                {name for name, places in reads.items() if any(file.names.statement_of(p) is at for p in places)}
                for at in {file.names.statement_of(place) for places in reads.values() for place in places}
            ]
            if self._is_padded or any(names & whole and names - whole for names in together):
                whole = set()  # ranks' rows may differ in length; rows of a batch beside rows of a share
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

    def _derived(self, file: File, kinds: Kinds, held: set[str]) -> set[str]:
        """The names of what a pass makes with a row for each sample: ``out = model(x)``, ``mean, std = model(x)``."""
        roles = self.scripts.roles[file]

        def has_rows(value: ast.expr, part: int | None) -> bool:
            of_model = isinstance(value, ast.Call) and roles.is_model(value.func) and kinds.of_batch(value)
            return of_model if part is not None else kinds.kind(value) == "samples"

        return {
            name
            for name, values in kinds.made.items()
            if name not in held and all(has_rows(*made) for made in values)
            if not any(roles.var(target) in roles.losses for target in _targets(kinds.nodes, name))
        }

    def _reads(self, file: File, loop: Loop, kinds: Kinds, names: set[str]) -> dict[str, list[ast.Name]]:
        found: dict[str, list[ast.Name]] = {}
        for read in _Behind(file, loop, names).reads:
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

    def __init__(self, file: File, loop: Loop, names: set[str]) -> None:
        self.reads: list[ast.Name] = []
        alive, statement = set(names), ast.stmt()
        for parent in (loop, *file.names.ancestors(loop)):
            if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                break
            if isinstance(parent, ast.stmt):
                statement = parent
                block = file.names.siblings(statement)
                alive = self._run(block[block.index(statement) + 1 :], alive)

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
                    stored = (item for item in walk_own(statement) if isinstance(item, ast.Name))
                    alive = alive - {item.id for item in stored if not isinstance(item.ctx, ast.Load)}
        return alive

    def _read(self, nodes: Iterable[ast.AST], alive: set[str]) -> None:
        for node in nodes:
            own = list(walk_own(node))
            bound = {name for item in own if isinstance(item, ast.comprehension) for name in names_in(item.target)}
            names = (item for item in own if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load))
            self.reads += [item for item in names if item.id in alive - bound]


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
