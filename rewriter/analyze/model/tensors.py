"""Values of a forward as tensor-parallel ranks see them: which dimension they share, if any."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo

Origins = frozenset[str]
"""Names of the layers whose output features the ranks share, and of which a value is made."""
NONE: Origins = frozenset()


class Failure(Exception):
    """The layers in ``origins`` cannot be split: ``reason``, at ``node``."""

    def __init__(self, origins: Origins, reason: str, file: File, node: ast.AST) -> None:
        super().__init__(reason)
        self.origins, self.reason, self.file, self.line = origins, reason, file, getattr(node, "lineno", 1)


class Again(Exception):
    """How many dimensions an argument has was learned; the forward is read anew."""


@dataclass(frozen=True)
class Dim:
    """One dimension. Equal ``size``s are equal numbers.

    ``split``: every rank has its share. ``fresh``: whether these are several parts, one behind the other, is not known.
    """

    size: str
    split: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class Lead:
    """All dimensions of an argument but the last ``dropped``, where it is not known how many it has."""

    of: str
    dropped: int


@dataclass(frozen=True)
class Tensor:
    """A tensor, or whatever else a forward computes with.

    ``dims`` None: not known. ``hidden``: a gradient may flow into it. ``norm``: the module whose parameter it is.
    """

    dims: tuple[Dim | Lead, ...] | None = None
    origins: Origins = NONE
    hidden: bool = False
    norm: str = ""

    @property
    def place(self) -> int:
        """Of the dimension that ranks share."""
        assert self.dims is not None
        return next(i for i, dim in enumerate(self.dims) if isinstance(dim, Dim) and dim.split)

    @property
    def fresh(self) -> bool:
        return self.dims is not None and any(isinstance(dim, Dim) and dim.fresh for dim in self.dims)


@dataclass(frozen=True)
class Num:
    """A number by how it is computed; with ``origins`` it is another one on a rank.

    ``node`` is where it stands in a shape, ``attribute`` what it is called on its module.
    """

    text: str
    origins: Origins = NONE
    node: ast.expr | None = None
    file: File | None = None
    attribute: str = ""


@dataclass(frozen=True)
class Shape:
    tensor: Tensor


@dataclass(frozen=True)
class Tup:
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Linear:
    """A plain ``nn.Linear`` under its name in the block."""

    name: str
    out: ast.expr | None
    """Its ``out_features``, as its module's constructor has them."""


@dataclass(frozen=True)
class Simple:
    """A module that works on every entry by itself (``each``), or on the last dimension (a norm)."""

    name: str
    kind: str


@dataclass(frozen=True)
class Chain:
    """A ``nn.Sequential``."""

    members: tuple[Value, ...]


@dataclass(frozen=True)
class Object:
    """A module of a class of the project."""

    cls: ClassInfo
    name: str


@dataclass(frozen=True)
class Routine:
    """A function of the project, or a method of ``owner``."""

    info: FunctionInfo
    owner: Object | None = None


@dataclass(frozen=True)
class Inline:
    """A lambda, in the names around it."""

    node: ast.Lambda


@dataclass(frozen=True)
class Torch:
    """Something of torch, or a method of a tensor (``of``), by its name."""

    name: str
    of: Tensor | Shape | None = None


@dataclass(frozen=True)
class Mixed:
    """Another thing in each of two branches."""

    origins: Origins


Value = Tensor | Num | Shape | Tup | Lead | Linear | Simple | Chain | Object | Routine | Inline | Torch | Mixed
WHOLE = Tensor()


def origins_of(value: Value) -> Origins:
    match value:
        case Tensor(origins=origins) | Num(origins=origins) | Mixed(origins=origins):
            return origins
        case Shape(tensor=tensor):
            return tensor.origins
        case Tup(items=items):
            return NONE.union(*map(origins_of, items))
        case Torch(of=of):
            return origins_of(of) if of is not None else NONE
    return NONE


def is_hidden(value: Value) -> bool:
    match value:
        case Tensor(hidden=hidden):
            return hidden
        case Tup(items=items):
            return any(map(is_hidden, items))
    return False
