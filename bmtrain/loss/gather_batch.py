"""The rows of all ranks, for losses that compare the samples of a batch."""

from __future__ import annotations

from typing import Any

import torch

from ..alike import from_all
from ..autograd import never_compiled
from ..comm import Communicator
from ..context import context, is_initialized
from ..errors import ConfigurationError


@never_compiled
def gather_batch(rows: torch.Tensor) -> torch.Tensor:
    """The ``rows`` of all ranks, one share after the other as ``bmt.shard_batch`` cuts them.  Collective.

        z = bmt.gather_batch(F.normalize(model(x), dim=-1))
        loss = F.cross_entropy(z @ z.T / 0.1, bmt.gather_batch(labels))

    The gradient is whole, at the price of a reduce-scatter in the backward: a loss that every rank computes alike from
    all rows trains as it does on the whole batch, and so does the mean over ranks of losses of own rows against all.

    Args:
        rows: (n, ...) of this rank's samples; n may differ between ranks, what follows may not.

    Returns (sum of n, ...), of the same dtype.  Raises ConfigurationError, on every rank, where rows do not fit.
    """
    if not is_initialized() or context().data_group.world_size == 1:
        return rows
    ctx = context()
    most = 8  # dimensions that are compared
    here = torch.zeros(most, dtype=torch.int64, device="cpu")
    here[: rows.dim()] = torch.tensor([size + 1 for size in rows.shape[:most]], device="cpu")
    shapes = from_all(ctx, here)
    if not rows.dim() or not bool((shapes[:, 1:] == shapes[0, 1:]).all()) or not bool((shapes[:, 0] > 0).all()):
        raise ConfigurationError(
            f"bmt.gather_batch joins rows of one shape, a row for each sample; rank {ctx.rank} has given a tensor of "
            f"shape {tuple(rows.shape)}. Pad what differs between ranks; of a number, take bmt.mean."
        )
    members = ctx.topology.mesh.group("replicate", "shard", "pipe")
    counts = [int(shapes[rank, 0]) - 1 for rank in members]
    factor = ctx.gradient_divisor / ctx.data_group.world_size
    gathered: torch.Tensor = _GatherRows.apply(rows, counts, factor, ctx.data_group)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: list[int], factor: float, group: Communicator) -> torch.Tensor:
        ctx.counts, ctx.factor, ctx.group = counts, factor, group
        own = rows.new_zeros(max(counts), *rows.shape[1:])
        own[: len(rows)] = rows
        every = rows.new_empty(len(counts) * max(counts), *rows.shape[1:])
        group.all_gather(own.view(-1), every.view(-1))
        return _cut(every, counts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        most, shape = max(ctx.counts), grad.shape[1:]
        every = grad.new_zeros(len(ctx.counts), most, *shape)
        for rank, part in enumerate(torch.split(grad, ctx.counts)):
            every[rank, : len(part)] = part
        own = grad.new_empty(most, *shape)
        ctx.group.reduce_scatter(every.view(-1), own.view(-1))
        return own[: ctx.counts[ctx.group.rank]] * ctx.factor, None, None, None


def _cut(every: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Without the rows that fill up shorter shares."""
    most = max(counts)
    if min(counts) == most:
        return every
    return torch.cat([every[rank * most : rank * most + count] for rank, count in enumerate(counts)])
