"""Embeddings that look at which rows a batch uses: here those that the batches of all ranks use.

With ``max_norm`` these rows are shortened; with ``scale_grad_by_freq`` the gradient of each is divided by how often it
is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..autograd import never_compiled
from ..context import context
from ..errors import UnsupportedError


def use_rows_alike(root: nn.Module) -> None:
    """Let every such embedding in ``root`` do the same on all ranks."""
    for module in root.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.max_norm is not None and _shorten not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_shorten)
            if module.scale_grad_by_freq and _divide_alike not in module._forward_hooks.values():
                module.register_forward_hook(_divide_alike)


def _shorten(module: nn.Embedding | nn.EmbeddingBag, args: tuple[Any, ...]) -> None:
    """Before the module's forward, which then finds no row too long.  Collective."""
    ctx = context()
    if ctx.world_size == 1 or not args or module.max_norm is None:
        return
    with torch.no_grad():
        used = torch.zeros(module.num_embeddings, dtype=torch.int32, device=args[0].device)
        used[args[0].flatten()] = 1
        ctx.world.all_reduce(used, "max")
        rows = used.nonzero().flatten()
        torch.embedding_renorm_(module.weight.detach(), rows, module.max_norm, module.norm_type)


@never_compiled
def _divide_alike(module: nn.Embedding | nn.EmbeddingBag, args: tuple[Any, ...], out: torch.Tensor) -> None:
    """torch divides a row's gradient by its count on this rank, which then is that of all ranks.  Collective."""
    ctx = context()
    if ctx.data_group.world_size == 1 or not args or not out.requires_grad:
        return
    if not isinstance(module, nn.Embedding):
        raise UnsupportedError(
            "nn.EmbeddingBag(scale_grad_by_freq=True) counts the rows of a rank's share of the batch. Take the option "
            "out, or sum an nn.Embedding's rows instead, which counts those of all ranks."
        )
    with torch.no_grad():
        here = torch.bincount(args[0].flatten(), minlength=module.num_embeddings)
        everywhere = here.clone()
        ctx.data_group.all_reduce(everywhere, "sum")
        part = (here / everywhere.clamp(min=1))[args[0]].unsqueeze(-1)
    out.register_hook(lambda gradient: gradient * part.to(gradient.dtype))  # type: ignore[no-untyped-call]
