"""Parameters of which every tensor-parallel rank holds a slice: equal parts of the whole along one dimension."""

from __future__ import annotations

import torch

from ..context import Context


def whole_shape(ctx: Context, shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    """The shape of the whole, given a slice's; ``dim`` None means that there are no slices."""
    if dim is None:
        return shape
    return (*shape[:dim], shape[dim] * ctx.tensor_group.world_size, *shape[dim + 1 :])


def own_slice(ctx: Context, whole: torch.Tensor, dim: int | None) -> torch.Tensor:
    """This rank's slice of ``whole``, contiguous."""
    if dim is None:
        return whole
    return whole.chunk(ctx.tensor_group.world_size, dim)[ctx.tensor_group.rank].contiguous()


def joined(ctx: Context, own: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The whole, of which every rank of the tensor-parallel group gives its ``own`` slice.  Collective in it."""
    if dim is None:
        return own
    sent = own.detach().to(ctx.device.torch_device).contiguous()
    every = torch.empty((ctx.tensor_group.world_size, *sent.shape), dtype=sent.dtype, device=sent.device)
    ctx.tensor_group.all_gather(sent, every)
    return torch.cat(every.unbind(0), dim).to(own.device)
