"""Reads a block's forward as tensor-parallel ranks would run it: which layers can be split, and what must be rewritten.

A linear layer that gets whole features is tried as one that gives each rank its share of the output features
("column"), and one that gets such shares as one that adds up what the ranks make of theirs ("row"). What lies between
must be known to do the same with a share as with the whole. Where it is not, the layers that the share came from are
taken out, and the forward is read anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rewriter.analyze.model.attributes import Attributes
from rewriter.analyze.model.shapes import Item, Odd, text_of, viewed
from rewriter.analyze.model.tensors import (
    NONE,
    WHOLE,
    Again,
    Chain,
    Dim,
    Failure,
    Inline,
    Lead,
    Linear,
    Mixed,
    Num,
    Object,
    Origins,
    Routine,
    Shape,
    Simple,
    Tensor,
    Torch,
    Tup,
    Value,
    is_hidden,
    origins_of,
)
from rewriter.analyze.model.ways import EACH, OPERATIONS, Unknown, operated, place
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, names_in, positional, same

_DEPTH = 16
_TRIES = 200
_UNSEEN: Origins = frozenset({"?"})
"""Any layer may be behind it."""
_HIDDEN = 3
"""Dimensions of hidden states: (batch, sequence, features)."""
_VIEWS = {"view", "reshape", "unflatten", "flatten", "expand", "expand_as"}
_PIECES = {"chunk", "split", "unbind"}
_METHODS = OPERATIONS | _VIEWS | _PIECES | {"size", "dim", "numel"}
_FUNCTIONS = ("torch.", "torch.nn.functional.", "math.")
_WORD, _DIVIDED = re.compile(r"[A-Za-z_][\w.]*"), re.compile(r"//?[\w.]+")
_SYMBOLS: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """An expression of a forward that must be written otherwise, and the layers that are split only then."""

    file: File
    node: ast.expr
    text: str
    origins: Origins


@dataclass(frozen=True)
class Taken:
    """Layers that stay whole, and why."""

    origins: Origins
    reason: str
    file: File
    line: int


@dataclass
class Reading:
    """One reading of a forward. ``rows`` are layers that take shares, and the layers that these come from."""

    rows: dict[str, Origins] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)
    parts: dict[str, int] = field(default_factory=dict)
    grouped: set[str] = field(default_factory=set)
    norms: dict[str, Origins] = field(default_factory=dict)
    whole_norms: set[str] = field(default_factory=set)
    heads: dict[str, set[str]] = field(default_factory=dict)
    """By layers, the attributes of their module that count heads, or such a number itself."""
    edits: dict[ast.expr, Edit] = field(default_factory=dict)
    kept: set[ast.expr] = field(default_factory=set)
    calls: dict[str, int] = field(default_factory=dict)
    sites: dict[str, set[ast.AST]] = field(default_factory=dict)


@dataclass
class _Frame:
    """A function that is being read."""

    file: File
    function: Function | None
    me: Object | None
    my_name: str
    names: dict[str, Value]
    key: str
    returned: list[Value] = field(default_factory=list)


class Forward:
    """What can be split in blocks of one class."""

    def __init__(
        self,
        classes: Classes,
        attributes: Attributes,
        block: ClassInfo,
        taken: Mapping[str, Taken],
        trained: Collection[str] = (),
    ) -> None:
        self.classes, self.attributes, self.project = classes, attributes, classes.project
        self.block = block
        self.taken = dict(taken)
        """Layers that stay whole, each with the reason."""
        self.found: list[Taken] = []
        self.dims: dict[str, int] = {}
        self.assumed: set[str] = set()
        """Arguments that are taken for (batch, sequence, features), as nothing says how many dimensions they have."""
        self.trained = trained
        """Arguments of the blocks, beside the first, that are made of parameters."""
        self.hidden: set[str] = set()
        self.counts: set[str] = set()
        """Numbers of heads, by the views that cut features by them."""
        self.seen: set[str] = set()
        self.linear: dict[str, Linear] = {}
        self.reading = Reading()
        self.depth = 0
        self.loops = 0
        self._read_until_sure()

    # -- readings -------------------------------------------------------------------------------------------------

    def _read_until_sure(self) -> None:
        for _ in range(_TRIES):
            self.reading = Reading()
            self.depth = self.loops = 0
            try:
                self._read()
                self._check()
                return
            except Again:
                continue
            except Failure as failure:
                self._take(failure)
            except RecursionError:
                break
        self.reading = Reading()

    def _read(self) -> None:
        found = self.classes.method(self.block, "forward")
        if found is None:
            return
        info = found[0].file.function_info(found[1])
        hidden = Tensor(hidden=True)  # what comes first is what the blocks hand on
        first = positional(info.node)[1:2]
        others = dict.fromkeys(set(self.trained) - {*first}, hidden)
        result = self._run(Routine(info, Object(self.block, "")), [hidden], others, info.node)
        if origins_of(result):
            raise Failure(origins_of(result), "what it gives leaves the block", info.file, info.node)

    def _check(self) -> None:
        reading = self.reading
        joined = NONE.union(*reading.rows.values())
        info = self.block
        for name in sorted(reading.columns - joined):
            raise Failure(frozenset({name}), "no linear layer of the block takes what it gives", info.file, info.node)
        for name in sorted(set(reading.norms) & reading.whole_norms):
            raise Failure(reading.norms[name], f"{name} is also used for whole values", info.file, info.node)
        for node, edit in reading.edits.items():
            if node in reading.kept:
                raise Failure(edit.origins, f"{ast.unparse(node)} is not only for its views", edit.file, node)

    def _take(self, failure: Failure) -> None:
        origins = failure.origins - set(self.taken)
        if not origins:  # it cannot be helped by taking out more
            origins = (failure.origins or frozenset(self.linear)) | (set(self.linear) - set(self.taken))
        taken = Taken(frozenset(origins), failure.reason, failure.file, failure.line)
        self.found.append(taken)
        self.taken |= dict.fromkeys(origins, taken)

    # -- functions ------------------------------------------------------------------------------------------------

    def _run(self, routine: Routine, args: Sequence[Value], options: Mapping[str, Value], at: ast.AST) -> Value:
        function, file, owner = routine.info.node, routine.info.file, routine.owner
        given = origins_of(Tup((*args, *options.values())))
        if self.depth > _DEPTH or any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list):
            raise Failure(given or frozenset(self.linear), f"{function.name} calls too deep", file, at)
        key = f"{owner.name if owner else ''}:{function.name}:{getattr(at, 'lineno', 0)}"
        frame = _Frame(file, function, owner, "", {}, key)
        names = positional(function)
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
        if owner is not None and not static and names:
            frame.my_name, frame.names[names[0]] = names[0], owner
            names = names[1:]
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
        rest = tuple(args[len(names) :])
        extra = {k: v for k, v in options.items() if k not in names}
        defaults = dict(zip(reversed(names), reversed(function.args.defaults), strict=False))
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
            names.append(argument.arg)
            if default is not None:
                defaults[argument.arg] = default
            if argument.arg in extra:
                values[argument.arg] = extra.pop(argument.arg)
        if function.args.vararg:
            frame.names[function.args.vararg.arg] = Tup(rest)
        if origins_of(Tup(tuple(extra.values()))) or (rest and not function.args.vararg):
            raise Failure(given, f"how {function.name} is called is not followed", file, at)
        self.depth += 1
        for name in names:
            value = values.get(name)
            if value is None:
                value = self._expression(frame, defaults[name]) if name in defaults else WHOLE
                value = value if isinstance(value, Num) and owner is not None and owner.name else WHOLE
            frame.names[name] = self._argument(value, f"{key}.{name}")
        self._statements(frame, function.body)
        self.depth -= 1
        if not frame.returned:
            return Num("None")
        result = frame.returned[0]
        for other in frame.returned[1:]:
            result = _either(result, other)
        return result

    def _argument(self, value: Value, source: str) -> Value:
        if isinstance(value, Tensor) and not value.origins and value.dims is None:
            return Tensor(self._lead(source, 0), NONE, value.hidden or source in self.hidden, value.norm)
        return value

    def _lead(self, source: str, dropped: int) -> tuple[Dim | Lead, ...]:
        known = self.dims.get(source)
        if known is None or known < dropped:
            return (Lead(source, dropped),)
        return tuple(Dim(f"{source}.{number}") for number in range(known - dropped))

    def _learn(self, source: str, dims: int, at: Failure) -> None:
        if source in self.dims or source == "?":
            raise at
        self.dims[source] = dims
        raise Again

    def _odd(self, odd: Odd, origins: Origins, frame: _Frame, node: ast.AST) -> Failure:
        """What an operation that is not followed means."""
        if isinstance(odd, Unknown) and odd.lead is not None and odd.lead.of not in self.dims:
            self.dims[odd.lead.of] = odd.known or _HIDDEN
            if not odd.known:
                self.assumed.add(odd.lead.of)
            raise Again from None
        return Failure(origins, str(odd), frame.file, node)

    # -- statements -----------------------------------------------------------------------------------------------

    def _statements(self, frame: _Frame, body: Sequence[ast.stmt]) -> bool:
        """Whether the function ends in them."""
        return any(self._statement(frame, statement) for statement in body)

    def _statement(self, frame: _Frame, node: ast.stmt) -> bool:
        match node:
            case ast.Return(value=value):
                frame.returned.append(self._expression(frame, value) if value is not None else Num("None"))
                return True
            case ast.Raise():
                return True
            case ast.Assign(targets=targets, value=value):
                given = self._expression(frame, value)
                for target in targets:
                    self._assign(frame, target, given)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self._assign(frame, target, self._expression(frame, value))
            case ast.AugAssign(target=target, op=op, value=value):
                self._assign(frame, target, self._binary(frame, node, target, op, value))
            case ast.Expr(value=value):
                self._expression(frame, value)
            case ast.Assert(test=test):
                self._expression(frame, test)
            case ast.If():
                return self._branches(frame, node)
            case ast.For() | ast.While():
                self._loop(frame, node)
            case ast.With(items=items, body=body):
                for item in items:
                    self._expression(frame, item.context_expr)
                return self._statements(frame, body)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                ended = self._statements(frame, [*body, *orelse])
                for handler in handlers:
                    self._aside(frame, handler.body)
                return self._statements(frame, final) or ended
            case ast.FunctionDef(name=name):
                frame.names[name] = Mixed(_UNSEEN)  # whoever uses it may use anything
            case ast.Match() | ast.AsyncFor() | ast.AsyncWith() | ast.AsyncFunctionDef() | ast.ClassDef():
                origins = _UNSEEN | self._named(frame, node)
                raise Failure(origins, f"{type(node).__name__} is not followed", frame.file, node)
        return False

    def _named(self, frame: _Frame, node: ast.AST) -> Origins:
        """What the names inside a piece of code are made of."""
        return NONE.union(*(origins_of(frame.names[name]) for name in names_in(node) if name in frame.names))

    def _aside(self, frame: _Frame, body: Sequence[ast.stmt]) -> None:
        """Statements that may run, or not."""
        before = dict(frame.names)
        if not self._statements(frame, body):
            frame.names = _merged(before, frame.names)
        else:
            frame.names = before

    def _branches(self, frame: _Frame, node: ast.If) -> bool:
        self._expression(frame, node.test)
        before, calls = dict(frame.names), dict(self.reading.calls)
        first = self._statements(frame, node.body)
        names, first_calls = frame.names, self.reading.calls
        frame.names, self.reading.calls = before, calls
        second = self._statements(frame, node.orelse)
        if first != second:
            frame.names = names if second else frame.names
            self.reading.calls = first_calls if second else self.reading.calls
        else:
            frame.names = _merged(names, frame.names)
            both = first_calls.keys() | self.reading.calls.keys()
            self.reading.calls = {k: max(first_calls.get(k, 0), self.reading.calls.get(k, 0)) for k in both}
        return first and second

    def _loop(self, frame: _Frame, node: ast.For | ast.While) -> None:
        if isinstance(node, ast.For):
            over = self._expression(frame, node.iter)
            if origins_of(over):
                raise Failure(origins_of(over), "a loop takes apart what it gives", frame.file, node)
            self._assign(frame, node.target, WHOLE)
        else:
            self._expression(frame, node.test)
        self.loops += 1
        for _ in range(2):  # what the first time leaves meets the second one
            before = dict(frame.names)
            self._statements(frame, node.body)
            frame.names = _merged(before, frame.names)
        self.loops -= 1
        self._statements(frame, node.orelse)

    def _assign(self, frame: _Frame, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            frame.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = self._unpacked(frame, target, value, len(target.elts))
            for item, one in zip(target.elts, values, strict=True):
                self._assign(frame, item.value if isinstance(item, ast.Starred) else item, one)
        elif origins_of(value):
            kept = "is kept on the module" if isinstance(target, ast.Attribute) else "is written into another tensor"
            raise Failure(origins_of(value), f"what is made of it {kept}", frame.file, target)
        elif isinstance(target, ast.Subscript):
            inside = self._expression(frame, target.value)
            if origins_of(inside):
                raise Failure(origins_of(inside), "what it gives is written to", frame.file, target)

    def _unpacked(self, frame: _Frame, target: ast.Tuple | ast.List, value: Value, count: int) -> Sequence[Value]:
        starred = any(isinstance(item, ast.Starred) for item in target.elts)
        if isinstance(value, Tup) and len(value.items) == count and not starred:
            return value.items
        if isinstance(value, Shape) and not starred:
            return self._sizes(frame, value.tensor, count, target)
        if isinstance(value, Tensor) and not starred and value.origins:
            return [self._piece(frame, value, 0, target)] * count
        if origins_of(value):
            raise Failure(
                origins_of(value), "what it gives is taken apart in a way that is not followed", frame.file, target
            )
        hidden = is_hidden(value)
        return [Tensor(hidden=hidden)] * count

    def _piece(self, frame: _Frame, tensor: Tensor, axis: int, node: ast.AST) -> Tensor:
        """One of what a whole dimension holds."""
        dims = list(tensor.dims or ())
        if isinstance(dims[0], Lead) or tensor.place == axis:
            raise Failure(tensor.origins, "what the ranks share is taken apart", frame.file, node)
        del dims[axis]
        self.reading.grouped |= tensor.origins
        return Tensor(tuple(dims), tensor.origins, True)

    def _sizes(self, frame: _Frame, tensor: Tensor, count: int, node: ast.AST) -> list[Value]:
        dims = tensor.dims
        if dims is None:
            return [Num(f"?{id(node)}.{number}") for number in range(count)]
        first = dims[0] if dims else None
        if isinstance(first, Lead):
            wrong = Failure(
                tensor.origins or frozenset(self.linear), "its dimensions are not followed", frame.file, node
            )
            if first.of == "?" and not tensor.origins:
                return [Num(f"?{id(node)}.{number}") for number in range(count)]
            self._learn(first.of, count - (len(dims) - 1) + first.dropped, wrong)
        if len(dims) != count:
            if tensor.origins:
                raise Failure(tensor.origins, "its dimensions are not followed", frame.file, node)
            return [Num(f"?{id(node)}.{number}") for number in range(count)]
        return [_size(dim, tensor) for dim in dims]

    # -- expressions ----------------------------------------------------------------------------------------------

    def _expression(self, frame: _Frame, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=value):
                return Num(str(value))
            case ast.Name(id=name):
                return self._name(frame, node, name)
            case ast.Attribute(value=value, attr=name):
                return self._attribute(frame, node, self._expression(frame, value), name)
            case ast.Call():
                return self._call(frame, node)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(frame, node, left, op, right)
            case ast.UnaryOp(operand=operand, op=operator):
                taken = self._expression(frame, operand)
                if isinstance(operator, ast.USub) and isinstance(taken, Num):
                    return Num(f"-{taken.text}", taken.origins)
                if isinstance(operator, ast.Not) and origins_of(taken):
                    raise Failure(origins_of(taken), f"{ast.unparse(node)} asks for its values", frame.file, node)
                return taken
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                return Tup(tuple(item for element in elts for item in self._items(frame, element)))
            case ast.Starred(value=value):
                return self._expression(frame, value)
            case ast.Subscript(value=value, slice=index):
                return self._subscript(frame, node, self._expression(frame, value), index)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self._expression(frame, test)
                return _either(self._expression(frame, body), self._expression(frame, orelse))
            case ast.Compare():
                return self._compared(frame, node)
            case ast.NamedExpr(target=target, value=value):
                given = self._expression(frame, value)
                self._assign(frame, target, given)
                return given
            case ast.Lambda():
                return Inline(node)
            case ast.ListComp(elt=elt, generators=[loop]) | ast.GeneratorExp(elt=elt, generators=[loop]):
                over = self._expression(frame, loop.iter)
                if isinstance(over, Tup) and not loop.ifs:
                    return Tup(tuple(self._each(frame, loop.target, item, elt) for item in over.items))
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Yield, ast.Await)):
            origins = self._named(frame, node)
            if origins:
                raise Failure(origins, f"{type(node).__name__} is not followed", frame.file, node)
            return Tensor(hidden=True)
        values = [self._expression(frame, c) for c in ast.iter_child_nodes(node) if isinstance(c, ast.expr)]
        if isinstance(node, ast.JoinedStr):
            return WHOLE
        return self._other(frame, node, values, f"{type(node).__name__} is not followed")

    def _each(self, frame: _Frame, target: ast.expr, value: Value, code: ast.expr) -> Value:
        before = dict(frame.names)
        self._assign(frame, target, value)
        result = self._expression(frame, code)
        frame.names = before
        return result

    def _items(self, frame: _Frame, node: ast.expr) -> Sequence[Value]:
        """What an element of a tuple, or an argument, is."""
        value = self._expression(frame, node)
        if not isinstance(node, ast.Starred):
            return (replace(value, node=node, file=frame.file) if isinstance(value, Num) else value,)
        if isinstance(value, Shape) and value.tensor.dims is not None:
            return [text_of(dim) for dim in value.tensor.dims]
        return value.items if isinstance(value, Tup) else (Mixed(origins_of(value)),)

    def _name(self, frame: _Frame, node: ast.expr, name: str) -> Value:
        if name in frame.names:
            value = frame.names[name]
            if isinstance(value, Mixed) and value.origins:
                what = "is not followed" if value.origins == _UNSEEN else "is another thing in each branch"
                raise Failure(value.origins, f"{name} {what}", frame.file, node)
            return value
        found = self.project.resolve(frame.file, node)
        if isinstance(found, FunctionInfo):
            return Routine(found)
        if isinstance(found, External):
            return Torch(found.name)
        return Torch(name) if found is None else WHOLE

    def _attribute(self, frame: _Frame, node: ast.expr, value: Value, name: str) -> Value:
        match value:
            case Object():
                method = self.classes.method(value.cls, name)
                if method is not None:
                    return Routine(method[0].file.function_info(method[1]), value)
                found = self.attributes.value(value, name)
                self._note_linear(found)
                if isinstance(found, Tensor) and found.hidden and self._is_norm(value):
                    return replace(found, norm=value.name)
                return found
            case Linear(name=layer):
                return self._layer_attribute(frame, node, layer, name)
            case Num(text=text, attribute=attribute) if not value.origins:
                return Num(f"{text}.{name}", attribute=f"{attribute}.{name}" if attribute else "")
            case Tensor():
                if name == "shape":
                    return Shape(value)
                if name in ("T", "mT") and value.origins:
                    return self._operation(frame, node, "mT", [value], {}) if name == "mT" else Mixed(value.origins)
                if name in ("dtype", "device", "training", "is_cuda", "ndim"):
                    return Num(f"?{name}")
                if name in _METHODS:
                    return Torch(name, value)
                return self._other(frame, node, [value], f"{name} is not followed")
            case Shape():
                return Torch(name, value)
            case Torch(name=base, of=None):
                return Torch(f"{base}.{name}")
        return self._other(frame, node, [value], f"{name} is not followed")

    def _layer_attribute(self, frame: _Frame, node: ast.expr, layer: str, name: str) -> Value:
        if name in ("in_features", "out_features"):
            return Num(f"{layer}.{name}")
        if layer not in self.taken:
            raise Failure(frozenset({layer}), f"its forward takes {ast.unparse(node)} itself", frame.file, node)
        return Tensor(hidden=True)

    def _note_linear(self, value: Value) -> None:
        if isinstance(value, Linear):
            self.linear[value.name] = value
        elif isinstance(value, Chain):
            for member in value.members:
                self._note_linear(member)

    def _is_norm(self, value: Object) -> bool:
        """Whether a module holds parameters and no modules."""
        assigned = self.attributes.assigned(value.cls)
        return bool(value.name) and not any(
            isinstance(self.attributes.value(value, name), (Linear, Object, Chain, Simple)) for name in assigned
        )

    def _binary(self, frame: _Frame, node: ast.AST, left: ast.expr, op: ast.operator, right: ast.expr) -> Value:
        one, other = self._expression(frame, left), self._expression(frame, right)
        if isinstance(op, ast.MatMult):
            return self._operation(frame, node, "matmul", [one, other], {})
        if isinstance(one, Num) and isinstance(other, Num):
            origins = one.origins | other.origins
            return Num(f"({one.text}{_SYMBOLS.get(type(op), '?')}{other.text})", origins)
        if isinstance(op, ast.Add) and isinstance(one, Tup) and isinstance(other, Tup):
            return Tup((*one.items, *other.items))
        return self._operation(frame, node, "mul", [one, other], {})

    def _compared(self, frame: _Frame, node: ast.Compare) -> Value:
        values = [self._expression(frame, item) for item in (node.left, *node.comparators)]
        if all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            return WHOLE
        origins = origins_of(Tup(tuple(values)))
        if origins:
            raise Failure(origins, f"{ast.unparse(node)} compares what differs on a rank", frame.file, node)
        return Tensor(hidden=any(map(is_hidden, values)))

    def _subscript(self, frame: _Frame, node: ast.Subscript, value: Value, index: ast.expr) -> Value:
        if isinstance(value, Shape):
            return self._of_shape(frame, node, value.tensor, index)
        if isinstance(value, Tup):
            try:
                chosen = ast.literal_eval(index) if not isinstance(index, ast.Slice) else _slice(index)
                found = value.items[chosen]
                return Tup(found) if isinstance(found, tuple) else found
            except (ValueError, IndexError, TypeError):
                return self._other(frame, node, [value], "its parts are not followed")
        if isinstance(value, Tensor) and value.origins:
            return self._indexed(frame, node, value, index)
        inside = [item for item in ast.walk(index) if isinstance(item, ast.Name)]
        values = [self._expression(frame, item) for item in inside]
        return self._other(frame, node, [value, *values], "what is taken of it is not followed")

    def _of_shape(self, frame: _Frame, node: ast.Subscript, tensor: Tensor, index: ast.expr) -> Value:
        if isinstance(index, ast.Slice):
            return self._part_of_shape(frame, node, tensor, index) if tensor.dims is not None else WHOLE
        return self._one_size(frame, node, tensor, self._expression(frame, index))

    def _one_size(self, frame: _Frame, node: ast.AST, tensor: Tensor, number: Value) -> Value:
        dims = tensor.dims or ()
        first = dims[0] if dims else None
        if isinstance(first, Lead) and isinstance(number, Num) and number.text.isdecimal():
            return Num(f"{first.of}.{number.text}") if first.of != "?" else self._unknown_size(frame, node, tensor)
        try:
            return _size(dims[place(tensor, number)], tensor)
        except Odd:
            if isinstance(first, Lead) and first.of != "?" and isinstance(number, Num) and len(dims) == 1:
                return Num(f"{first.of}.{number.text}-{first.dropped}")
            return self._unknown_size(frame, node, tensor)

    def _unknown_size(self, frame: _Frame, node: ast.AST, tensor: Tensor) -> Value:
        if tensor.origins:
            raise Failure(tensor.origins, "its dimensions are not followed", frame.file, node)
        return Num(f"?{id(node)}")

    def _part_of_shape(self, frame: _Frame, node: ast.Subscript, tensor: Tensor, index: ast.Slice) -> Value:
        dims = tensor.dims or ()
        first = dims[0] if dims else None
        chosen = _slice(index)
        if isinstance(first, Lead):
            stop = chosen.stop
            if chosen.start is None and isinstance(stop, int) and stop < 0 and first.of != "?":
                beyond = -stop - (len(dims) - 1)
                if beyond >= 0:
                    return Tup(tuple(text_of(dim) for dim in self._lead(first.of, first.dropped + beyond)))
                return Tup(tuple(text_of(dim) for dim in dims[:stop]))
            if tensor.origins:
                raise self._odd(Unknown(tensor), tensor.origins, frame, node)
            return self._unknown_size(frame, node, tensor)
        return Tup(tuple(_size(dim, tensor) for dim in dims[chosen]))

    def _indexed(self, frame: _Frame, node: ast.AST, tensor: Tensor, index: ast.expr) -> Tensor:
        items = index.elts if isinstance(index, ast.Tuple) else [index]
        dims = list(tensor.dims or ())
        wrong = Failure(tensor.origins, "what is taken of it is not followed", frame.file, node)
        taken = sum(not (isinstance(i, ast.Constant) and i.value in (None, Ellipsis)) for i in items)
        made: list[Dim | Lead] = []
        number = 0
        for item in items:
            if isinstance(item, ast.Constant) and item.value is Ellipsis:
                skipped = len(dims) - taken
                made += dims[number : number + skipped]
                number += skipped
                continue
            if isinstance(item, ast.Constant) and item.value is None:
                made.append(Dim("1"))
                continue
            if number >= len(dims) or isinstance(dims[number], Lead) or number < 0:
                raise wrong
            dim = dims[number]
            assert isinstance(dim, Dim)
            number += 1
            if isinstance(item, ast.Slice):
                full = item.lower is None and item.upper is None and item.step is None
                if dim.split and not full:
                    raise Failure(tensor.origins, "a part of what the ranks share is taken", frame.file, node)
                self.reading.grouped |= NONE if full else tensor.origins
                made.append(dim if full else Dim(f"{dim.size}[{ast.unparse(item)}]"))
                continue
            value = self._expression(frame, item)
            if dim.split or not isinstance(value, Num) or value.origins:
                raise Failure(tensor.origins, "one of what the ranks share is taken", frame.file, node)
        whole = (*made, *dims[number:])
        return Tensor(whole, tensor.origins, True)

    # -- calls ----------------------------------------------------------------------------------------------------

    def _call(self, frame: _Frame, node: ast.Call) -> Value:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            return WHOLE
        called = self._expression(frame, node.func)
        args = [item for argument in node.args for item in self._items(frame, argument)]
        options = {}
        for keyword in node.keywords:
            value = self._expression(frame, keyword.value)
            if keyword.arg is None:
                if origins_of(value):
                    raise Failure(origins_of(value), "how it is passed on is not followed", frame.file, node)
                continue
            if isinstance(value, Num):
                value = replace(value, node=keyword.value, file=frame.file)
            options[keyword.arg] = value
        match called:
            case Routine(info=info) if info.node.name != "__init__":
                return self._run(called, args, options, node)
            case Linear() | Simple() | Chain():
                return self._module(frame, node, called, args)
            case Object():
                return self._object(frame, node, called, args, options)
            case Inline(node=code):
                return self._inline(frame, code, args)
            case Torch(name="map", of=None) if len(args) == 2 and isinstance(args[1], Tup):
                function = args[0]
                if isinstance(function, Inline):
                    return Tup(tuple(self._inline(frame, function.node, [item]) for item in args[1].items))
            case Torch(name="getattr", of=None):
                return WHOLE
            case Torch(name=name, of=None) if name in ("int", "float", "tuple", "list", "reversed") and args:
                if isinstance(args[0], (Num, Tup)) and name != "reversed":
                    return args[0]
                if isinstance(args[0], Shape) and args[0].tensor.dims is not None:
                    return Tup(tuple(_size(dim, args[0].tensor) for dim in args[0].tensor.dims))
            case Torch(name=name, of=None):
                short = next(
                    (name[len(p) :] for p in _FUNCTIONS if name.startswith(p) and "." not in name[len(p) :]), ""
                )
                short = "scaled_dot_product_attention" if name.endswith(".scaled_dot_product_attention") else short
                short = name.rpartition(".")[2] if name.startswith("torch.nn.functional.") else short
                if short in _METHODS:
                    return self._operation(frame, node, short, args, options)
            case Torch(name=name, of=Tensor() as tensor):
                return self._operation(frame, node, name, [tensor, *args], options)
        given = self._other(
            frame, node, [called, *args, *options.values()], f"{ast.unparse(node.func)} is not followed"
        )
        # An attribute that somebody else has made may be a module with parameters.
        own = isinstance(called, Num) and bool(called.attribute) and isinstance(given, Tensor)
        return replace(given, hidden=True) if own and isinstance(given, Tensor) else given

    def _inline(self, frame: _Frame, code: ast.Lambda, args: Sequence[Value]) -> Value:
        names = [argument.arg for argument in code.args.args]
        before = dict(frame.names)
        frame.names |= dict(zip(names, args, strict=False))
        result = self._expression(frame, code.body)
        frame.names = before
        return result

    def _object(
        self, frame: _Frame, node: ast.AST, called: Object, args: Sequence[Value], options: Mapping[str, Value]
    ) -> Value:
        method = self.classes.method(called.cls, "forward")
        values = (*args, *options.values())
        if method is None:
            return self._other(frame, node, values, f"{called.name} is not followed")
        if not origins_of(Tup(values)) and self._is_norm(called):
            self.reading.whole_norms.add(called.name)
        result = self._run(Routine(method[0].file.function_info(method[1]), called), args, options, node)
        if (
            self._is_norm(called)
            and origins_of(result)
            and any(
                isinstance(given, Tensor) and given.hidden
                for given in (self.attributes.value(called, name) for name in self.attributes.assigned(called.cls))
            )
        ):
            self.reading.norms[called.name] = self.reading.norms.get(called.name, NONE) | origins_of(result)
        return result

    def _module(self, frame: _Frame, node: ast.AST, called: Value, args: Sequence[Value]) -> Value:
        if not args:
            return WHOLE
        value = args[0]
        if isinstance(called, Chain):
            for member in called.members:
                value = (
                    self._object(frame, node, member, [value], {})
                    if isinstance(member, Object)
                    else self._module(frame, node, member, [value])
                )
            return value
        if isinstance(called, Simple):
            return self._simple(frame, node, called, value)
        if isinstance(called, Linear):
            return self._linear(frame, node, called, value)
        return self._other(frame, node, [value], "a module in its Sequential is not followed")

    def _simple(self, frame: _Frame, node: ast.AST, called: Simple, value: Value) -> Value:
        origins = origins_of(value)
        if called.kind == "each" or not isinstance(value, Tensor):
            return value
        if not origins:
            self.reading.whole_norms.add(called.name)
            return replace(value, hidden=True)
        if value.dims is None or value.place == len(value.dims) - 1:
            raise Failure(origins, f"{called.name} is a norm over features that ranks would share", frame.file, node)
        self.reading.norms[called.name] = self.reading.norms.get(called.name, NONE) | origins
        return value

    def _linear(self, frame: _Frame, node: ast.AST, called: Linear, value: Value) -> Value:
        layer, reading = called.name, self.reading
        self._note_linear(called)
        origins = origins_of(value)
        own = frozenset({layer})
        if isinstance(value, Tensor) and not origins and value.dims and isinstance(value.dims[0], (Lead, Dim)):
            first = value.dims[0]
            source = first.of if isinstance(first, Lead) else first.size.rpartition(".")[0]
            if source and source not in self.hidden and not value.hidden:
                self.hidden.add(source)
                raise Again
        if layer in self.taken:
            if origins:
                raise Failure(origins, f"{layer}, which takes what they give, stays whole", frame.file, node)
            return Tensor(hidden=True)
        if not isinstance(value, Tensor):
            raise Failure(own | origins, "what it is given is not followed", frame.file, node)
        reading.calls[layer] = reading.calls.get(layer, 0) + 1
        reading.sites.setdefault(layer, set()).add(node)
        if reading.calls[layer] > 1 or self.loops:
            raise Failure(own | origins, f"{layer} is used more than once", frame.file, node)
        if not origins:
            if layer in reading.rows:
                raise Failure(own | reading.rows[layer], f"{layer} gets whole features, too", frame.file, node)
            reading.columns.add(layer)
            lead = self._behind(value)
            return Tensor((*lead, Dim(f"{layer}.out_features", True, True)), own, True)
        if layer in reading.columns:
            raise Failure(own | origins, f"{layer} gets whole features, too", frame.file, node)
        if value.dims is None or value.place != len(value.dims) - 1:
            raise Failure(own | origins, f"{layer} is one layer for all heads", frame.file, node)
        last = value.dims[-1]
        if isinstance(last, Dim) and last.size.startswith("shared "):
            raise Failure(own | origins, f"{layer} mixes heads", frame.file, node)
        if value.fresh:
            self._cut(frame, node, origins, 1)
        reading.rows[layer] = reading.rows.get(layer, NONE) | origins
        return Tensor((*value.dims[:-1], Dim(f"{layer}.out_features")), NONE, True)

    def _behind(self, value: Tensor) -> tuple[Dim | Lead, ...]:
        """All dimensions but the last."""
        dims = value.dims
        if dims is None or not dims:
            return (Lead("?", 1),)
        if len(dims) == 1 and isinstance(dims[0], Lead):
            return self._lead(dims[0].of, dims[0].dropped + 1)
        return dims[:-1]

    def _cut(self, frame: _Frame, node: ast.AST, origins: Origins, parts: int) -> None:
        for layer in origins:
            if self.reading.parts.setdefault(layer, parts) != parts:
                raise Failure(origins, "its features are cut into parts, and used in one, too", frame.file, node)

    def _operation(
        self, frame: _Frame, node: ast.AST, name: str, values: Sequence[Value], options: Mapping[str, Value]
    ) -> Value:
        origins = origins_of(Tup((*values, *options.values())))
        first = values[0] if values else WHOLE
        if name in ("size", "dim", "numel"):
            return self._asked(frame, node, name, first, values[1:], options)
        if not origins:
            return self._whole(name, values, options)
        if name in _VIEWS or name in _PIECES:
            if not isinstance(first, Tensor) or not first.origins:
                raise Failure(origins, f"{name} goes by a number that differs on a rank", frame.file, node)
            if name in _PIECES:
                return self._pieces(frame, node, name, first, values[1:], options)
            return self._view(frame, node, name, first, values[1:], options)
        shared = [value for value in _flat(values) if isinstance(value, Tensor) and value.origins]
        if len(shared) > 1 or name == "repeat_interleave":
            for tensor in shared:
                if tensor.fresh:
                    self._cut(frame, node, tensor.origins, 1)
            settled = {tensor: _settled(tensor) for tensor in shared}
            values = [_replaced(value, settled) for value in values]
            options = {key: _replaced(value, settled) for key, value in options.items()}
        for value in _flat(values):
            if isinstance(value, Tensor) and value.norm and not value.origins:
                self.reading.norms[value.norm] = self.reading.norms.get(value.norm, NONE) | origins
        try:
            return operated(name, values, options)
        except Odd as odd:
            raise self._odd(odd, origins, frame, node) from None

    def _whole(self, name: str, values: Sequence[Value], options: Mapping[str, Value]) -> Value:
        hidden = any(map(is_hidden, (*values, *options.values())))
        first = values[0] if values else WHOLE
        norm = next((v.norm for v in _flat(values) if isinstance(v, Tensor) and v.norm), "")
        tensors = [value for value in values if isinstance(value, Tensor)]
        if name in EACH or name in ("mul", "add", "sub", "div", "masked_fill"):
            known = [tensor.dims for tensor in tensors if tensor.dims is not None]
            dims = max(known, key=lambda dims: (any(isinstance(dim, Lead) for dim in dims), len(dims)), default=None)
            return Tensor(dims, NONE, hidden, norm)
        hidden |= self._for_heads((*values, *options.values()))
        if name in ("view", "reshape") and isinstance(first, Tensor):
            items = _items(values[1:])
            if items is not None and all(isinstance(item, Lead) or item.text != "-1" for item in items):
                dims = tuple(item if isinstance(item, Lead) else Dim(item.text) for item in items)
                return Tensor(dims, NONE, hidden, norm)
        return Tensor(None, NONE, hidden, norm)

    def _asked(
        self, frame: _Frame, node: ast.AST, name: str, value: Value, args: Sequence[Value], options: Mapping[str, Value]
    ) -> Value:
        axis = options.get("dim", args[0] if args else None)
        if not isinstance(value, Tensor):
            return self._other(frame, node, [value, *args], f"{name} is not followed")
        if name == "dim":
            return Num(f"?{name}")
        if name == "numel":
            return self._unknown_size(frame, node, value)
        if axis is None:
            return Shape(value)
        return self._one_size(frame, node, value, axis)

    def _pieces(
        self,
        frame: _Frame,
        node: ast.AST,
        name: str,
        tensor: Tensor,
        args: Sequence[Value],
        options: Mapping[str, Value],
    ) -> Value:
        counted = name == "unbind"
        axis = options.get("dim", args[0 if counted else 1] if len(args) > (0 if counted else 1) else Num("0"))
        try:
            where = place(tensor, axis)
        except Odd as odd:
            raise self._odd(odd, tensor.origins, frame, node) from None
        dims = tensor.dims or ()
        dim = dims[where]
        assert isinstance(dim, Dim)
        count = self._count(frame, node)
        if counted:
            size = int(dim.size) if dim.size.isdecimal() else count
            if dim.split or not size:
                raise Failure(tensor.origins, "what the ranks share is taken apart", frame.file, node)
            return Tup((self._piece(frame, tensor, where, node),) * size)
        number = options.get("chunks", options.get("split_size", args[0] if args else None))
        if name == "chunk":
            count = int(number.text) if isinstance(number, Num) and number.text.isdecimal() else 0
        if not count:
            raise Failure(tensor.origins, "into how many parts it is cut is not seen", frame.file, node)
        if not dim.split:
            self.reading.grouped |= tensor.origins
            made = tuple(Dim(f"{dim.size}/{name}{number_}") for number_ in range(count))
            return Tup(tuple(Tensor((*dims[:where], own, *dims[where + 1 :]), tensor.origins, True) for own in made))
        if not dim.fresh:
            raise Failure(tensor.origins, "a part of what the ranks share is taken", frame.file, node)
        if name == "split":
            self._split_as_chunk(frame, node, tensor, number, count)
        self._cut(frame, node, tensor.origins, count)
        own = Dim(f"{dim.size}/{count}", True)
        return Tup((Tensor((*dims[:where], own, *dims[where + 1 :]), tensor.origins, True),) * count)

    def _count(self, frame: _Frame, node: ast.AST) -> int:
        """Into how many names a call is unpacked."""
        parent = frame.file.names.parents.get(node)
        if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and parent.value is node:
            target = parent.targets[0]
            if isinstance(target, ast.Tuple) and not any(isinstance(item, ast.Starred) for item in target.elts):
                return len(target.elts)
        return 0

    def _split_as_chunk(self, frame: _Frame, node: ast.AST, tensor: Tensor, size: Value | None, count: int) -> None:
        """``split(width)`` becomes ``chunk(count)``, if the layer has ``count * width`` features."""
        wrong = Failure(
            tensor.origins, "its features are split into parts that are not seen to be equal", frame.file, node
        )
        layers = [self.linear[name] for name in tensor.origins]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or len(layers) != 1:
            raise wrong
        if not isinstance(size, Num) or size.node is None or frame.me is None or not node.args:
            raise wrong
        prefix = f"{frame.me.name}." if frame.me.name else ""
        name = size.text.removeprefix(prefix)
        given = self.attributes.assigned(frame.me.cls).get(name, [])
        widths = [value for value, _, function in given if function.name == "__init__"] if len(given) == 1 else []
        out = layers[0].out
        if layers[0].name.rpartition(".")[0] != frame.me.name or not _is_times(out, count, name, frame.my_name, widths):
            raise wrong
        if node.args[0] is not size.node:  # torch.split(x, width)
            raise wrong
        for code, text in ((node.func, "{value}.chunk"), (node.args[0], str(count))):
            self.reading.edits[code] = Edit(frame.file, code, text, tensor.origins)

    def _view(
        self,
        frame: _Frame,
        node: ast.AST,
        name: str,
        tensor: Tensor,
        args: Sequence[Value],
        options: Mapping[str, Value],
    ) -> Tensor:
        origins = tensor.origins
        dims = tensor.dims or ()
        wrong = Failure(origins, "its shape is not followed", frame.file, node)
        try:
            if name == "flatten":
                return self._flat_view(tensor, args, options)
            if name == "unflatten":
                if len(args) != 2 or place(tensor, args[0]) != len(dims) - 1:
                    raise wrong
                items: list[Item] | None = [*map(text_of, dims[:-1]), *(_items([args[1]]) or [])]
            else:
                items = _items(args)
            if items is None or name == "expand_as" or (items and len(items) < 2):
                raise wrong
            self._learn_from(tensor, items, wrong)
            if name == "expand":
                return self._expanded(frame, node, tensor, items)
            found = viewed(tensor, items)
        except Odd as odd:
            raise self._odd(odd, origins, frame, node) from None
        if found.parts is not None:
            self._cut(frame, node, origins, found.parts)
        elif found.tensor.dims is not None and len(found.tensor.dims) > len(dims) + 1:
            self.reading.grouped |= origins
        for number in found.inferred:
            self._infer(frame, node, number, origins)
        self._count_heads(frame, found.heads, origins)
        if found.width is not None:
            self._write_width(frame, node, found.heads, found.width, origins)
        return found.tensor

    def _count_heads(self, frame: _Frame, heads: Num | None, origins: Origins) -> None:
        """By what number a view cuts features into heads: who uses it, too, may make something for each."""
        if heads is None:
            return
        if heads.text.replace(".", "").isidentifier() and heads.text not in self.counts:
            self.counts.add(heads.text)
            raise Again
        name = heads.attribute or (heads.text if heads.text.isdecimal() else "")
        for layer in origins:
            if name and frame.me is not None and layer.rpartition(".")[0] == frame.me.name:
                self.reading.heads.setdefault(layer, set()).add(name)

    def _learn_from(self, tensor: Tensor, items: Sequence[Item], wrong: Failure) -> None:
        """``view(B, T, ...)`` of what is made of an argument tells how many dimensions that has."""
        first = tensor.dims[0] if tensor.dims else None
        if isinstance(first, Lead) and first.of != "?" and not any(isinstance(item, Lead) for item in items):
            numbers = [item.text for item in items if isinstance(item, Num)]
            count = next((i for i, text in enumerate(numbers) if text != f"{first.of}.{i}"), len(numbers))
            if count:
                self._learn(first.of, count + first.dropped, wrong)

    def _flat_view(self, tensor: Tensor, args: Sequence[Value], options: Mapping[str, Value]) -> Tensor:
        start = place(tensor, options.get("start_dim", args[0] if args else Num("0")))
        end = place(tensor, options.get("end_dim", args[1] if len(args) > 1 else Num("-1")))
        dims = tensor.dims or ()
        if tensor.place < start or tensor.place > end:
            size = "*".join(dim.size for dim in dims[start : end + 1] if isinstance(dim, Dim))
            return Tensor((*dims[:start], Dim(f"({size})"), *dims[end + 1 :]), tensor.origins, True)
        if tensor.place != start:
            raise Odd("its view puts something in front of what the ranks share")
        items: list[Item] = [*map(text_of, dims[:start]), Num("-1"), *map(text_of, dims[end + 1 :])]
        return viewed(tensor, items).tensor

    def _expanded(self, frame: _Frame, node: ast.AST, tensor: Tensor, items: Sequence[Item]) -> Tensor:
        dims = tensor.dims or ()
        if len(dims) != len(items):
            raise Odd("its shape is not followed")
        made: list[Dim | Lead] = []
        for dim, item in zip(dims, items, strict=True):
            if isinstance(dim, Dim) and isinstance(item, Num):
                if dim.split and not item.origins and item.text != "-1":
                    self._infer(frame, node, item, tensor.origins)
                made.append(Dim(item.text) if dim.size == "1" and item.text != "-1" else dim)
            else:
                made.append(dim)
        return Tensor(tuple(made), tensor.origins, True)

    def _infer(self, frame: _Frame, node: ast.AST, number: Num, origins: Origins) -> None:
        if number.node is None or number.file is None:
            raise Failure(origins, f"where {number.text} in its view comes from is not seen", frame.file, node)
        before = self.reading.edits.get(number.node)
        origins = origins | (before.origins if before else NONE)
        self.reading.edits[number.node] = Edit(number.file, number.node, "-1", origins)

    def _write_width(self, frame: _Frame, node: ast.AST, heads: Num | None, width: Num, origins: Origins) -> None:
        """``view(B, T, self.n_head, -1)`` becomes ``view(B, T, -1, self.q.out_features // self.n_head)``."""
        wrong = Failure(origins, "the width of its heads is left to the view", frame.file, node)
        layer = next(iter(origins))
        parent, _, own = layer.rpartition(".")
        if len(origins) != 1 or frame.me is None or parent != frame.me.name or "." in own or own.isdecimal():
            raise wrong
        if heads is None or heads.node is None or width.node is None or width.file is None:
            raise wrong
        if not isinstance(heads.node, (ast.Name, ast.Attribute)):
            raise wrong
        parts = self.reading.parts.get(layer, 1)
        of = f"{frame.my_name}.{own}.out_features" + (f" // {parts}" if parts > 1 else "")
        text = f"{of} // {ast.unparse(heads.node)}"
        before = self.reading.edits.get(width.node)
        if before is not None and before.text != text:
            raise wrong
        self._cut(frame, node, origins, parts)
        self.reading.edits[width.node] = Edit(width.file, width.node, text, origins)

    def _other(self, frame: _Frame, node: ast.AST, values: Sequence[Value], reason: str) -> Value:
        """Something that is not known: it must not see anything that ranks share."""
        origins = origins_of(Tup(tuple(values)))
        for value in _flat(values):
            if isinstance(value, Inline):
                origins |= self._named(frame, value.node)
        if origins:
            raise Failure(origins, reason, frame.file, node)
        self.reading.kept |= {v.node for v in _flat(values) if isinstance(v, Num) and v.node is not None}
        for value in _flat(values):
            if isinstance(value, Linear) and value.name not in self.taken:
                raise Failure(frozenset({value.name}), f"{value.name} is passed on", frame.file, node)
        return Tensor(hidden=any(map(is_hidden, values)) or self._for_heads(values))

    def _for_heads(self, values: Sequence[Value]) -> bool:
        """Whether what is made of such values may have an entry for each head."""
        numbers = (_DIVIDED.sub("", value.text) for value in _flat(values) if isinstance(value, Num))
        return any(word in self.counts for text in numbers for word in _WORD.findall(text))


def _size(dim: Dim | Lead, tensor: Tensor) -> Value:
    if isinstance(dim, Lead):
        return dim
    return Num(dim.size, tensor.origins if dim.split else NONE)


def _settled(tensor: Tensor) -> Tensor:
    dims = tuple(replace(dim, fresh=False) if isinstance(dim, Dim) else dim for dim in tensor.dims or ())
    return replace(tensor, dims=dims)


def _replaced(value: Value, by: Mapping[Tensor, Tensor]) -> Value:
    if isinstance(value, Tup):
        return Tup(tuple(_replaced(item, by) for item in value.items))
    return by.get(value, value) if isinstance(value, Tensor) else value


def _flat(values: Sequence[Value]) -> list[Value]:
    return [item for value in values for item in (_flat(value.items) if isinstance(value, Tup) else [value])]


def _items(values: Sequence[Value]) -> list[Item] | None:
    """The numbers of a shape, given one by one or as a tuple."""
    given = values[0].items if len(values) == 1 and isinstance(values[0], Tup) else tuple(values)
    if len(given) == 1 and isinstance(given[0], Shape) and given[0].tensor.dims is not None:
        given = tuple(_size(dim, given[0].tensor) for dim in given[0].tensor.dims)
    found = [item for item in given if isinstance(item, (Num, Lead))]
    return found if found and len(found) == len(given) else None


def _either(one: Value, other: Value) -> Value:
    """What is one of two things."""
    if one == other:
        return one
    origins = origins_of(one) | origins_of(other)
    if origins:
        none = Num("None")
        if _plain(one) == none or _plain(other) == none:
            return other if _plain(one) == none else one
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.origins and other.origins:
            dims = _either_dims(one.dims or (), other.dims or ())
            return Tensor(dims, origins, True) if dims else Mixed(origins)
        if isinstance(one, Tup) and isinstance(other, Tup) and len(one.items) == len(other.items):
            return Tup(tuple(_either(a, b) for a, b in zip(one.items, other.items, strict=True)))
        return Mixed(origins)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return Tensor(one.dims or other.dims, NONE, one.hidden or other.hidden, one.norm or other.norm)
    if isinstance(one, Num) and isinstance(other, Num) and one.text == other.text:
        return one
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        tensor = one if isinstance(one, Tensor) else other
        return tensor if isinstance(one, Num) or isinstance(other, Num) else Tensor(hidden=True)
    return Tensor(hidden=is_hidden(one) or is_hidden(other))


def _either_dims(one: Sequence[Dim | Lead], other: Sequence[Dim | Lead]) -> tuple[Dim | Lead, ...]:
    """Those of one of two tensors; none if they share another dimension."""
    if len(one) != len(other):
        return ()
    made: list[Dim | Lead] = []
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Dim) and isinstance(b, Dim) and a.split == b.split:
            size = a.size if a.size == b.size else f"({a.size} or {b.size})"
            made.append(Dim(size, a.split, a.fresh or b.fresh))
        elif a == b:
            made.append(a)
        else:
            return ()
    return tuple(made)


def _plain(value: Value) -> Value:
    return Num(value.text) if isinstance(value, Num) else value


def _merged(one: Mapping[str, Value], other: Mapping[str, Value]) -> dict[str, Value]:
    return {
        name: _either(one[name], other[name])
        if name in one and name in other
        else one.get(name, other.get(name, WHOLE))
        for name in [*one, *(name for name in other if name not in one)]
    }


def _slice(node: ast.Slice) -> slice:
    bounds = [ast.literal_eval(item) if item is not None else None for item in (node.lower, node.upper, node.step)]
    return slice(*bounds)


def _is_times(out: ast.expr | None, count: int, name: str, me: str, widths: Sequence[ast.expr]) -> bool:
    """Whether ``out`` is ``count * width``, where ``width`` is ``self.name`` or what that was given."""
    if not isinstance(out, ast.BinOp) or not isinstance(out.op, ast.Mult):
        return False
    for number, width in ((out.left, out.right), (out.right, out.left)):
        if isinstance(number, ast.Constant) and number.value == count:
            own = isinstance(width, ast.Attribute) and ast.unparse(width) == f"{me}.{name}"
            return own or any(same(width, item) for item in widths)
    return False
