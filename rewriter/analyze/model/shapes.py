"""How a view cuts or joins the dimension that tensor-parallel ranks share, and what must be rewritten for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewriter.analyze.model.tensors import NONE, Dim, Lead, Num, Tensor

Item = Num | Lead


class Odd(Exception):
    """A view that is not known to be right on a rank."""


@dataclass(frozen=True)
class Viewed:
    """What a view gives.

    ``inferred`` are numbers that must become -1, ``width`` one that must become the width of a head, where ``heads`` is
    their number; ``parts`` says how many equal ones the shared dimension must have.
    """

    tensor: Tensor
    inferred: tuple[Num, ...] = ()
    heads: Num | None = None
    width: Num | None = None
    parts: int | None = None


def viewed(tensor: Tensor, items: Sequence[Item]) -> Viewed:
    """``tensor.view(*items)``, where the tensor has a shared dimension.

    Raises:
        Odd: the reason.
    """
    assert tensor.dims is not None
    dims, rest = list(tensor.dims), list(items)
    front: list[Dim | Lead] = []
    while dims and rest and _same(dims[0], rest[0]):
        front.append(dims.pop(0))
        rest.pop(0)
    back: list[Dim | Lead] = []
    while len(dims) > 1 and len(rest) > 1 and _same(dims[-1], rest[-1]):
        back.insert(0, dims.pop())
        rest.pop()
    if any(isinstance(dim, Dim) and dim.split for dim in (*front, *back)):
        return _beside(tensor, front, dims, rest, back)
    shared = dims[0] if dims else None
    if not isinstance(shared, Dim) or not shared.split:
        raise Odd("its view does not begin with the dimensions that the features have in front of them")
    numbers = [item for item in rest if isinstance(item, Num)]
    if not numbers or len(numbers) != len(rest):
        raise Odd("its view has another number of dimensions")
    if len(dims) > 1 and len(numbers) > 1:
        raise Odd("its view cuts and joins dimensions at once")
    made = _joined(dims, numbers[0]) if len(numbers) == 1 else _cut(shared, numbers)
    whole = (*front, *(made.tensor.dims or ()), *back)
    return Viewed(Tensor(whole, tensor.origins, tensor.hidden), made.inferred, made.heads, made.width, made.parts)


def _same(dim: Dim | Lead, item: Item) -> bool:
    if isinstance(dim, Lead) or isinstance(item, Lead):
        return dim == item and not (isinstance(dim, Lead) and dim.of == "?")
    return dim.split == bool(item.origins) and dim.size == item.text


def _beside(
    tensor: Tensor,
    front: Sequence[Dim | Lead],
    dims: Sequence[Dim | Lead],
    items: Sequence[Item],
    back: Sequence[Dim | Lead],
) -> Viewed:
    """Whole dimensions, ``dims``, become others beside the shared one, which stays."""
    of = "*".join(dim.size for dim in dims if isinstance(dim, Dim))
    numbers = [item for item in items if isinstance(item, Num) and not item.origins]
    if len(numbers) != len(items) or any(isinstance(dim, Lead) for dim in dims):
        raise Odd("its view has another number of dimensions")
    made = [Dim(f"a share of {of}" if number.text == "-1" else number.text) for number in numbers]
    return Viewed(Tensor((*front, *made, *back), tensor.origins, tensor.hidden))


def _joined(dims: Sequence[Dim | Lead], number: Num) -> Viewed:
    """All of ``dims``, of which the first is shared, become one."""
    first = dims[0]
    assert isinstance(first, Dim)
    size = "*".join(dim.size for dim in dims if isinstance(dim, Dim))
    fresh = first.fresh and len(dims) == 1
    tensor = Tensor((Dim(f"({size})" if len(dims) > 1 else size, True, fresh),))
    if number.text == "-1" or (number.origins and number.text in (f"({size})", size)):
        return Viewed(tensor)
    return Viewed(tensor, (number,))


def _cut(shared: Dim, numbers: Sequence[Num]) -> Viewed:
    """The shared dimension becomes several."""
    parts = None
    first, *others = numbers
    front: tuple[Dim, ...] = ()
    if len(numbers) > 2 and first.text.isdecimal():  # (3, heads, width)
        if not shared.fresh:
            raise Odd("its features are cut into parts twice")
        parts, front = int(first.text), (Dim(first.text),)
        first, *others = others
    if any(number.origins for number in (first, *others)):
        raise Odd("its view cuts the features by a number that differs on a rank")
    sizes = [Dim(f"a share of {shared.size}" if number.text == "-1" else number.text) for number in others]
    made = Tensor((*front, Dim(f"shared {first.text}", True, shared.fresh and parts is None), *sizes))
    if first.text == "-1":
        return Viewed(made, parts=parts)
    if all(number.text != "-1" for number in others):
        return Viewed(made, (first,), first, parts=parts)
    if len(others) != 1:
        raise Odd("the width of its heads is left to the view")
    return Viewed(made, (first,), first, others[0], parts)


def text_of(dim: Dim | Lead) -> Item:
    """A dimension as a number of a shape."""
    if isinstance(dim, Lead):
        return dim
    return Num(dim.size, frozenset({"?"}) if dim.split else NONE)
