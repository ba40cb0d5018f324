"""Which layers with weights a class makes, wherever it keeps them: what a plan leaves out is told by their names."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

from rewriter.analyze.model.attributes import Attributes
from rewriter.analyze.read.file import ClassInfo, External, File

_CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}
_WEIGHTS = {
    "Linear", "Bilinear", "LazyLinear", "Embedding", "EmbeddingBag", "MultiheadAttention", "Transformer", "LSTM", "GRU",
    "RNN", "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "TransformerDecoder",
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
}  # fmt: skip
NOT_SEEN = "?"


def layers(
    attributes: Attributes,
    cls: ClassInfo,
    without: Collection[str] = (),
    path: str = "",
    above: tuple[ClassInfo, ...] = (),
) -> Iterator[tuple[str, str]]:
    """Name and kind of each: that of ``torch.nn``, the class's name, or ``NOT_SEEN``. ``without``: these not."""
    for name, given in attributes.assigned(cls).items():
        for value, file, _ in given:
            yield from _made(attributes, value, file, f"{path}{name}", without, (*above, cls))


def _made(
    attributes: Attributes, node: ast.AST, file: File, path: str, without: Collection[str], above: tuple[ClassInfo, ...]
) -> Iterator[tuple[str, str]]:
    if path in without:
        return
    match node:
        case ast.ListComp(elt=inner) | ast.GeneratorExp(elt=inner) | ast.DictComp(value=inner):
            yield from _made(attributes, inner, file, path, without, above)
        case ast.IfExp(body=body, orelse=orelse):
            for side in (body, orelse):
                yield from _made(attributes, side, file, path, without, above)
        case ast.Call(func=func):
            found = attributes.project.resolve(file, func)
            if isinstance(found, ClassInfo) and found not in above and attributes.classes.is_module(found):
                bases = {base.rpartition(".")[2] for base in attributes.classes.external_bases(found)}
                if bases & _WEIGHTS:
                    yield path, found.name
                yield from layers(attributes, found, without, f"{path}.", above)
                for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                    yield from _made(attributes, argument, file, f"{path}.*", without, above)
            elif isinstance(found, External):
                package, _, last = found.name.rpartition(".")
                if package == "torch.nn" and last in _CONTAINERS:
                    for name, member in _members(node):
                        inside = f"{path}.{name}"
                        if isinstance(member, ast.Name):
                            yield inside, NOT_SEEN
                        yield from _made(attributes, member, file, inside, without, above)
                elif package == "torch.nn":
                    if last in _WEIGHTS:
                        yield path, last
                elif last[:1].isupper() and not package.startswith("torch"):
                    yield path, found.name


def _members(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """What a container of modules is made of, and its names; ``*`` for those of a comprehension or a variable."""
    for number, argument in enumerate(call.args):
        match argument:
            case ast.List(elts=items) | ast.Tuple(elts=items):
                yield from ((str(i), item) for i, item in enumerate(items))
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    yield (str(key.value) if isinstance(key, ast.Constant) else "*"), value
            case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
                yield from ((keyword.arg or "*", keyword.value) for keyword in keywords)
            case ast.Starred(value=value):
                yield "*", value
            case ast.Call():
                yield str(number), argument
            case _:
                yield "*", argument
