"""From whole gradients to gradient shards."""

from __future__ import annotations

import torch

from .flat import FlatShard
from .parameter import set_raw_grad


def reduce_flat(flat: FlatShard) -> None:
    """Sum ``flat``'s whole gradients over ranks; add this rank's part to its gradient.

    A parameter without a gradient on this rank counts as zeros: another rank may have one.
    """
    device = flat.unit.ctx.device
    buffer, landed = flat.take_landing()
    with torch.no_grad():
        _collect(flat, buffer.views(flat.layout), landed)
        device.event_after(device.current_stream()).wait(device.reduce_stream)
        with device.on(device.reduce_stream):
            flat.gradient.add(buffer.tensor)
    flat.unit.pools.grads.give_back(buffer, device.reduce_stream)


def _collect(flat: FlatShard, views: list[torch.Tensor], landed: list[bool]) -> None:
    """Bring every gradient of ``flat`` into the buffer."""
    sources, targets = [], []
    for index, (raw, view) in enumerate(zip(flat.raw_grads(), views, strict=True)):
        if raw is not None and flat.params[index].requires_grad:
            dense = raw.to_dense() if raw.is_sparse else raw
            if landed[index]:
                view.add_(dense)
            else:
                sources.append(dense)
                targets.append(view)
            set_raw_grad(flat.params[index], None)
        elif not landed[index]:
            view.zero_()
            continue
        flat.touched[index] = True
    if sources:
        torch._foreach_copy_(targets, sources)
