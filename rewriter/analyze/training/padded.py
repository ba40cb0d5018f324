"""Batches padded to their longest item, and models that look at the padding: a share of a batch is padded less."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import dotted, walk, walk_own
from rewriter.analyze.training.scripts import Scripts

_MASKS = re.compile(r"mask|lengths?$|lens$|pack_padded|causal|tril|triu|is_pad|no[nt]_?pad", re.I)
_POOLED = {"mean", "max", "amax", "logsumexp"}
_TIME = {1, -2}
_POOLS = re.compile(r"^(?:adaptive_(?:avg|max)_pool1d|AdaptiveAvgPool1d|AdaptiveMaxPool1d)$")
_ATTENDS = {"MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer", "scaled_dot_product_attention"}
_PRODUCTS = {"matmul", "bmm", "einsum"}
_KNOWN = re.compile(r"(?:torch|torchvision|timm|transformers)\.")
"""Packages whose functions make batches of which each row is a sample."""
_DEEP = 2
_RECURRENT = {"LSTM", "GRU", "RNN"}
_PACKS = re.compile(rb"\bpack_(?:padded_)?sequence\b")


class Padded:
    """Answers for all files of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts
        self.classes, self.project = scripts.classes, scripts.project

    def seen(self, file: File) -> Iterator[tuple[ast.Call, ClassInfo, ast.AST]]:
        """Where a file's loaders pad to the longest of a batch, the module that looks at padding, and where.

        Nothing where some module, of whatever file, knows of masks or lengths: what is padded may be left out there.
        A recurrent layer leaves out what is packed only.
        """
        made = [call for call in self._padding(file) if not self.scripts.in_kept_guard(file, call)]
        if not made:
            return
        modules = [
            info
            for other in self.scripts.training
            for info in self.classes.all(other)
            if self.classes.is_module(info) and "forward" in info.methods
        ]
        left_out = {
            False: any(_masks(info.node) for info in modules),
            True: any(_PACKS.search(other.source.data) for other in self.scripts.training),
        }
        if all(left_out.values()):
            return
        for info in modules:
            for place, recurs in _over_time(info):
                if not left_out[recurs]:
                    yield made[0], info, place
                    return

    def _padding(self, file: File) -> Iterator[ast.Call]:
        for function in self.collating()[0]:
            if function.file is file:
                for item in walk(function.node):
                    if isinstance(item, ast.Call) and pads(item):
                        yield item

    def collating(self) -> tuple[list[FunctionInfo], bool]:
        """The functions that make batches of items, for loaders of whichever file, and whether all such are seen."""
        functions: list[FunctionInfo] = []
        known = True
        for other in self.scripts.training:
            for keyword in (k for call in other.calls for k in call.keywords if k.arg == "collate_fn"):
                made = list(self._made_by(other, keyword.value))
                found = [one for function in made for one in _returned_functions(function)]
                functions += found
                known &= bool(found) or bool(_KNOWN.match(self.project.external(other, _called(keyword.value))))
        return functions, known

    def _made_by(self, file: File, value: ast.expr, deep: int = 0) -> Iterator[FunctionInfo]:
        value, instances = _called(value), self.scripts.collectives.instances
        if isinstance(value, ast.Lambda):
            value = value.body.func if isinstance(value.body, ast.Call) else value
        found = self.project.resolve(file, value)
        if isinstance(found, FunctionInfo):
            yield found
        elif isinstance(found, ClassInfo) and "__call__" in found.methods:
            yield found.file.function_info(found.methods["__call__"])
        elif isinstance(value, ast.Attribute):
            methods = instances.methods(file, value)
            yield from methods
            owners = (method.file.names.class_of(method.node) for method in methods)
            family = {info.node for owner in owners if owner for info in self._below(methods[0].file, owner)}
            named = instances.named(value.attr) if family else ()
            yield from (method for method in named if method.file.names.class_of(method.node) in family)
        elif isinstance(value, ast.Name):
            called = instances.called(file, value)
            yield from called
            for other, given in instances.given_to(file, value) if not called and deep < _DEEP else ():
                yield from self._made_by(other, given, deep + 1)

    def _below(self, file: File, owner: ast.ClassDef) -> tuple[ClassInfo, ...]:
        return self.classes.descendants(file.class_info(owner))


def _returned_functions(function: FunctionInfo) -> list[FunctionInfo]:
    """The functions that a function makes and returns, ``def made(vocab): def collate(items): ...``; else itself."""
    inner = {item.name: item for item in function.node.body if isinstance(item, ast.FunctionDef)}
    items = (item for statement in function.node.body for item in walk_own(statement))
    returned = [item.value for item in items if isinstance(item, ast.Return)]
    if returned and all(isinstance(value, ast.Constant) and value.value is None for value in returned):
        return []  # to be overridden
    named = [inner[value.id] for value in returned if isinstance(value, ast.Name) and value.id in inner]
    return [function.file.function_info(item) for item in named] or [function]


def _called(value: ast.expr) -> ast.expr:
    """What makes batches, of ``partial(collate, ...)`` and ``Collate(...)``."""
    if not isinstance(value, ast.Call):
        return value
    last = (dotted(value.func) or "").split(".")[-1]
    return value.args[0] if last == "partial" and value.args else value.func


def pads(call: ast.Call) -> bool:
    """``pad_sequence(items)``, ``max(len(item) for item in items)``."""
    name = (dotted(call.func) or "").split(".")[-1]
    if name == "pad_sequence":
        return True
    sizes = {"len", "size", "shape"}
    named = {getattr(n, "id", None) or getattr(n, "attr", None) for argument in call.args for n in walk(argument)}
    return isinstance(call.func, ast.Name) and name == "max" and bool(named & sizes)


def _masks(node: ast.ClassDef) -> bool:
    """Whether a module has something to do with masks, lengths or the value that pads."""
    for item in walk(node):
        match item:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                if _MASKS.search(name) or name in {"ne", "eq"}:
                    return True
            case ast.Compare(ops=[ast.Eq() | ast.NotEq()], comparators=[right]):
                zero = isinstance(right, ast.Constant) and right.value == 0
                if zero or "pad" in (dotted(right) or "").lower():
                    return True
    return False


def _over_time(info: ClassInfo) -> Iterator[tuple[ast.AST, bool]]:
    """What makes something of all positions of a sequence, and whether it is what a recurrent layer ends with."""
    made = [item for item in walk(info.node) if isinstance(item, ast.Call)]
    names = {(dotted(item.func) or "").split(".")[-1] for item in made}
    multiplies = bool(names & _PRODUCTS) or any(
        isinstance(item, ast.BinOp) and isinstance(item.op, ast.MatMult) for item in walk(info.node)
    )
    layers = {
        (dotted(target) or "").removeprefix("self.")
        for item in walk(info.node)
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Call)
        if (dotted(item.value.func) or "").split(".")[-1] in _RECURRENT
        for target in item.targets
    }
    for item in (item for method in _run(info) for item in walk(method)):
        match item:
            case ast.Call(func=ast.Attribute(attr=attr), args=args, keywords=keywords):
                given = [*args, *(keyword.value for keyword in keywords if keyword.arg in {"dim", "axis"})]
                pooled = attr in _POOLED and any(_number(value) in _TIME for value in given)
                pooled = pooled or (attr == "max_pool1d" and not all(map(_is_constant, args[1:])))
                if pooled or _POOLS.match(attr) or attr in _ATTENDS or (attr == "softmax" and multiplies):
                    yield item, False
            case ast.Subscript(value=value, slice=ast.Constant(value=1)) if _recurs(value, layers):
                yield item, True  # the state behind the last step
            case ast.Subscript(slice=ast.Tuple(elts=[_, place, *_]) | place) if layers and _number(place) == -1:
                yield item, True  # the last step, or the state behind it
            case ast.Return(value=value) if _recurs(value, layers):
                yield item, True
            case ast.Assign(targets=[ast.Tuple(elts=[_, state])], value=ast.Call()) if layers:
                held = {n.id for n in walk(state) if isinstance(n, ast.Name)} - {"_"}
                read = (n for method in _run(info) for n in walk(method) if isinstance(n, ast.Name))
                behind = (item.end_lineno or item.lineno, item.end_col_offset or 0)
                if any(
                    n.id in held and isinstance(n.ctx, ast.Load) and (n.lineno, n.col_offset) > behind for n in read
                ):
                    yield item, True
    for item in made:
        name = (dotted(item.func) or "").split(".")[-1]
        backwards = any(k.arg == "bidirectional" and getattr(k.value, "value", False) for k in item.keywords)
        if name in _RECURRENT and backwards:
            yield item, True
        elif _POOLS.match(name) or name in _ATTENDS:
            yield item, False


def _run(info: ClassInfo) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """A module's forward, and the methods of its own that this calls."""
    forward = info.methods["forward"]
    called = {dotted(item.func) for item in walk(forward) if isinstance(item, ast.Call)}
    return [forward, *(method for name, method in info.methods.items() if f"self.{name}" in called)]


def _recurs(node: ast.expr | None, layers: set[str]) -> bool:
    """``self.rnn(x)``."""
    return isinstance(node, ast.Call) and (dotted(node.func) or "").removeprefix("self.") in layers


def _number(node: ast.expr) -> object:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            return -value
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
    return None


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant)
