"""What operations of torch do with a dimension that tensor-parallel ranks share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rewriter.analyze.model.shapes import Odd
from rewriter.analyze.model.tensors import NONE, Dim, Lead, Num, Origins, Tensor, Tup, Value, is_hidden, origins_of

EACH = {
    "contiguous", "to", "float", "half", "bfloat16", "double", "type", "type_as", "clone", "relu", "sigmoid", "tanh",
    "exp", "neg", "abs", "sqrt", "rsqrt", "pow", "square", "gelu", "silu", "clamp", "nan_to_num", "log", "cos", "sin",
    "leaky_relu", "elu", "mish", "hardswish", "softplus", "relu6", "dropout", "requires_grad_", "hardtanh",
    "logsigmoid", "detach", "relu_", "selu", "erf",
}  # fmt: skip
"""Work on every entry by itself."""
BINARY = {"add", "sub", "mul", "div", "true_divide", "masked_fill", "masked_fill_", "where", "maximum", "minimum"}
_TOTALS = {"softmax", "log_softmax", "sum", "mean", "amax", "amin", "cumsum", "var", "std"}
OPERATIONS = (
    EACH | BINARY | _TOTALS
    | {"matmul", "bmm", "einsum", "cat", "scaled_dot_product_attention", "transpose", "swapaxes", "permute",
       "unsqueeze", "squeeze", "repeat_interleave", "mT", "view_as_complex", "view_as_real", "rms_norm", "layer_norm"}
)  # fmt: skip
_COMPLEX = "the pair of a complex number"


class Unknown(Odd):
    """It is not known how many dimensions a tensor has, of which the last are."""

    def __init__(self, tensor: Tensor, count: int = 0) -> None:
        super().__init__("how many dimensions it has is not seen")
        first = tensor.dims[0] if tensor.dims else None
        self.lead = first if isinstance(first, Lead) and first.of != "?" else None
        self.known = count - len(tensor.dims or ()) + 1 + self.lead.dropped if count and self.lead else 0
        """How many the argument has, by the ``count`` of all of the tensor's."""


def explicit(tensor: Tensor) -> list[Dim]:
    """All dimensions. Raises Odd where they are not known."""
    found = [dim for dim in tensor.dims or () if isinstance(dim, Dim)]
    if tensor.dims is None or len(found) != len(tensor.dims):
        raise Unknown(tensor)
    return found


def place(tensor: Tensor, number: Value) -> int:
    """The place in ``tensor.dims`` that a number means."""
    if not isinstance(number, Num) or not re.fullmatch(r"-?\d+", number.text):
        raise Odd("a dimension is not a plain number")
    dims = tensor.dims or ()
    found = int(number.text)
    if found >= 0:
        if any(isinstance(dim, Lead) for dim in dims):
            raise Unknown(tensor)
    else:
        found += len(dims)
    if not 0 <= found < len(dims) or isinstance(dims[found], Lead):
        raise Unknown(tensor)
    return found


def moved(tensor: Tensor, order: Sequence[int]) -> Tensor:
    dims = explicit(tensor)
    if sorted(order) != list(range(len(dims))):
        raise Odd("its dimensions are put in an order that is not seen")
    return Tensor(tuple(dims[i] for i in order), tensor.origins, tensor.hidden)


def exchanged(tensor: Tensor, one: Value, other: Value) -> Tensor:
    dims = list(tensor.dims or ())
    a, b = place(tensor, one), place(tensor, other)
    dims[a], dims[b] = dims[b], dims[a]
    return Tensor(tuple(dims), tensor.origins, tensor.hidden)


def together(values: Sequence[Value]) -> Tensor:
    """Entry by entry, as torch broadcasts."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(origins_of(value) for value in values if not isinstance(value, Tensor)):
        raise Odd("it computes with the number of features or heads, which differs on a rank")
    shared = [tensor for tensor in tensors if tensor.origins]
    origins = NONE.union(*(tensor.origins for tensor in tensors))
    hidden = any(map(is_hidden, tensors))
    if not shared:
        known = [tensor for tensor in tensors if tensor.dims is not None]
        return Tensor(known[0].dims if known else None, NONE, hidden, next((t.norm for t in tensors if t.norm), ""))
    if any(tensor.hidden and not tensor.norm for tensor in tensors if not tensor.origins):
        raise Odd(
            "it meets a whole value that trains, whose gradient would be a part of it on each rank, or that may have "
            "an entry for each head"
        )
    if any(tensor.norm and tensor.dims is None for tensor in tensors if not tensor.origins):
        raise Odd("it meets a parameter whose dimensions are not seen")
    first = max(shared, key=lambda tensor: len(tensor.dims or ()))
    assert first.dims is not None
    back = len(first.dims) - first.place
    for tensor in shared:
        assert tensor.dims is not None
        if len(tensor.dims) - tensor.place != back:
            raise Odd("ranks share another dimension of each of two values that meet")
    for tensor in tensors:
        dims = tensor.dims if not tensor.origins else None
        if dims and not any(isinstance(dim, Lead) for dim in dims) and len(dims) >= back:
            dim = dims[-back]
            if isinstance(dim, Dim) and dim.size != "1":
                raise Odd("it meets a whole value that has all features or heads")
    return Tensor(first.dims, origins, True)


def multiplied(one: Tensor, other: Tensor) -> Tensor:
    a, b = explicit(one), explicit(other)
    if not one.origins or not other.origins:
        raise Odd("it is multiplied by a whole matrix")
    if len(a) < 3 or len(a) != len(b) or one.place != other.place or one.place >= len(a) - 2:
        raise Odd("a product of matrices adds up what the ranks share")
    return Tensor((*a[:-1], b[-1]), one.origins | other.origins, True)


def attended(tensors: Sequence[Tensor], mask: Value | None) -> Tensor:
    query = tensors[0]
    for tensor in tensors:
        if not tensor.origins:
            raise Odd("queries, keys and values are not all split")
        if tensor.place >= len(explicit(tensor)) - 2 or tensor.place != query.place:
            raise Odd("attention adds up what the ranks share")
    if mask is not None and (is_hidden(mask) or origins_of(mask)):
        raise Odd("its mask trains, or is made of what is split")
    origins = NONE.union(*(tensor.origins for tensor in tensors))
    return Tensor((*explicit(query)[:-1], explicit(tensors[2])[-1]), origins, True)


def summed(equation: str, tensors: Sequence[Tensor]) -> Tensor:
    """``torch.einsum``."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(tensors) or len(terms) != 2:
        raise Odd("its einsum is not followed")
    sizes: dict[str, Dim] = {}
    shared = set()
    for term, tensor in zip(terms, tensors, strict=True):
        dims = explicit(tensor)
        if len(dims) != len(term) or not tensor.origins:
            raise Odd("its einsum takes a whole value, too")
        shared.add(term[tensor.place])
        sizes |= {letter: dim for letter, dim in zip(term, dims, strict=True) if letter not in sizes or dim.split}
    if len(shared) != 1 or not shared <= set(right):
        raise Odd("its einsum adds up what the ranks share")
    origins = NONE.union(*(tensor.origins for tensor in tensors))
    return Tensor(tuple(sizes[letter] for letter in right), origins, True)


def operated(name: str, values: Sequence[Value], options: Mapping[str, Value]) -> Value:
    """What an operation gives, some of whose ``values`` are shared.

    Raises:
        Odd: it is not known to be the same on ranks.
    """
    if name in BINARY or (name == "pow" and len(values) > 1):
        return together([*values, *options.values()])
    if name == "scaled_dot_product_attention":
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, values, strict=False)) | dict(options)
        tensors = [given.get(item) for item in names[:3]]
        found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        if len(found) != 3:
            raise Odd("its arguments are not followed")
        return attended(found, given.get("attn_mask"))
    if name == "einsum":
        equation, *operands = values
        found = [tensor for tensor in operands if isinstance(tensor, Tensor)]
        if not isinstance(equation, Num) or len(found) != len(operands):
            raise Odd("its einsum is not followed")
        return summed(equation.text.strip("'\""), found)
    if name == "cat":
        return _joined(values, options)
    first, *rest = values
    if not isinstance(first, Tensor):
        raise Odd("it is given to something that is not followed")
    if name in ("matmul", "bmm"):
        if len(rest) != 1 or not isinstance(rest[0], Tensor):
            raise Odd("its arguments are not followed")
        return multiplied(first, rest[0])
    if not first.origins or any(map(origins_of, (*rest, *options.values()))):
        if name in ("to", "type_as"):
            return first
        raise Odd("it is given beside a whole value")
    return _alone(name, first, rest, options)


def _alone(name: str, tensor: Tensor, rest: Sequence[Value], options: Mapping[str, Value]) -> Value:
    if name in EACH:
        return tensor
    if name in ("transpose", "swapaxes"):
        names = [*rest, *(options[item] for item in ("dim0", "dim1") if item in options)]
        if len(names) != 2:
            raise Odd("its dimensions are exchanged in a way that is not seen")
        return exchanged(tensor, *names)
    if name == "mT":
        return exchanged(tensor, Num("-1"), Num("-2"))
    if name == "permute":
        order = rest[0].items if len(rest) == 1 and isinstance(rest[0], Tup) else tuple(rest)
        if isinstance((tensor.dims or (None,))[0], Lead):
            raise Unknown(tensor, len(order))
        return moved(tensor, [place(tensor, item) for item in order])
    if name in ("rms_norm", "layer_norm"):
        several = not rest or not isinstance(rest[0], Tup) or len(rest[0].items) != 1
        last = tensor.dims is None or tensor.place == len(tensor.dims) - 1
        if last or several or len(rest) > 1 or set(options) - {"eps"}:
            raise Odd("a norm goes over what the ranks share")
        return tensor
    axis = options.get("dim", rest[0] if rest else None)
    if name in _TOTALS:
        axes = axis.items if isinstance(axis, Tup) else (axis,) if axis is not None else ()
        places = [place(tensor, item) for item in axes]
        if not places or tensor.place in places:
            raise Odd(f"{name} goes over what the ranks share")
        if name in ("softmax", "log_softmax", "cumsum"):
            return tensor
        keep = options.get("keepdim", rest[1] if len(rest) > 1 else None)
        if not isinstance(keep, Num) or keep.text != "True" or tensor.dims is None:
            dims = tuple(dim for i, dim in enumerate(tensor.dims or ()) if i not in places)
        else:
            dims = tuple(Dim("1") if i in places else dim for i, dim in enumerate(tensor.dims))
        return Tensor(dims, tensor.origins, True)
    if name == "unsqueeze" and axis is not None and isinstance(axis, Num) and axis.text.lstrip("-").isdecimal():
        held = explicit(tensor)
        where = int(axis.text) + (len(held) + 1 if axis.text.startswith("-") else 0)
        return Tensor((*held[:where], Dim("1"), *held[where:]), tensor.origins, True)
    if name == "squeeze" and axis is not None:
        where = place(tensor, axis)
        held = explicit(tensor)
        if where == tensor.place:
            raise Odd("squeeze looks at what the ranks share")
        return Tensor((*held[:where], *held[where + 1 :]), tensor.origins, True)
    if name == "repeat_interleave":
        axis = options.get("dim", rest[1] if len(rest) > 1 else None)
        times = options.get("repeats", rest[0] if rest else None)
        if axis is None or not isinstance(times, Num) or tensor.dims is None or tensor.fresh:
            raise Odd("how it is repeated is not seen")
        where = place(tensor, axis)
        old = tensor.dims[where]
        assert isinstance(old, Dim)
        more = Dim(f"({old.size}*{times.text})", old.split)
        return Tensor((*tensor.dims[:where], more, *tensor.dims[where + 1 :]), tensor.origins, True)
    if name == "view_as_complex":
        if tensor.place == len(tensor.dims or ()) - 1:
            raise Odd("its features are taken for complex numbers")
        return Tensor((tensor.dims or ())[:-1], tensor.origins, True)
    if name == "view_as_real":
        return Tensor((*(tensor.dims or ()), Dim(_COMPLEX)), tensor.origins, True)
    raise Odd(f"{name} is not known to give the same on ranks")


def _joined(values: Sequence[Value], options: Mapping[str, Value]) -> Tensor:
    """``torch.cat``."""
    members = values[0].items if values and isinstance(values[0], Tup) else ()
    axis = options.get("dim", values[1] if len(values) > 1 else None)
    tensors = [tensor for tensor in members if isinstance(tensor, Tensor)]
    if axis is None or not tensors or len(tensors) != len(members) or not all(tensor.origins for tensor in tensors):
        raise Odd("it is joined with a whole value")
    where = place(tensors[0], axis)
    for tensor in tensors:
        if len(tensor.dims or ()) != len(tensors[0].dims or ()) or tensor.place != tensors[0].place:
            raise Odd("ranks share another dimension of each of two values that meet")
        if where == tensor.place:
            raise Odd("several layers' features are joined, which are in another order on ranks")
    dims = list(tensors[0].dims or ())
    dims[where] = Dim("+".join(dim.size for t in tensors if isinstance(dim := (t.dims or ())[where], Dim)))
    origins: Origins = NONE.union(*(tensor.origins for tensor in tensors))
    return Tensor(tuple(dims), origins, True)
