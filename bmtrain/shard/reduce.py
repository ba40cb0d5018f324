"""From whole gradients to gradient shards."""

from __future__ import annotations

import torch

from .flat import FlatShard
from .parameter import set_raw_grad


def reduce_flat(flat: FlatShard) -> None:
    """Sum ``flat``'s whole gradients over ranks; add this rank's part to ``flat.grad``.

    A parameter without a gradient on this rank counts as zeros: another rank may have one.
    """
    ctx = flat.unit.ctx
    device, stream = ctx.device, ctx.device.reduce_stream
    layout, pool = flat.layout, flat.unit.pools.grads
    current = device.current_stream()
    # Gaps between parameters are never written, so a buffer that starts as zeros keeps them zero.
    buffer = pool.acquire(layout.numel, flat.dtype, layout, current)
    fresh, flat.has_grad = not flat.has_grad, True
    sources, targets = [], []
    for index, (raw, view) in enumerate(zip(flat.raw_grads(), flat.views(buffer.tensor), strict=True)):
        if raw is None or not flat.params[index].requires_grad:
            view.zero_()
            continue
        sources.append(raw.to_dense() if raw.is_sparse else raw)
        targets.append(view)
        flat.touched[index] = True
        set_raw_grad(flat.params[index], None)
    with torch.no_grad():
        if sources:
            torch._foreach_copy_(targets, sources)
        grad = flat.ensure_grad()
        ready = device.event()
        ready.record(current)
        ready.wait(stream)
        with device.on(stream):
            _accumulate(flat, buffer.tensor, grad, fresh)
    pool.give_back(buffer, stream)


def _accumulate(flat: FlatShard, whole: torch.Tensor, grad: torch.Tensor, fresh: bool) -> None:
    ctx = flat.unit.ctx
    if fresh and grad.dtype == whole.dtype:
        ctx.reduce.reduce_scatter(whole, grad)
        return
    part = torch.empty(grad.numel(), dtype=whole.dtype, device=grad.device)
    ctx.reduce.reduce_scatter(whole, part)
    if fresh:
        grad.copy_(part)
    else:
        grad.add_(part)
