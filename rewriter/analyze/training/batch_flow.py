"""What becomes of a batch that is another on a share of it: pairs of its samples, means over what pads them.

A loop is followed statement by statement, through the functions and models of the project that it calls.  What is
known of a value are *marks*: that its rows are the samples of a batch, in their order or in another.  Where both meet,
samples are paired, ``lam * x + (1 - lam) * x.flip(0)``.  Others are padded to the longest of the batch; a loss that is
their mean is one over the padding, too.  Both are told of if a loss comes of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, item_of, names_in, walk
from rewriter.analyze.training.across import LOSSES
from rewriter.analyze.training.padded import Padded, pads

_DEEP = 5
_TURNS = {"t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "rearrange", "T", "mT"}
_REDUCES = {
    "mean", "sum", "max", "min", "amax", "amin", "argmax", "argmin", "norm", "var", "std", "prod", "logsumexp",
    "median", "any", "all", "nanmean", "nansum", "vector_norm",
}  # fmt: skip
_NUMBERS = {"item", "tolist", "len", "dim", "numel", "nelement", "print", "isinstance"}
_CUTS = {"chunk", "split", "tensor_split", "array_split"}
_JOINS = {"cat", "concat", "concatenate", "vstack"}
_COUNTS = {"arange", "range"}
_DRAWS = {"randperm", "permutation", "permuted", "sample", "choice", "choices", "randint"}
_NOISE = {"rand", "randn", "random", "rand_like", "uniform"}
_SHUFFLES = {"shuffle", "shuffle_"}
_STACKS = {"stack", "tensor", "as_tensor", "array", "from_numpy", "pad_sequence", "LongTensor", "FloatTensor"}
_GROWS = {"append", "extend", "update", "add"}
_KEPT = ("paired", "averaged")
"""What stays known of a value, whatever is made of it."""
_MAKES = {
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "tensor", "as_tensor", "LongTensor", "array",
    "pad",
}  # fmt: skip
_LISTS = {"list", "tuple", "append", "to"}
_SAME = {
    "list", "tuple", "to", "cuda", "cpu", "pin_memory", "tree_map", "map_structure", "to_device", "send_to_device",
    "move_to_device", "move_data_to_device", "batch_to_device", "to_cuda", "deepcopy", "copy",
}  # fmt: skip
"""What gives the parts of a batch as many parts, of the same kind."""
_LEAVES_OUT = {"ignore_index", "reduction", "reduce", "size_average"}
_LONGEST = (True, "longest")
_BATCH_SIZE = re.compile(r"(?:^|[._])(?:batch_?size|bsz?|B|n)$")
_MODULES = ("torch.", "numpy.", "random.", "math.", "bmtrain.", "torchvision.")


Where = tuple[File, ast.expr]


@dataclass(frozen=True)
class _Mark:
    """One thing that is known of a value.

    ``batch``: what a loader gave; ``rows``: samples in their order; ``moved``, ``part``: in another, or some of them,
    ``key`` says which; ``cuts``: several parts; ``paired``: made of pairs; ``longest``: the length of the longest;
    ``padded``: filled up to it, ``key`` says which entry of a dict; ``averaged``: made of a mean over such; ``items``:
    a list of samples; ``stacked``: batches one behind the other, of which halves are no pairs; ``size``: how many there
    are; ``shape``; ``order``, ``identity``, ``noise``: positions, and what they are sorted by.
    """

    kind: str
    key: str = ""
    where: Where | None = None


_Marks = frozenset[_Mark]
_Value = _Marks | tuple["_Value", ...]
_NONE: _Marks = frozenset()
_BATCH, _ROWS = frozenset({_Mark("batch")}), frozenset({_Mark("rows")})
_SIZE, _IDENTITY = frozenset({_Mark("size")}), frozenset({_Mark("identity")})


class BatchFlow:
    """Answers for all files of a project."""

    def __init__(self, padded: Padded) -> None:
        self.padded, self.scripts = padded, padded.scripts
        self.project = self.scripts.project
        self._found: dict[tuple[File, str], set[ast.expr]] | None = None

    def told(self, file: File, kind: str) -> set[ast.expr]:
        """Where a file moves or cuts samples so that they are ``paired``, or takes the mean of padded ones."""
        if self._found is None:
            self._found = {}
            for mark in self._all():
                if mark.where is not None:
                    self._found.setdefault((mark.where[0], mark.kind), set()).add(mark.where[1])
        return self._found.get((file, kind), set())

    def _all(self) -> Iterator[_Mark]:
        collating, known = self.padded.collating()
        given: list[_Value] = []
        own: dict[File, list[_Value]] = {}
        for file, made in self._lambdas():
            run = _Run(self, file, 0)
            run.env.update((argument.arg, frozenset({_Mark("items")})) for argument in made.args.args)
            given.append(run.value(made.body))
            yield from _told(given[-1])
        for function in collating:
            run = _Run(self, function.file, 0)
            run.env.update((name, frozenset({_Mark("items")})) for name in function.parameters[-1:])
            run.block(function.node.body)
            given.append(run.returned)
            own.setdefault(function.file, []).append(run.returned)
            yield from run.found | _told(run.returned)
        rows = known and not any(map(_turns, collating))  # else samples may be columns
        every = self._all_collate()
        for file in self.scripts.training:
            # Where several functions make batches, a file's loops get those of its own one.
            made_here = given if len(given) == 1 else own.get(file, [])
            batch = _given(made_here, _ROWS if rows else _NONE) if every and len(made_here) == 1 else None
            batch = batch or (_BATCH if rows else _NONE)
            for place, held in self.scripts.handed.of(file).items():
                run = _Run(self, file, 0)
                if isinstance(place, ast.For):
                    run.bind(item_of(place), batch)
                else:
                    whole = _BATCH if rows else _NONE
                    run.env.update((name, whole) for name in held.names if isinstance(place, Function))
                run.batch, run.held = batch, held.names if rows else set()
                run.block(place.body)
                run.block(place.body)
                yield from run.found

    def _all_collate(self) -> bool:
        """Whether every loader has a function of its own that makes batches."""
        loaders = self.project.calls_of(self.scripts.training, {"torch.utils.data.DataLoader"})
        return all(any(k.arg == "collate_fn" for k in call.keywords) for _, call in loaders)

    def _lambdas(self) -> Iterator[tuple[File, ast.Lambda]]:
        """``collate_fn=lambda items: mix(*default_collate(items))``."""
        for file in self.scripts.training:
            for keyword in (k for call in file.calls for k in call.keywords if k.arg == "collate_fn"):
                if isinstance(keyword.value, ast.Lambda):
                    yield file, keyword.value


class _Run:
    """Goes through the statements of a loop or function; ``env`` is what is known of its names."""

    def __init__(self, flow: BatchFlow, file: File, deep: int, around: frozenset[ast.AST] = frozenset()) -> None:
        self.flow, self.file, self.deep, self.around = flow, file, deep, around
        self.scripts = flow.scripts
        self.env: dict[str, _Value] = {}
        self.keys: dict[str, str] = {}
        self.held: set[str] = set()
        self.batch: _Value = _BATCH
        self.returned: _Value = _NONE
        self.found: set[_Mark] = set()

    # Statements ------------------------------------------------------------------------------------------------

    def block(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                fresh = not any(_flat(self.env.get(name, _NONE)) for name in names_in(value))
                made = self.value(value)
                for target in targets:
                    self.bind(target, made)
                    for name in names_in(target) & self.held if fresh else ():
                        self.env[name] = self.env.get(name) or _BATCH
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.bind(target, self.value(value))
            case ast.AugAssign(target=target, value=value):
                self.bind(target, self.combine(self.value(target), self.value(value)))
            case ast.Expr(value=value):
                self.value(value)
            case ast.Return(value=ast.expr() as value):
                self.returned = _join(self.returned, self.value(value))
            case ast.If(test=test, body=body, orelse=orelse):
                self.value(test)
                before = dict(self.env)
                self.block(body)
                taken, self.env = self.env, before
                self.block(orelse)
                self.env = {k: _join(taken.get(k, _NONE), self.env.get(k, _NONE)) for k in {*taken, *self.env}}
            case ast.For(iter=iterated, body=body, orelse=orelse):
                items = self.items(iterated)
                if node in self.scripts.handed.of(self.file):
                    self.bind(item_of(node), self.batch)
                else:
                    self.bind(node.target, items)
                for _ in range(2):
                    self.block(body)
                self.block(orelse)
            case ast.While(body=body):
                for _ in range(2):
                    self.block(body)
            case ast.With(items=entered, body=body) | ast.AsyncWith(items=entered, body=body):
                for item in entered:
                    self.value(item.context_expr)
                self.block(body)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                self.block(body)
                for handler in handlers:
                    self.block(handler.body)
                self.block([*orelse, *final])

    def bind(self, target: ast.expr, value: _Value) -> None:
        match target:
            case ast.Name() | ast.Attribute():
                self.env[dotted(target) or ""] = value
            case ast.Starred(value=inner):
                self.bind(inner, _NONE)
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                for index, item in enumerate(elts):
                    self.bind(item, self._entry(value, index, isinstance(item, (ast.Tuple, ast.List)), len(elts)))
            case ast.Subscript(value=inner, slice=ast.Constant(value=str())):
                self.env[ast.unparse(target)] = value
                if isinstance(inner, ast.Name):
                    self.env[inner.id] = _flat(self.env.get(inner.id, _NONE)) | _only(value, *_KEPT)
            case ast.Subscript(value=inner):
                if dotted(inner):
                    filled = _only(self.value(inner), "padded")
                    self.bind(inner, self.combine(self.value(target), value) | filled)

    def _entry(self, value: _Value, index: int, nested: bool, length: int) -> _Value:
        """What a target at ``index`` gets of a value that is taken apart."""
        if isinstance(value, tuple):
            return value[index] if len(value) == length else _only(value, *_KEPT)
        kinds = {mark.kind: mark for mark in value}
        if "batch" in kinds:
            return (_BATCH if nested else _ROWS) | _only(value, *_KEPT, "padded")
        if "cuts" in kinds:
            return frozenset({_Mark("part", f"{index}", kinds["cuts"].where)})
        if "shape" in kinds:
            return _SIZE if index == 0 else _NONE
        if "items" in kinds:
            return value
        return value if index == 0 else _only(value, *_KEPT)

    # Expressions -----------------------------------------------------------------------------------------------

    def items(self, node: ast.expr) -> _Value:
        """What each item is that a loop goes through."""
        if isinstance(node, ast.Call):
            last = str(dotted(node.func) or getattr(node.func, "attr", "")).split(".")[-1]
            if last == "enumerate" and node.args:
                return (_NONE, self.items(node.args[0]))
            if last == "zip":
                return tuple(self.items(a.value if isinstance(a, ast.Starred) else a) for a in node.args)
            if last in {"items", "values"} and isinstance(node.func, ast.Attribute):
                held = self.value(node.func.value)
                each = _each(held) if _has(held, "batch") else _only(self.value(node), *_KEPT)
                return (_NONE, each) if last == "items" else each
        value = self.value(node)
        if isinstance(value, tuple):
            return _join(*value) if value else _NONE
        return _each(value) if _has(value, "batch") else value if _has(value, "items") else _only(value, *_KEPT)

    def value(self, node: ast.expr) -> _Value:
        match node:
            case ast.Name(id=name):
                return self.env.get(name, _NONE)
            case ast.Attribute(value=inner, attr=attr):
                if (path := dotted(node)) in self.env:
                    return self.env[path or ""]
                value = self.value(inner)
                if attr in {"device", "dtype"}:
                    return _NONE
                if attr == "shape":
                    return frozenset({_Mark("shape")}) if _samples(value) else _NONE
                return _only(value, *_KEPT, "padded") if attr in _TURNS else _ROWS if _has(value, "batch") else value
            case ast.Subscript():
                return self.env.get(ast.unparse(node)) or self._subscript(node)
            case ast.Call():
                return self._call(node)
            case ast.BinOp(left=left, right=right):
                both = self.combine(self.value(left), self.value(right))
                if _has(both, "identity") or _has(both, "order"):
                    return frozenset({_Mark("order", ast.unparse(node))})
                return both
            case ast.UnaryOp(operand=inner) | ast.Starred(value=inner) | ast.Await(value=inner):
                return self.value(inner)
            case ast.NamedExpr(target=target, value=inner):
                self.bind(target, made := self.value(inner))
                return made
            case ast.Compare(left=left, comparators=others):
                return _without(self.combine(*map(self.value, (left, *others))), "order", "identity", "noise")
            case ast.BoolOp(values=values):
                return _join(*map(self.value, values))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.value(test)
                return _join(self.value(body), self.value(orelse))
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                return tuple(map(self.value, elts))
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                return _NONE.union(*(_named(self.value(item), getattr(key, "value", "")) for key, item in pairs))
            case ast.ListComp(elt=elt, generators=made) | ast.GeneratorExp(elt=elt, generators=made):
                return self._comprehended(elt, made)
            case ast.DictComp(value=elt, generators=made):
                return self._comprehended(elt, made)
        return _NONE

    def _comprehended(self, elt: ast.expr, generators: Sequence[ast.comprehension]) -> _Value:
        parts = self._each_part(elt, generators)
        if parts is not None:
            return parts
        before = dict(self.env)
        for generator in generators:
            self.bind(generator.target, self.items(generator.iter))
        counted = [g for g in generators if _kinds(self.value(g.iter)) & {"identity", "order"}]
        value = self.value(elt)
        self.env = before
        if counted and isinstance(elt, (ast.BinOp, ast.UnaryOp)):
            return frozenset({_Mark("order", ast.unparse(elt))})  # [n - 1 - i for i in range(n)]
        return _BATCH | _only(value, *_KEPT, "padded") if _has(value, "rows") else _flat(value)

    def _each_part(self, elt: ast.expr, generators: Sequence[ast.comprehension]) -> _Value | None:
        """``[x.to(device) for x in batch]``, ``(batch[key] for key in ("a", "b"))``: each part by itself."""
        if len(generators) != 1 or generators[0].ifs:
            return None
        iterated, target = generators[0].iter, generators[0].target
        given = self.value(iterated)
        if not isinstance(given, tuple) or not given:
            return None
        keys = [getattr(item, "value", None) for item in getattr(iterated, "elts", ())]
        before, known, made = dict(self.env), dict(self.keys), list[_Value]()
        for index, item in enumerate(given):
            self.bind(target, item)
            if isinstance(target, ast.Name) and index < len(keys) and isinstance(keys[index], str):
                self.keys[target.id] = str(keys[index])
            made.append(self.value(elt))
        self.env, self.keys = before, known
        return tuple(made)

    def _subscript(self, node: ast.Subscript) -> _Value:
        value = self.value(node.value)
        taken = self._taken(node, value)
        if isinstance(value, tuple) and taken in value:
            return taken
        cut = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        slices = [part for part in cut if isinstance(part, ast.Slice)]
        made = _without(taken, "padded")
        key = self.keys.get(node.slice.id) if isinstance(node.slice, ast.Name) else getattr(node.slice, "value", None)
        if isinstance(key, str):
            made |= _entry_of(value, key)
        elif len(slices) == len(cut):
            made |= _only(value, "padded")
        if any(part.upper is not None and _has(self.value(part.upper), "longest") for part in slices[1:]):
            made |= {_Mark("padded", where=(self.file, node))}
        return made

    def _taken(self, node: ast.Subscript, value: _Value) -> _Value:
        index = node.slice
        first = index.elts[0] if isinstance(index, ast.Tuple) and index.elts else index
        number = first.operand if isinstance(first, ast.UnaryOp) else first
        if isinstance(value, tuple):
            if isinstance(first, ast.Constant) and isinstance(first.value, int) and first.value < len(value):
                return value[first.value]
            value = _flat(value)
        kept = _only(value, *_KEPT)
        if _has(value, "shape"):
            return _SIZE if isinstance(first, ast.Constant) and first.value == 0 else _NONE
        if _has(value, "cuts") and isinstance(first, ast.Constant):
            return self._entry(value, first.value, False, 0) if isinstance(first.value, int) else kept
        if _has(value, "items"):
            return value
        if not _samples(value):
            if _kinds(value) & {"identity", "order"}:
                return _order(node, f"{ast.unparse(node)}")
            return kept | (_ROWS if _samples(at := self.value(first)) and not _has(at, "moved") else _NONE)
        if isinstance(number, ast.Constant):
            if number.value is ...:
                return value
            single = isinstance(number.value, int) and not _has(value, "batch")
            return kept if number.value is None or single else kept | _ROWS
        if isinstance(first, ast.Slice):
            if first.lower is None and first.upper is None and first.step is None:
                return value
            if ast.unparse(first) == "::-1":
                return self._moved(value, "reversed", node)
            if _has_any(value, "stacked"):
                return kept | _ROWS
            return (
                kept | {_Mark("part", ast.unparse(first), (self.file, node))}
                if not _kinds(value) & {"moved", "part"}
                else kept
            )
        at = self.value(first)
        if _has(value, "batch") and not _flat(at) and not isinstance(first, (ast.Compare, ast.BoolOp)):
            return kept | _ROWS  # batch[key]
        return self._picked(value, at, node)

    def _picked(self, value: _Value, at: _Value, node: ast.expr) -> _Value:
        """Samples at positions."""
        for mark in _flat(at):
            if mark.kind == "order":
                return self._moved(value, mark.key, node)
        return _flat(value) if _has(at, "identity") else _only(value, *_KEPT)

    def _moved(self, value: _Value, key: str, node: ast.expr) -> _Value:
        """Samples in another order; what was moved before may be back in its own."""
        kinds, kept = _kinds(value), _only(value, *_KEPT)
        if kinds & {"identity", "order"}:
            return frozenset({_Mark("order", key)})
        if kinds & {"moved", "part"} or not _samples(value):
            return kept
        return kept | {_Mark("moved", key, (self.file, node))}

    def combine(self, *values: _Value) -> _Marks:
        """What is made of several values, sample by sample."""
        every = _NONE.union(*map(_flat, values))
        moved = {mark for mark in every if mark.kind == "moved"}
        parts = {mark for mark in every if mark.kind == "part"}
        in_order = any(mark.kind in {"rows", "batch"} for mark in every)
        if len({mark.key for mark in moved}) + in_order > 1 and moved:
            made = moved
        elif len({mark.key for mark in parts}) > 1:
            made = parts
        else:
            return every
        paired = {_Mark("paired", mark.key, mark.where) for mark in made}
        return frozenset(mark for mark in every if mark.kind not in {"moved", "part"}) | paired | _ROWS

    # Calls -----------------------------------------------------------------------------------------------------

    def _call(self, node: ast.Call) -> _Value:
        func = node.func
        external = self.flow.project.external(self.file, func)
        name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
        method = isinstance(func, ast.Attribute) and not external.startswith(_MODULES)
        base = self.value(func.value) if isinstance(func, ast.Attribute) and method else _NONE
        given = [self.value(argument) for argument in node.args]
        named = {keyword.arg or "": self.value(keyword.value) for keyword in node.keywords}
        if method and name in {"to", "type_as"}:
            given, named = [], {}  # where the result is, and of what kind
        elif method and name == "new_tensor":
            base = _NONE
        if external == "bmtrain.gather_batch":
            return _NONE
        if external == "bmtrain.shard_batch":
            return _ROWS
        if name == "backward":
            self.found |= _told(_join(base, *given, *named.values()))
            return _NONE
        instances = self.scripts.collectives.instances
        functions = self._functions(node) if self.deep < _DEEP else []
        if functions and all(function.node in self.around for function in functions):
            return given[0] if given else _NONE
        functions = [function for function in functions if function.node not in self.around]
        if isinstance(func, ast.Name) and name == "map" and len(node.args) == 2:
            return self._mapped(node)
        if self._averages(node, external, name) and any(_has_any(item, "padded") for item in (*given, *named.values())):
            told = _told(_join(*given, *named.values()))
            return frozenset(told | {_Mark("averaged", where=(self.file, node))})
        if functions:
            return _join(*(self._enter(function, node, given, named) for function in functions))
        for other, function in instances.given_to(self.file, func) if isinstance(func, ast.Name) else ():
            if other is self.file and isinstance(function, ast.Lambda) and function not in self.around:
                run = _Run(self.flow, other, self.deep + 1, self.around | {function})
                run.env = {**self.env, **dict(zip((a.arg for a in function.args.args), given, strict=False)), **named}
                made = run.value(function.body)
                self.found |= run.found
                return made
        call = _Call(node, name, external, [base, *given] if method else given, node.args[0 if method else 1 :], named)
        made = self._known(call)
        path = dotted(_changed(func.value)) if isinstance(func, ast.Attribute) and method else None
        if path and name.endswith("_"):
            self.env[path] = made
        elif path and name in _GROWS and not _samples(base):
            self.env[path] = _flat(base) | _flat(made)
        elif name in _SHUFFLES and node.args and _has(given[0], "identity"):
            self.bind(node.args[0], _order(node))
        return made

    def _functions(self, node: ast.Call) -> list[FunctionInfo]:
        """The functions of the project that a call runs, the forward of its models among them."""
        func, instances = node.func, self.scripts.collectives.instances
        owner = self.scripts.roles[self.file].model_class(func) or instances.class_of(self.file, func)
        if owner is not None and self.scripts.classes.is_module(owner):
            forward = self.scripts.classes.method(owner, "forward")
            found = [] if forward is None else [forward[0].file.function_info(forward[1])]
        else:
            found = instances.called(self.file, func)
            if not found and not isinstance(self.flow.project.resolve(self.file, func), ClassInfo):
                found = self.scripts.feeds.functions(self.file, node)
        return found

    def _mapped(self, node: ast.Call) -> _Value:
        """``map(lambda x: x.to(device), batch)`` is ``(x.to(device) for x in batch)``."""
        function, iterated = node.args
        item = ast.Name("_mapped", ctx=ast.Load())
        target = ast.Name("_mapped", ctx=ast.Store())
        if isinstance(function, ast.Lambda) and len(function.args.args) == 1:
            target.id = function.args.args[0].arg
            elt: ast.expr = function.body
        elif function in self.file.names.parents and self._functions(called := ast.Call(function, [item], [])):
            elt = called
        else:
            elt = item
        return self._comprehended(elt, [ast.comprehension(target, iterated, [], 0)])

    def _enter(self, function: FunctionInfo, node: ast.Call, given: list[_Value], named: dict[str, _Value]) -> _Value:
        run = _Run(self.flow, function.file, self.deep + 1, self.around | {function.node})
        placed: list[_Value] = []
        for argument, value in zip(node.args, given, strict=True):
            placed += value if isinstance(argument, ast.Starred) and isinstance(value, tuple) else [value]
        run.env.update(zip(function.parameters, placed, strict=False))
        run.env.update(named)
        if _has(entries := named.get("", _NONE), "batch"):
            run.env.update((n, _ROWS | _entry_of(entries, n)) for n in function.parameters if n not in run.env)
        if any(isinstance(a, ast.Starred) and _has(v, "batch") for a, v in zip(node.args, given, strict=True)):
            run.env.update((name, _ROWS) for name in function.parameters[len(given) - 1 :])
        run.block(function.node.body)
        self.found |= run.found
        owner = function.file.names.class_of(function.node)
        of_model = owner is not None and self.scripts.classes.is_module(function.file.class_info(owner))
        return _without(run.returned, "padded") if of_model and not isinstance(run.returned, tuple) else run.returned

    def _averages(self, node: ast.Call, external: str, name: str) -> bool:
        """Whether a call is that of a loss function, which takes the mean over all that it is given."""
        made = [node]
        if external.startswith("torch.nn.functional."):
            if not LOSSES.search(name):
                return False
        else:
            found = [(file, call) for file, call in self._held(self.file, node.func) if isinstance(call, ast.Call)]
            made = [call for _, call in found]
            names = [self.flow.project.external(file, call.func) for file, call in found]
            if not made or not all(known.startswith("torch.nn.") and known.endswith("Loss") for known in names):
                return False
        return not any(keyword.arg in _LEAVES_OUT for call in made for keyword in call.keywords)

    def _held(self, file: File, node: ast.expr, deep: int = 0) -> Iterator[tuple[File, ast.expr]]:
        """What a name is given, by whoever calls its function, too."""
        for other, value in self.scripts.collectives.instances.given_to(file, node):
            yield other, value
            if isinstance(value, (ast.Name, ast.Attribute)) and deep < _DEEP:
                yield from self._held(other, value, deep + 1)

    def _known(self, call: _Call) -> _Value:
        """What a call of torch, numpy, Python or of the unknown gives."""
        name, operands = call.name, call.operands
        value = operands[0] if operands else _NONE
        parts = next((item for item in operands if isinstance(item, tuple)), None)
        if parts is not None and (name in _SAME or isinstance(call.node.func, ast.Call)):
            return parts
        if name in {"get", "pop"} and call.rest and isinstance(getattr(call.rest[0], "value", None), str):
            if _has(value, "batch"):
                return _ROWS | _only(value, *_KEPT) | _entry_of(value, str(getattr(call.rest[0], "value", "")))
        every = self.combine(*operands, *call.named.values())
        kept = _only(every, *_KEPT)
        if not call.external.startswith(_MODULES) and not _kinds(value) & {"padded", "longest"} and name not in _LISTS:
            every = _without(every, "padded")  # what a model makes of it
        longest = any(k.arg == "padding" and getattr(k.value, "value", None) in _LONGEST for k in call.node.keywords)
        if longest or name == "pad_sequence":
            return self._filled(call, every)
        if pads(call.node) or (name in {"max", "amax"} and not call.rest and not call.named and _samples(value)):
            return kept | {_Mark("longest")}
        if name in _MAKES and _has_any(every, "longest"):
            every = _without(every, "longest") | {_Mark("padded", where=(self.file, call.node))}
        if name == "mean" and not call.rest and not call.named and _has(value, "padded"):
            return kept | {_Mark("averaged", where=(self.file, call.node))}
        if name in _COUNTS:
            return _order(call.node, "reversed") if _counts_down(call.node) else _IDENTITY
        if name in _DRAWS and (call.external or not _samples(value)):
            return _order(call.node)
        if name in _NOISE:
            return frozenset({_Mark("noise")})
        if name in {"argsort", "sort"} and _has(value, "noise"):
            return _order(call.node) if call.over_first(last=True) else _NONE
        if name == "reversed" or (name in {"flip", "flipud"} and (name == "flipud" or call.over_first())):
            return self._moved(value, "reversed", call.node)
        if name == "roll":
            return self._moved(value, call.rolled(), call.node) if call.rolls_first() else value
        if name == "index_select":
            return self._picked(value, operands[-1], call.node) if call.over_first() else every
        if name in _CUTS:
            first = call.over_first(at=1, always=True) and _samples(value)
            if first and _has_any(every, "stacked"):
                return kept | _BATCH
            return kept | {_Mark("cuts", where=(self.file, call.node))} if first else every
        if name in _STACKS and _has(every, "items"):
            return _ROWS
        if name == "default_collate":
            return _BATCH
        if name in _JOINS | {"stack"}:
            return self._joined(call, value, every)
        if name == "size":
            return _SIZE if len(call.rest) == 1 and _integer(call.rest[0]) == 0 else frozenset({_Mark("shape")})
        if name == "len":
            return _SIZE if _samples(value) else _NONE
        if name in _NUMBERS or (isinstance(call.node.func, ast.Name) and name in {"float", "int", "str", "type"}):
            return _only(every, "longest")
        if name in _REDUCES:
            return kept if call.over_first(always=True, every=True) else _without(every, "padded")
        if name in _TURNS | {"unbind"} or (name in {"unsqueeze", "squeeze", "flatten"} and call.over_first(every=True)):
            return kept | _only(value, "padded")
        if name in {"view", "reshape", "expand", "repeat", "tile"}:
            return self._shaped(call, value)
        if LOSSES.search(name) and "reduction" not in call.named:
            return kept
        return every

    def _filled(self, call: _Call, every: _Marks) -> _Value:
        """``pad_sequence(xs, batch_first=True)``, ``tokenizer(texts, padding=True)``."""
        words = {keyword.arg: keyword.value for keyword in call.node.keywords}
        rows = _ROWS if getattr(words.get("batch_first", words.get("padding")), "value", False) else _NONE
        if "padding_value" in words and _integer(words["padding_value"]) == -100:
            return rows  # left out, and told of elsewhere
        return rows | _only(every, *_KEPT) | {_Mark("padded", where=(self.file, call.node))}

    def _joined(self, call: _Call, value: _Value, every: _Marks) -> _Value:
        """``torch.cat([a, b], dim)``."""
        if not call.over_first(always=True):
            return every
        inner = value if isinstance(value, tuple) else ()
        parts = [mark for item in inner for mark in _flat(item) if mark.kind == "part"]
        if len(parts) == len(inner) == 2 and parts[0].key.endswith(":") and parts[1].key.startswith(":"):
            return frozenset({_Mark("moved", f"roll {parts[1].key}", (self.file, call.node))})  # cat([x[1:], x[:1]])
        each = [self.combine(item) for item in inner]
        stacked = {_Mark("stacked")} if _samples(value) and len(inner) != 1 else set[_Mark]()
        return _NONE.union(stacked, *(_only(item, "paired", "items") for item in each))

    def _shaped(self, call: _Call, value: _Value) -> _Value:
        """``x.view(len(x), -1)``: samples stay rows where the first size is theirs, or is not said."""
        sizes = [item for a in call.rest for item in (a.elts if isinstance(a, (ast.Tuple, ast.List)) else [a])]
        if not sizes:
            return value
        first, several = sizes[0], call.name in {"repeat", "tile"}
        same = _integer(first) == 1 if several else _integer(first) == -1 or _has(self.value(first), "size")
        named = not several and bool(_BATCH_SIZE.search(dotted(first) or ""))
        whole = isinstance(first, (ast.Attribute, ast.Call)) and _has(self.value(first), "shape")
        return value if same or named or whole else _only(value, *_KEPT, "padded")


@dataclass(frozen=True)
class _Call:
    """A call: ``operands`` are what is known of the tensor and the arguments, ``rest`` the arguments behind it."""

    node: ast.Call
    name: str
    external: str
    operands: list[_Value]
    rest: list[ast.expr]
    named: dict[str, _Value]

    def over_first(self, at: int = 0, always: bool = False, every: bool = False, last: bool = False) -> bool:
        """Whether the dimensions that are given include the first.

        ``at`` is their place behind the tensor; ``always`` is the answer where none are given. With ``every`` all
        further arguments are some, with ``last`` one counts from the end of a vector.
        """
        given = [k.value for k in self.node.keywords if k.arg in {"dim", "dims", "axis", "start_dim"}]
        given = given or (self.rest[at:] if every or self.name == "flip" else self.rest[at : at + 1])
        if not given:
            return always or every or last
        dims = [item for a in given for item in (a.elts if isinstance(a, (ast.Tuple, ast.List)) else [a])]
        return any(_integer(item) in ((0, -1) if last else (0,)) for item in dims)

    def rolls_first(self) -> bool:
        given = [k.value for k in self.node.keywords if k.arg in {"dims", "axis", "dim"}] or self.rest[1:2]
        dims = [item for a in given for item in (a.elts if isinstance(a, (ast.Tuple, ast.List)) else [a])]
        return not dims or any(_integer(item) == 0 for item in dims)

    def rolled(self) -> str:
        shifts = [k.value for k in self.node.keywords if k.arg in {"shifts", "shift"}] or self.rest[:1]
        return "roll " + " ".join(map(ast.unparse, shifts))


def _turns(function: FunctionInfo) -> bool:
    """Whether a function that makes batches may lay samples side by side, as columns, or joins them."""
    for node in walk(function.node):
        match node:
            case ast.Attribute(attr=attr) if attr in _TURNS | _JOINS:
                return True
            case ast.Call(func=func, keywords=keywords):
                name, given = (dotted(func) or "").split(".")[-1], {k.arg: k.value for k in keywords}
                if name == "pad_sequence" and getattr(given.get("batch_first"), "value", False) is not True:
                    return True
                if name == "stack" and any(
                    _integer(dim) != 0
                    for dim in (*node.args[1:2], *(v for k, v in given.items() if k in {"dim", "axis"}))
                ):
                    return True
    return False


def _flat(value: _Value) -> _Marks:
    return _NONE.union(*map(_flat, value)) if isinstance(value, tuple) else value


def _kinds(value: _Value) -> set[str]:
    return {mark.kind for mark in _flat(value)}


def _has(value: _Value, kind: str) -> bool:
    return not isinstance(value, tuple) and any(mark.kind == kind for mark in value)


def _has_any(value: _Value, kind: str) -> bool:
    return any(mark.kind == kind for mark in _flat(value))


def _samples(value: _Value) -> bool:
    return bool(_kinds(value) & {"rows", "batch", "moved", "part"})


def _only(value: _Value, *kinds: str) -> _Marks:
    return frozenset(mark for mark in _flat(value) if mark.kind in kinds)


def _without(value: _Value, *kinds: str) -> _Marks:
    return frozenset(mark for mark in _flat(value) if mark.kind not in kinds)


def _join(*values: _Value) -> _Value:
    """What is known of a value that is one of several."""
    known = [value for value in values if value]
    if known and all(isinstance(value, tuple) and len(value) == len(known[0]) for value in known):
        return tuple(_join(*items) for items in zip(*known, strict=True))
    parts = [value for value in known if isinstance(value, tuple)]
    if parts and all(len(value) == len(parts[0]) for value in parts):
        kept = _NONE.union(*(_only(value, *_KEPT, "stacked") for value in known if not isinstance(value, tuple)))
        made = [_join(*items) for items in zip(*parts, strict=True)]
        return tuple(_flat(item) | kept if kept else item for item in made)
    return _NONE.union(*map(_flat, known))


def _each(batch: _Value) -> _Marks:
    """What each part of a batch is."""
    return _ROWS | _only(batch, *_KEPT, "padded")


def _named(value: _Value, key: object) -> _Marks:
    """What is known of a dict's entry, which only it is padded for."""
    kept = {mark for mark in _flat(value) if mark.kind != "padded"}
    return frozenset(kept | {_Mark("padded", str(key or ""), mark.where) for mark in _only(value, "padded")})


def _entry_of(value: _Value, key: str) -> _Marks:
    """What fills up the entry of a dict."""
    return frozenset(_Mark("padded", "", m.where) for m in _only(value, "padded") if m.key in ("", key))


def _told(value: _Value) -> set[_Mark]:
    return {mark for mark in _flat(value) if mark.kind in _KEPT}


def _given(returned: list[_Value], rows: _Marks) -> _Value:
    """What a loop gets of a function that makes batches, if it pads."""
    value = returned[0]
    if not any(mark.kind == "padded" for mark in _flat(value)):
        return _NONE
    if isinstance(value, tuple):
        return tuple(rows | _only(item, "padded") for item in value)
    return (_BATCH if rows else _NONE) | _only(value, "padded")


def _order(node: ast.expr, key: str = "") -> _Marks:
    """Positions in an order; what is drawn is another each time."""
    return frozenset({_Mark("order", key or f"{node.lineno}:{node.col_offset}")})


def _changed(node: ast.expr) -> ast.expr:
    """The tensor that ``x.mul_(2).add_(y)`` changes."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
        node = node.func.value
    return node


def _counts_down(call: ast.Call) -> bool:
    step = call.args[2] if len(call.args) > 2 else next((k.value for k in call.keywords if k.arg == "step"), None)
    return step is not None and (_integer(step) or 0) < 0


def _integer(node: ast.expr) -> int | None:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            return -number
    return None
