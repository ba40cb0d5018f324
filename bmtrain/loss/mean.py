"""Means over what all ranks count, where ranks count differently: short batches, masks, ignored targets."""

from __future__ import annotations

import torch

from ..context import context, world_size
from ..errors import ConfigurationError


def mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of all ranks' ``values``, each counted once, wherever it lies.  Collective, and differentiable.

    The mean over ranks of each rank's own mean is something else where ranks hold different numbers of values: the
    last batch of an epoch, tokens under a mask, targets to ignore.  As a loss this one gives gradients of the whole
    batch's mean, by ``loss.backward()`` and by OptimManager alike.

    Args:
        values: any shape, which may differ between ranks, or be empty.
        mask: what counts: bool, or weights; broadcastable to ``values``.  None counts all.

    Returns a 0-d tensor, the same on every rank, in float32 for low precision; NaN if nothing counts on any rank.
    Raises ConfigurationError when the mask does not fit.
    """
    if mask is None:
        count = torch.tensor(values.numel(), device=values.device)
    else:
        try:
            mask = mask.to(values.device).expand_as(values)
        except RuntimeError:
            raise ConfigurationError(
                f"bmt.mean got values of shape {tuple(values.shape)} and a mask of shape {tuple(mask.shape)}."
            ) from None
        count = mask.sum()
        values = values.masked_fill(~mask, 0) if mask.dtype == torch.bool else values * mask
    wide = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else None
    return over_ranks(values.sum(dtype=wide), count)


def over_ranks(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' ``total`` divided by that of their ``count``, both 0-d.  Collective.

    A gradient flows back to this rank's ``total``, such that the mean over ranks of gradients is the whole's.
    """
    if world_size() == 1:
        return total / count
    ctx = context()
    sums = torch.stack([total.detach().double(), count.detach().double()])
    same_device = sums.device.type == ctx.device.torch_device.type
    (ctx.world if same_device else ctx.control).all_reduce(sums)
    own = total * (ctx.world_size / sums[1]).to(total.dtype)
    return own + ((sums[0] / sums[1]).to(total.dtype) - own).detach()  # shows the whole mean, backs up its own part
