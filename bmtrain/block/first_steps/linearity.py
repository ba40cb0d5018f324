"""Whether what a function makes of some tensors is linear in them, by what it does while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LINEAR = {
    "add", "sub", "rsub", "neg", "positive", "clone", "_to_copy", "copy", "detach", "alias", "view", "_unsafe_view",
    "reshape", "_reshape_alias", "expand", "transpose", "t", "permute", "squeeze", "unsqueeze", "slice", "select",
    "index", "index_select", "gather", "flip", "roll", "diagonal", "split", "split_with_sizes", "unbind", "unfold",
    "cat", "stack", "sum", "mean", "cumsum", "trace", "masked_fill", "masked_select", "masked_scatter", "index_fill",
    "index_put", "_index_put_impl", "index_add", "index_copy", "scatter", "scatter_add", "slice_scatter",
    "select_scatter", "zero", "fill", "tril", "triu", "as_strided", "repeat", "constant_pad_nd", "where",
    "view_as_real", "view_as_complex", "real", "imag", "_conj", "nan_to_num", "lift_fresh", "set",
}  # fmt: skip
"""Linear in all the tensors that they take; ``nan_to_num`` unless some value is infinite or NaN."""
_PRODUCTS = {
    "mul", "mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "addcmul", "lerp", "convolution", "linear", "outer",
}  # fmt: skip
"""Linear in each, but not in two of them together."""
_APART = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "isnan", "isinf", "isfinite", "is_same_size",
}  # fmt: skip
"""What they give depends on no values, or only on whether these are finite."""
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero"}


class Linearity(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows ``given`` through the operations inside the ``with``.

    Attributes:
        asks_ranks: whether a collective of torch's was called.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bent: dict[int, str] = {}  # by storage: what made it of the given; "" where that is linear
        self._held: list[torch.Tensor] = []  # so that no other tensor comes to lie there
        self._given = list(given)
        for tensor in self._given:
            self._bent[_place(tensor)] = ""
        self._read = ""
        self._is_written = False
        self.asks_ranks = False

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.asks_ranks |= func.namespace in ("c10d", "_c10d_functional")
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = [self._bent[place] for place in map(_place, taken) if place in self._bent]
        if not found:
            return out
        name = func.overloadpacket.__name__.rstrip("_") or func.overloadpacket.__name__
        if name in _READS:
            self._read = self._read or name
        elif name not in _APART:
            self._note(func, name, args, out, next(filter(None, found), "") or self._bends(name, args, len(found)))
        return out

    def _bends(self, name: str, args: tuple[Any, ...], found: int) -> str:
        """``name`` if it is not linear in what it takes of the given."""
        if name in _LINEAR or (name in _PRODUCTS and found == 1):
            return ""
        if name == "div" and not (isinstance(args[1], torch.Tensor) and _place(args[1]) in self._bent):
            return ""
        return name

    def _note(self, func: Any, name: str, args: tuple[Any, ...], out: Any, bent: str) -> None:
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            made.append(args[0])
            self._is_written |= _place(args[0]) in map(_place, self._given)
        for tensor in made:
            self._held.append(tensor)
            place = _place(tensor)
            self._bent[place] = bent or self._bent.get(place, "")

    def bends(self, results: Iterable[torch.Tensor]) -> str:
        """What is not linear in ``results``, or in what was written into the given: the name of a function, or ""."""
        found = [*results, *self._given]
        bent = next(filter(None, (self._bent.get(_place(tensor), "") for tensor in found)), "")
        given = set(map(_place, self._given))
        if bent or not self._read or not (self._is_written or any(_place(tensor) not in given for tensor in found)):
            return bent
        return "a decision by its values"


def _place(tensor: torch.Tensor) -> int:
    """Where it lies; a view lies where it was taken from."""
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided
    return tensor.untyped_storage()._cdata if plain else id(tensor)


def watched(
    call: Callable[[], Any], given: Iterable[torch.Tensor], extra: Callable[[], Iterable[Any]]
) -> tuple[Any, str]:
    """What ``call`` gives, and what in that, or in ``extra`` afterwards, is not linear in ``given``; "" if nothing."""
    watch = Linearity(given)
    with watch:
        out = call()
    results = [leaf for leaf in tree_leaves([out, *extra()]) if isinstance(leaf, torch.Tensor)]
    return out, "" if watch.asks_ranks else watch.bends(results)
