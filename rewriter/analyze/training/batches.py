"""Batches that a script takes without a loader: drawn at random, at random positions, or slice by slice of an order."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import Function, assigned_by, dotted, item_of, names_in, same, walk, walk_own
from rewriter.analyze.training.across import Across
from rewriter.analyze.training.collectives import Collectives
from rewriter.analyze.training.feeds import Feeds, is_without_gradients
from rewriter.analyze.training.roles import Var
from rewriter.analyze.training.shares import Loop

_DRAWS = {"torch.randint", "torch.randn", "torch.rand"}
_SIZE_AT = {"choice": 1, "randint": 2, "integers": 2, "sample": 1, "choices": 1, "multinomial": 1}
"""By name, which argument says how many positions are drawn, if no keyword does."""
_POSITIONS = {
    "numpy.random.choice", "numpy.random.randint", "random.sample", "random.choices", "torch.multinomial",
}  # fmt: skip
_VALUES = {
    "numpy.random.randn", "numpy.random.rand", "numpy.random.normal", "numpy.random.uniform",
    "numpy.random.standard_normal", "numpy.random.random", "numpy.random.random_sample",
}  # fmt: skip
_ORDERS = {"torch.randperm", "numpy.random.permutation"}
_SHUFFLES = {"random.shuffle", "numpy.random.shuffle"}
_GENERATORS = {"numpy.random.default_rng", "numpy.random.RandomState", "random.Random"}
_AS_FUNCTION = {"permutation": "numpy.random.permutation", "shuffle": "random.shuffle"}
_METHODS = {"integers", "choice", "randint", "sample", "choices"}
_PARTS = {"split", "chunk", "array_split", "reshape", "view", "tensor_split"}
_AS = {"list", "tensor", "as_tensor", "from_numpy", "LongTensor", "array", "asarray", "sorted", "sort"}
_ROOM = {"range", "arange", "zeros", "ones", "empty", "full"}
_AS_METHODS = {"tolist", "to", "cuda", "cpu", "long", "numpy", "astype"}
_AS_LAID = {"to", "cuda", "cpu", "long", "float", "int", "contiguous", "clone", "numpy", "astype"}
_NUMBERS = {"int", "float", "min", "max"}
_SAYING = {"print", "format", "info", "debug", "log", "write", "DataLoader"}
_LOADED = {"__getitem__", "__iter__", "__next__", "__len__"}
_DEEP = 2
_BATCH = re.compile(r"^(?:\w*batch(?:_?size)?|bs|bsz|B|n_?batch)$")

_WRITE = "write bmt.shard_batch({code}) where it is a batch of samples"
_COMPARED = "its items are compared with each other in line {line}: if it is, write bmt.gather_batch(...) there"
_FILLED = "a batch of the whole size is filled by it: write bmt.shard_batch(...) around what is made of it"
_AGAIN = (
    "line {line} asks for {size} items, too, and a share has fewer: write bmt.shard_batch(...) around what is given"
)
_SEED = "its generator has other numbers on every rank: give it a seed, such as {code}(0)"


@dataclass
class Taken:
    """What of a file's batches is shared out, and what stays, with the reason.

    An expression of ``parts`` goes through batches; one of ``whole`` is a batch.
    """

    whole: list[ast.expr] = field(default_factory=list)
    parts: list[ast.expr] = field(default_factory=list)
    left: list[tuple[ast.expr, str]] = field(default_factory=list)
    sizes: set[Var | None] = field(default_factory=set)
    """Variables that say how many items the whole batch has."""
    orders: set[ast.Call] = field(default_factory=set)
    """Draws of orders that are gone through slice by slice: they are to be the same on all ranks."""


class Batches:
    """Answers for the files of a project that train; ``fed`` says whether a loop goes through a loader's batches."""

    def __init__(self, collectives: Collectives, feeds: Feeds, fed: Callable[[ast.AST], bool]) -> None:
        self.project, self.classes = collectives.project, collectives.classes
        self.instances, self.roles = collectives.instances, collectives.roles
        self.feeds = feeds
        self.fed = fed
        self._taken: dict[File, Taken] = {}
        self._loops: dict[File, dict[Loop, set[str]]] = {}

    def of(self, file: File) -> Taken:
        """Batches that the file takes outside of models, and that no ``bmt.shard_batch`` is around yet."""
        if file not in self._taken:
            taken = self._taken[file] = Taken()
            drawn = list(self._random(file))
            taken.whole += drawn
            sizes: dict[ast.expr, ast.expr] = {node: size for node in drawn if (size := _first_size(node)) is not None}
            self._positions(file, taken, sizes)
            self._lay_out(file, taken, sizes)
            taken.sizes |= {self._var(file, size) for size in sizes.values()}
            self._orders(file, taken)
            self._leave_compared(file, taken, {*taken.whole, *taken.parts}.difference(drawn))
            if not taken.whole and not taken.parts and not taken.left:
                self._slices(file, taken)
        return self._taken[file]

    def _leave_compared(self, file: File, taken: Taken, fresh: set[ast.expr]) -> None:
        """A batch whose items are compared with each other stays whole: the loss is another one on a share of it."""
        held: dict[ast.expr, dict[Loop, set[str]]] = {}
        for node in sorted(fresh, key=lambda node: (node.lineno, node.col_offset)):
            self._held(file, file, node, held.setdefault(node, {}), 0)
        loops: dict[Loop, set[str]] = {}
        for found in held.values():
            for loop, names in found.items():
                loops.setdefault(loop, set()).update(names)
        compared = list(Across(file, loops).compared()) if loops else []
        for node, found in held.items():
            for other in compared:
                if any(parent in found for parent in file.names.ancestors(other)):
                    taken.whole = [item for item in taken.whole if item is not node]
                    taken.parts = [item for item in taken.parts if item is not node]
                    taken.left.append((node, _COMPARED.format(line=other.lineno)))
                    break

    def loops(self, file: File) -> dict[Loop, set[str]]:
        """The loops of a file that get shared batches, and the names that hold what is taken of them."""
        if file not in self._loops:
            found = self._loops[file] = {}
            for other in self.instances.files():
                taken = self.of(other)
                for node in (*taken.whole, *taken.parts, *self._shared_already(other)):
                    self._held(file, other, node, found, 0)
        return self._loops[file]

    def _held(self, file: File, other: File, node: ast.expr, found: dict[Loop, set[str]], deep: int) -> None:
        """Note the loop around a batch, or around the calls of the function that gives it."""
        child: ast.AST = node
        for parent in other.names.ancestors(node):
            if isinstance(parent, ast.For) and child is parent.iter:
                if other is file:
                    found.setdefault(parent, set()).update(names_in(item_of(parent, file.names.values_of)))
                return
            if isinstance(parent, (ast.For, ast.While)) and not _yields(parent):
                if other is file:
                    statement = other.names.statement_of(node)
                    found.setdefault(parent, set()).update(_stored(statement))
                return
            if isinstance(parent, Function):
                gives = _yields(parent) or any(isinstance(item, ast.Return) and item.value for item in walk(parent))
                for third, call in self.instances.calls(other, parent) if gives and deep < _DEEP else ():
                    self._held(file, third, call, found, deep + 1)
                return
            child = parent

    def _shared_already(self, file: File) -> Iterator[ast.expr]:
        if b"shard_batch" in file.source.data:
            for call in file.calls:
                if self.project.external(file, call.func) == "bmtrain.shard_batch":
                    yield call

    # Draws of torch, by the name of their size -----------------------------------------------------------------

    def _random(self, file: File) -> Iterator[ast.Call]:
        """Calls of torch, and of distributions, that draw a batch at random, outside of models."""
        for node in file.calls:
            drawn = self.project.external(file, node.func) in _DRAWS or _samples_several(node)
            if not drawn or self._in_model(file, node):
                continue
            parent = file.names.parents[node]
            if self._is_shared(file, node):
                continue
            if (_batch_sized(node) or self._picks_a_batch(file, node)) and isinstance(
                parent, (ast.Assign, ast.AnnAssign, ast.Call, ast.Attribute)
            ):
                if not self._has_the_size_of_another(file, _first_size(node)) and not self._is_whole(file, node):
                    yield node

    def _has_the_size_of_another(self, file: File, size: ast.expr | None, deep: int = 0) -> bool:
        """Whether the size is read from a tensor, ``batch, length = x.shape``, here or where this function is called.

        What is drawn goes with that one's share.
        """
        if size is None or any(map(_reads_size, walk(size))):
            return size is not None
        if not isinstance(size, ast.Name) or deep > _DEEP:
            return False
        values = [*self.instances.given_to(file, size), *((file, value) for value in self._unpacked(file, size))]
        return any(self._has_the_size_of_another(other, value, deep + 1) for other, value in values)

    def _unpacked(self, file: File, name: ast.Name) -> Iterator[ast.expr]:
        """What a name gets a part of, ``x.shape`` of ``batch, length = x.shape``, or its own in ``a, b = 1, 2``."""
        roles = self.roles[file]
        variable = roles.var(name)
        for statement in (node for other, _, node, part in roles.assignments if part and other == variable is not None):
            for target, value in assigned_by(statement) if isinstance(statement, ast.Assign) else ():
                if any(roles.var(part) == variable for part in walk(target) if isinstance(part, ast.Name)):
                    yield value

    @staticmethod
    def _is_whole(file: File, call: ast.Call) -> bool:
        """Whether a draw is for samples that are only looked at, and more is made of its size: each rank makes all."""
        statement, size = file.names.statement_of(call), _first_size(call)
        block = file.names.siblings(statement)
        following = [node for later in block[block.index(statement) + 1 :] for node in walk(later)]
        trains = any(isinstance(node, ast.Attribute) and node.attr == "backward" for node in following)
        if size is None or trains or any(isinstance(node, (ast.Return, ast.Yield)) for node in following):
            return False
        blocks = (node for node in (*following, *file.names.ancestors(call)) if isinstance(node, ast.With))
        if not any(map(is_without_gradients, blocks)):
            return False
        return any(isinstance(node, type(size)) and dotted(node) == dotted(size) for node in following if dotted(size))

    def _in_model(self, file: File, node: ast.AST) -> bool:
        owner = file.names.class_of(node)
        return owner is not None and self.classes.is_module(file.class_info(owner))

    def _is_shared(self, file: File, node: ast.AST) -> bool:
        """Whether ``bmt.shard_batch`` is around a node, or is mapped over what it is."""
        for parent in file.names.ancestors(node):
            if isinstance(parent, ast.Call):
                if self.project.external(file, parent.func) == "bmtrain.shard_batch":
                    return True
                if any(self.project.external(file, argument) == "bmtrain.shard_batch" for argument in parent.args):
                    return True
            elif isinstance(parent, ast.stmt):
                return False
        return False

    def _picks_a_batch(self, file: File, call: ast.Call) -> bool:
        """Whether ``index = torch.randint(len(data), (12,))`` picks items for a loop that trains, of whatever number.

        Not in a class, which may be a worker's, or under a test, where it may be for something else.
        """
        statement, size = file.names.parents[call], _first_size(call)
        listed = [
            item for item in (*call.args, *(k.value for k in call.keywords)) if isinstance(item, (ast.Tuple, ast.List))
        ]
        if (dotted(call.func) or "").split(".")[-1] != "randint" or len(listed) != 1 or len(listed[0].elts) != 1:
            return False
        several = isinstance(size, ast.Constant) and isinstance(size.value, int) and size.value > 1
        if not (several or isinstance(size, (ast.Name, ast.Attribute))) or file.names.class_of(call) is not None:
            return False
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]):
                function = file.names.function_of(call)
                return _is_index(file, function or file.tree, name) and not self._use(file, call, fed=True)
        return False

    # Positions -------------------------------------------------------------------------------------------------

    def _positions(self, file: File, taken: Taken, sizes: dict[ast.expr, ast.expr]) -> None:
        """``index = np.random.choice(n, 12)``, ``random.sample(range(n), 12)``, ``torch.randperm(n)[:12]``."""
        found: dict[ast.AST | None, list[tuple[ast.expr, ast.expr]]] = {}
        for call in file.calls:
            name, generator = self._name(file, call)
            node, size = self._many(file, call, name, generator is not None)
            if size is None or self._in_model(file, call) or self._is_shared(file, call):
                continue
            if self._has_the_size_of_another(file, size) or not (_is_several(size)):
                continue
            values = name in _VALUES
            if not (self._is_batch_by_name(size) if values else self._is_position(file, node)):
                continue
            use = self._use(file, node, fed=values)
            if use == "no":
                continue
            reason = use or self._unseeded(file, generator) or (_FILLED if _fills_whole(file, node, size) else "")
            if reason:
                taken.left.append((node, reason))
            else:
                loop = next(
                    (p for p in file.names.ancestors(node) if isinstance(p, (ast.For, ast.While, Function))), None
                )
                found.setdefault(loop, []).append((node, size))
        for picked in found.values():
            if len({ast.unparse(size) for _, size in picked}) == 1:
                taken.whole += [node for node, _ in picked]
                sizes |= dict(picked)
            else:
                reason = "several numbers of items are drawn here, so that it is not clear which is the batch's"
                taken.left += [(node, reason) for node, _ in picked[:1]]
                taken.sizes |= {self._var(file, size) for _, size in picked}

    def _var(self, file: File, node: ast.expr | None) -> Var | None:
        return self.roles[file].var(node) if isinstance(node, (ast.Name, ast.Attribute)) else None

    def _many(self, file: File, call: ast.Call, name: str, drawn: bool) -> tuple[ast.expr, ast.expr | None]:
        """What is a batch of positions, and how many these are."""
        if name in _ORDERS:
            parent = file.names.parents[call]
            match parent:
                case ast.Subscript(slice=ast.Slice(lower=None, upper=ast.expr() as end, step=None)):
                    return parent, end
            return call, None
        if name in _VALUES:
            return call, _first_size(call)
        if name not in _POSITIONS and not drawn:
            return call, None
        last = name.split(".")[-1]
        at = _SIZE_AT.get(last)
        given = [k.value for k in call.keywords if k.arg in {"size", "k", "num_samples"}]
        if not given and at is not None and len(call.args) > at:
            given = [call.args[at]]
        size: ast.expr | None = given[0] if given else None
        if isinstance(size, (ast.Tuple, ast.List)):
            size = size.elts[0] if len(size.elts) == 1 else None
        return call, size

    def _name(self, file: File, call: ast.Call) -> tuple[str, ast.expr | None]:
        """What a call draws by, as of a module, and the generator that it is a method of."""
        known = self.project.external(file, call.func)
        if known or not isinstance(call.func, ast.Attribute):
            return known, None
        attr = call.func.attr
        if attr in {*_METHODS, *_AS_FUNCTION} and self._made(file, call.func.value):
            return _AS_FUNCTION.get(attr, attr), call.func.value
        return "", None

    def _made(self, file: File, generator: ast.expr) -> list[ast.Call]:
        """The calls that make a generator of random numbers, if all that it is given are such."""
        given = [value for _, value in self.instances.given_to(file, generator)]
        made = [v for v in given if isinstance(v, ast.Call) and self.project.external(file, v.func) in _GENERATORS]
        return made if len(made) == len(given) else []

    def _unseeded(self, file: File, generator: ast.expr | None) -> str:
        for call in self._made(file, generator) if generator is not None else ():
            seed = next(iter([*call.args, *(keyword.value for keyword in call.keywords)]), None)
            if seed is None or not self._is_alike(file, seed):
                return _SEED.format(code=ast.unparse(call.func))
        return ""

    def _is_alike(self, file: File, seed: ast.expr) -> bool:
        """Whether a seed is a number that all ranks have: a constant, or an option that has one by default."""
        match seed:
            case ast.Constant(value=value):
                return value is not None
            case ast.BinOp(left=left, right=right):
                return self._is_alike(file, left) and self._is_alike(file, right)
            case ast.Attribute(attr=name) if not isinstance(seed.value, ast.Call):
                options = [
                    call
                    for other in self.instances.files()
                    for call in other.calls
                    if isinstance(call.func, ast.Attribute)
                    and call.func.attr == "add_argument"
                    and any(isinstance(a, ast.Constant) and str(a.value).lstrip("-") == name for a in call.args)
                ]
                given = [next((k.value for k in call.keywords if k.arg == "default"), None) for call in options]
                return bool(given) and all(isinstance(v, ast.Constant) and v.value is not None for v in given)
            case ast.Name():
                values = [value for _, value in self.instances.given_to(file, seed)]
                return bool(values) and all(isinstance(v, ast.Constant) and v.value is not None for v in values)
        return False

    def _is_position(self, file: File, node: ast.expr) -> bool:
        """Whether items are taken by what is drawn, or it is the items themselves."""
        outer = _outermost(file, node)
        around = file.names.function_of(node) or file.tree
        for parent in file.names.ancestors(outer):
            if isinstance(parent, ast.Subscript) and outer is not parent.value:
                return True
            if isinstance(parent, ast.comprehension):
                return True
            if isinstance(parent, ast.stmt):
                break
        statement = file.names.statement_of(node)
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) if statement.value is outer:
                return _is_index(file, around, name) or self._draws_items(file, node)
            case ast.Assign() | ast.Return():
                return self._draws_items(file, node)
        return False

    def _draws_items(self, file: File, node: ast.expr) -> bool:
        """``random.sample(rows, 12)`` of anything but numbers."""
        if not isinstance(node, ast.Call) or not node.args:
            return False
        last = (dotted(node.func) or "").split(".")[-1]
        first = node.args[0]
        numbers = isinstance(first, ast.Call) and getattr(first.func, "id", "") == "range"
        return last in {"sample", "choices"} and not numbers

    @staticmethod
    def _is_batch_by_name(size: ast.expr) -> bool:
        return bool(_BATCH.match((dotted(size) or "").split(".")[-1]))

    # What is made of the size besides --------------------------------------------------------------------------

    def _lay_out(self, file: File, taken: Taken, sizes: dict[ast.expr, ast.expr]) -> None:
        """Where a function asks for the size of what it draws again, what it draws stays whole.

        Shared out is what it lays out by that size, ``x = data[at.flatten()].view(size, -1)``.
        """
        drawn: dict[tuple[Function, str], list[ast.expr]] = {}
        for node in taken.whole:
            function, size = file.names.function_of(node), dotted(sizes[node]) if node in sizes else None
            if function is not None and size:
                drawn.setdefault((function, size), []).append(node)
        for (function, size), nodes in drawn.items():
            asked = list(self._asked_again(file, function, size, taken.whole))
            if asked:
                laid = _laid_out(file, nodes, size, asked)
                taken.whole = [node for node in taken.whole if node not in nodes] + laid
                if not laid:
                    for node in nodes:
                        del sizes[node]
                    taken.left.append((nodes[0], _AGAIN.format(size=size, line=asked[0].lineno)))

    def _asked_again(
        self, file: File, function: Function, size: str, shared: list[ast.expr]
    ) -> Iterator[ast.expr | ast.Slice]:
        """Calls, slices and comparisons of shapes, in a function, that a share would not have the ``size`` for."""
        own = {item for node in shared for item in walk(node)}
        sharing = {file.names.function_of(node) for node in shared}
        for item in (inner for statement in function.body for inner in walk_own(statement)):
            if item in own or not isinstance(item, (ast.Name, ast.Attribute)) or dotted(item) != size:
                continue
            parent = _asking(file, item)
            if isinstance(parent, ast.Call) and parent not in own:
                found = self.project.resolve(file, parent.func)
                if not isinstance(found, FunctionInfo) or found.node not in sharing:
                    yield parent
            elif isinstance(parent, ast.Slice) or (parent is not None and any(map(_reads_size, walk(parent)))):
                yield parent

    # Orders ----------------------------------------------------------------------------------------------------

    def _orders(self, file: File, taken: Taken) -> None:
        """``order[i : i + 12]`` of ``order = torch.randperm(n)``, or of what ``random.shuffle`` has shuffled."""
        ordered, generators, drawn_by = self._ordered(file)
        for node in file.nodes:
            over = _parts_of(node)
            if over is not None:
                source, loop, whole = over
                drawn = isinstance(source, ast.Call) and self._name(file, source)[0] in _ORDERS
                variable = self.roles[file].var(source)
                if not drawn and variable not in ordered:
                    continue
                taken.orders |= {source} if isinstance(source, ast.Call) else drawn_by.get(variable, set())
                if self._is_shared(file, whole):
                    continue
                use = self._loop_use(file, loop)
                generator = self._name(file, source)[1] if isinstance(source, ast.Call) else generators.get(variable)
                reason = use or self._unseeded(file, generator)
                if use != "no":
                    taken.left.append((whole, reason)) if reason else taken.parts.append(whole)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_batch_slice(node):
                variable = self.roles[file].var(node.value)
                if variable not in ordered or self._in_model(file, node):
                    continue
                taken.orders |= drawn_by.get(variable, set())
                if self._is_shared(file, node):
                    continue
                use = self._use(file, node)
                if use != "no":
                    reason = use or self._unseeded(file, generators.get(variable))
                    taken.left.append((node, reason)) if reason else taken.whole.append(node)
                    part = node.slice
                    if not reason and isinstance(part, ast.Slice) and isinstance(part.upper, ast.BinOp):
                        taken.sizes.add(self._var(file, part.upper.right))

    def _ordered(
        self, file: File
    ) -> tuple[set[Var | None], dict[Var | None, ast.expr | None], dict[Var | None, set[ast.Call]]]:
        """The variables whose items are in an order that is drawn, the generators of these draws, and the draws."""
        drawn_by: dict[Var | None, set[ast.Call]] = {}
        roles = self.roles[file]
        found: set[Var | None] = set()
        generators: dict[Var | None, ast.expr | None] = {}
        for call in file.calls:
            name, generator = self._name(file, call)
            if name in _SHUFFLES and len(call.args) == 1:
                variable = roles.var(call.args[0])
                if variable is not None:
                    found.add(variable)
                    generators[variable] = generator
                    drawn_by.setdefault(variable, set()).add(call)
            elif name in _ORDERS:
                outer = _outermost(file, call)
                statement = file.names.parents[outer]
                if isinstance(statement, ast.IfExp):  # torch.randperm(n) if shuffle else torch.arange(n)
                    outer, statement = statement, file.names.parents[statement]
                if isinstance(statement, ast.Assign) and statement.value is outer:
                    for target in statement.targets:
                        found.add(roles.var(target))
                        generators[roles.var(target)] = generator
                        drawn_by.setdefault(roles.var(target), set()).add(call)
        found.discard(None)
        for _ in range(2):
            for statement in file.nodes if found else ():
                if isinstance(statement, ast.Assign):
                    for target, value in assigned_by(statement):
                        source = self._source(file, value, found)
                        variable = roles.var(target)
                        if source is not None and variable is not None:
                            found.add(variable)
                            generators.setdefault(variable, generators.get(source))
                            drawn_by.setdefault(variable, set()).update(drawn_by.get(source, ()))
        return found, generators, drawn_by

    def _source(self, file: File, value: ast.expr, ordered: set[Var | None]) -> Var | None:
        """The order that ``x[order]``, ``order[:800]`` and ``order[800:]`` follow."""
        match value:
            case ast.Subscript(value=inner, slice=ast.Slice() as part) if not (part.lower and part.upper):
                variable = self.roles[file].var(inner)
            case ast.Subscript(slice=(ast.Name() | ast.Attribute()) as index):
                variable = self.roles[file].var(index)
            case ast.Call(func=ast.Name(id=name), args=[inner, *_]) if name in _AS:
                return self._source(file, inner, ordered)
            case _:
                return None
        return variable if variable in ordered else None

    def _slices(self, file: File, taken: Taken) -> None:
        """``x[i : i + 12]`` of what stays in its order: it is not seen whether its rows are samples."""
        told: set[ast.AST] = set()
        for node in file.nodes:
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_batch_slice(node):
                if self._in_model(file, node) or self._is_shared(file, node) or self._use(file, node):
                    continue
                loop = next(p for p in file.names.ancestors(node) if isinstance(p, (ast.For, ast.While, Function)))
                if loop not in told:
                    told.add(loop)
                    taken.left.append((node, _WRITE.format(code=ast.unparse(node))))

    # Where they are used ---------------------------------------------------------------------------------------

    def _use(self, file: File, node: ast.AST, deep: int = 0, fed: bool = False) -> str:
        """Empty where a loop, or function, trains on every batch that it comes to here; else ``no``, or why not."""
        tested = False
        child = node
        for parent in file.names.ancestors(node):
            if isinstance(parent, ast.Lambda):
                return "no"
            if isinstance(parent, (ast.If, ast.IfExp)) and child is not parent.test:
                tested = True
            if isinstance(parent, ast.For) and child is parent.iter:
                use = self._loop_use(file, parent, fed)
                return "it is under a test here" if tested and not use else use
            if isinstance(parent, (ast.For, ast.While)) and not _yields(parent):
                use = self._loop_use(file, parent, fed)
                return "it is under a test here" if tested and not use else use
            if isinstance(parent, Function):
                return self._function_use(file, parent, tested, deep, fed)
            child = parent
        return "no"

    def _function_use(self, file: File, function: Function, tested: bool, deep: int, fed: bool) -> str:
        owner = file.names.parents.get(function)
        if function.name in _LOADED or deep > _DEEP:
            return "no"
        if not _yields(function) and self._trains_itself(file, function):
            around = [loop for other, call in self.instances.calls(file, function) for loop in _loops(other, call)]
            if not fed and any(self.fed(loop) for loop in around):
                return "no"
            return "it is under a test here" if tested else ""
        uses = [self._use(other, call, deep + 1, fed) for other, call in self.instances.calls(file, function)]
        if not uses or all(use == "no" for use in uses):
            return "no"
        called = [other.names.class_of(call) for other, call in self.instances.calls(file, function)]
        if isinstance(owner, ast.ClassDef) and any(around is not owner for around in called):
            return f"{owner.name} may serve others than this training"
        if any(uses):
            return next((u for u in uses if u not in {"", "no"}), f"{function.name}(...) is called elsewhere, too")
        return "it is under a test here" if tested else ""

    def _loop_use(self, file: File, loop: Loop, fed: bool = False) -> str:
        if not self._trains_itself(file, loop) or (isinstance(loop, ast.For) and self._makes_data(file, loop)):
            return "no"
        if not fed and any(self.fed(parent) for parent in (loop, *file.names.ancestors(loop))):
            return "no"
        return ""

    def _makes_data(self, file: File, loop: ast.For) -> bool:
        """Whether a loop makes loaders of what it goes through, such as the folds of a cross-validation."""
        held = names_in(item_of(loop, file.names.values_of))
        for item in (item for statement in loop.body for item in walk_own(statement)):
            if isinstance(item, ast.Assign) and names_in(item.value) & held:
                held |= _stored(item)
            elif isinstance(item, ast.Call) and names_in(item) & held:
                if self.project.external(file, item.func) == "torch.utils.data.DataLoader":
                    return True
        return False

    def _trains_itself(self, file: File, around: Loop | Function) -> bool:
        """Whether a loop or function trains, and no loop in it does so by itself."""
        for item in (item for statement in around.body for item in walk_own(statement)):
            if self.feeds.kind(file, item) == "trains":
                inner = next(
                    (p for p in file.names.ancestors(item) if isinstance(p, (ast.For, ast.While, Function))), None
                )
                if inner is around:
                    return True
        return False


def _loops(file: File, node: ast.AST) -> Iterator[ast.AST]:
    return (parent for parent in file.names.ancestors(node) if isinstance(parent, (ast.For, ast.While)))


def _parts_of(node: ast.AST) -> tuple[ast.expr, ast.For, ast.expr] | None:
    """Of ``for index in enumerate(order.split(12)):`` the order, the loop, and what it goes through."""
    if not isinstance(node, ast.For):
        return None
    whole = node.iter
    while isinstance(whole, ast.Call) and (dotted(whole.func) or "").split(".")[-1] in {"enumerate", "tqdm", "list"}:
        if not whole.args:
            return None
        whole = whole.args[0]
    if not isinstance(whole, ast.Call) or not isinstance(whole.func, ast.Attribute) or whole.func.attr not in _PARTS:
        return None
    module = isinstance(whole.func.value, ast.Name) and whole.func.value.id in {"np", "numpy", "torch"}
    if module and not whole.args:
        return None
    return (whole.args[0] if module else whole.func.value), node, whole


def _is_batch_slice(node: ast.Subscript) -> bool:
    """``order[i : i + 12]``, with an end and a start that are no constants."""
    part = node.slice
    return (
        isinstance(part, ast.Slice)
        and part.step is None
        and not (part.lower is None or part.upper is None)
        and not isinstance(part.lower, ast.Constant)
        and any(isinstance(item, ast.Name) for item in walk(part.lower))
    )


def _outermost(file: File, node: ast.expr) -> ast.expr:
    """What is made of a value that stays in its order: ``torch.from_numpy(node).long()``."""
    while True:
        parent = file.names.parents[node]
        above = file.names.parents.get(parent)
        if isinstance(parent, ast.Call) and parent.args[:1] == [node]:
            if (dotted(parent.func) or "").split(".")[-1] not in _AS:
                return node
            node = parent
        elif isinstance(parent, ast.Attribute) and isinstance(above, ast.Call) and parent.attr in _AS_METHODS:
            node = above
        else:
            return node


def _stored(statement: ast.stmt) -> set[str]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    return {name for target in targets for name in names_in(target)}


def _yields(node: ast.AST) -> bool:
    return any(
        isinstance(item, (ast.Yield, ast.YieldFrom))
        for statement in getattr(node, "body", ())
        for item in walk_own(statement)
    )


def _is_several(size: ast.expr) -> bool:
    return not isinstance(size, ast.Constant) or (isinstance(size.value, int) and size.value > 1)


def _fills_whole(file: File, node: ast.expr, size: ast.expr) -> bool:
    """Whether a function that draws positions counts them, ``for i in range(size)``, or makes room for them.

    A rank's share of them would be too few.
    """
    function = file.names.function_of(node)
    return any(
        isinstance(item, ast.Call)
        and (dotted(item.func) or "").split(".")[-1] in _ROOM
        and any(same(given, size) for given in (*item.args, *(p for a in item.args for p in getattr(a, "elts", ()))))
        for item in (walk(function) if function is not None else ())
    )


def _asking(file: File, size: ast.expr) -> ast.Call | ast.Slice | ast.Compare | None:
    """What asks for as many items as ``size``, or twice as many; not what counts, ``n // size``, or says how many."""
    child: ast.AST = size
    for parent in file.names.ancestors(size):
        match parent:
            case ast.Call() if (dotted(parent.func) or "").split(".")[-1] not in _NUMBERS:
                name = parent.func.attr if isinstance(parent.func, ast.Attribute) else dotted(parent.func)
                return None if child is parent.func or name in _SAYING else parent
            case ast.Slice() | ast.Compare():
                return parent
            case ast.BinOp(op=ast.Div() | ast.FloorDiv() | ast.Mod(), right=right) if child is right:
                return None
            case ast.BinOp() if any(isinstance(item, ast.Call) for item in walk(parent)):
                return None
            case ast.stmt() | ast.FormattedValue():
                return None
        child = parent
    return None


def _laid_out(file: File, nodes: list[ast.expr], size: str, asked: list[ast.expr | ast.Slice]) -> list[ast.expr]:
    """What is made of ``nodes`` and laid out by their size last, ``x.view(size, -1)``; none if more is made of them."""
    drawing = {file.names.statement_of(node) for node in nodes}
    block = file.names.siblings(min(drawing, key=lambda statement: statement.lineno))
    passed: set[ast.stmt] = set()  # what is laid out again later
    while drawing <= set(block):
        whole: set[str] = set()  # names of as many items as are drawn
        cut: dict[ast.stmt, set[str]] = {}
        again: set[ast.stmt] = set()
        for statement in block:
            read = {item.id for item in walk(statement) if isinstance(item, ast.Name) and _is_read(item)}
            if statement not in drawing and not read & whole.union(*cut.values()):
                continue
            if _is_laid(statement, size) and statement not in passed:
                again |= {other for other, names in cut.items() if names & read}
                cut[statement] = _stored(statement)
                whole -= cut[statement]
            elif statement in drawing or read & whole:
                if not isinstance(statement, ast.Assign):
                    return []
                whole |= _stored(statement)
                cut = {other: names - _stored(statement) for other, names in cut.items()}
        if not again:
            inside = {item for statement in passed.union(cut) for item in walk(statement)}
            values = [statement.value for statement in cut if isinstance(statement, (ast.Assign, ast.Return))]
            return [value for value in values if value is not None] if inside.issuperset(asked) else []
        passed |= again
    return []


def _is_read(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Load)


def _is_laid(statement: ast.stmt, size: str) -> bool:
    """``x = data[at].view(size, -1).long()``, ``return torch.reshape(x, (size, -1))``."""
    value = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _AS_LAID:
        value = value.func.value
    match value:
        case ast.Call(func=ast.Name(id="reshape") | ast.Attribute(value=ast.Name(id="torch" | "np"), attr="reshape")):
            dims = value.args[1:]
        case ast.Call(func=ast.Attribute(attr="view" | "reshape")):
            dims = value.args
        case ast.Call(func=ast.Attribute(attr="unflatten"), args=[ast.Constant(value=0), *dims]):
            pass
        case _:
            return False
    dims = [part for dim in dims[:1] for part in (dim.elts if isinstance(dim, (ast.Tuple, ast.List)) else [dim])]
    return bool(dims) and dotted(dims[0]) == size


def _reads_size(node: ast.AST) -> bool:
    match node:
        case (
            ast.Attribute(attr="shape") | ast.Call(func=ast.Attribute(attr="size")) | ast.Call(func=ast.Name(id="len"))
        ):
            return True
    return False


def _batch_sized(call: ast.Call) -> bool:
    """Whether the first dimension asked for is a batch size by name."""
    size = _first_size(call)
    return size is not None and bool(_BATCH.match((dotted(size) or "").split(".")[-1]))


def _is_index(file: File, around: ast.AST, name: str) -> bool:
    """Whether ``data[name]`` is taken, or ``data[i]`` for every ``i`` of it."""
    picked = {name}
    for item in walk(around):
        if isinstance(item, (ast.For, ast.comprehension)) and isinstance(item.target, ast.Name):
            if isinstance(item.iter, ast.Name) and item.iter.id == name:
                picked.add(item.target.id)
    return any(
        isinstance(item, ast.Subscript) and any(isinstance(n, ast.Name) and n.id in picked for n in walk(item.slice))
        for item in walk(around)
    )


def _samples_several(call: ast.Call) -> bool:
    """``distribution.sample((batch_size,))``: of a distribution, which is told a shape."""
    match call:
        case ast.Call(func=ast.Attribute(attr="sample" | "rsample"), args=[ast.Tuple() | ast.List()], keywords=[]):
            return True
    return False


def _first_size(call: ast.Call) -> ast.expr | None:
    """The first dimension that a call asks for."""
    sizes = [keyword.value for keyword in call.keywords if keyword.arg == "size"]
    sizes += [argument for argument in call.args if isinstance(argument, (ast.Tuple, ast.List))]
    function = (dotted(call.func) or "").split(".")[-1]
    if not sizes and function != "randint" and call.args:
        return call.args[0]
    listed = sizes[0] if sizes else None
    return listed.elts[0] if isinstance(listed, (ast.Tuple, ast.List)) and listed.elts else None
