"""Embeddings with ``max_norm`` shorten the rows that a batch uses: here those that any rank's batch uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..context import context


def shorten_alike(root: nn.Module) -> None:
    """Let every such embedding in ``root`` shorten the same rows on all ranks."""
    for module in root.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            if _shorten not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_shorten)


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
