"""Parameters of which every tensor-parallel rank holds a slice: its share of the whole along one dimension."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..context import Context


class Split(NamedTuple):
    """How a whole is cut.

    Attributes:
        dim: along which dimension.
        parts: what follows each other along it, by relative lengths; of every part each rank has an equal share.
    """

    dim: int
    parts: tuple[int, ...] = (1,)

    def lengths(self, length: int) -> list[int]:
        """Those of the parts of ``length`` elements: of the whole, or of a slice."""
        return [part * length // sum(self.parts) for part in self.parts]


def whole_shape(ctx: Context, shape: tuple[int, ...], split: Split | None) -> tuple[int, ...]:
    """The shape of the whole, given a slice's; ``split`` None means that there are no slices."""
    if split is None:
        return shape
    return (*shape[: split.dim], shape[split.dim] * ctx.tensor_group.world_size, *shape[split.dim + 1 :])


def own_slice(ctx: Context, whole: torch.Tensor, split: Split | None) -> torch.Tensor:
    """This rank's slice of ``whole``, contiguous."""
    if split is None:
        return whole
    parts = torch.split(whole, split.lengths(whole.shape[split.dim]), split.dim)
    shares = [part.chunk(ctx.tensor_group.world_size, split.dim)[ctx.tensor_group.rank] for part in parts]
    return shares[0].contiguous() if len(shares) == 1 else torch.cat(shares, split.dim)


def joined(ctx: Context, own: torch.Tensor, split: Split | None) -> torch.Tensor:
    """The whole, of which every rank of the tensor-parallel group gives its ``own`` slice.  Collective in it."""
    if split is None:
        return own
    sent = own.detach().to(ctx.device.torch_device).contiguous()
    every = torch.empty((ctx.tensor_group.world_size, *sent.shape), dtype=sent.dtype, device=sent.device)
    ctx.tensor_group.all_gather(sent, every)
    slices = [torch.split(one, split.lengths(one.shape[split.dim]), split.dim) for one in every.unbind(0)]
    return torch.cat([share for part in zip(*slices, strict=True) for share in part], split.dim).to(own.device)


def rows_in_whole(ctx: Context, length: int, split: Split) -> list[tuple[int, int]]:
    """Of a slice's ``length`` indices along ``split.dim``: how many are neighbours in the whole, and from where on."""
    found, start = [], 0
    for share in split.lengths(length):
        found.append((share, start + ctx.tensor_group.rank * share))
        start += share * ctx.tensor_group.world_size
    return found
