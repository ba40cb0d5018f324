"""Runs a script as ``python`` would, and writes down every loss that it calls backward on.

    python driver.py LOSSES.json [--still] script.py arguments...
    python driver.py LOSSES.json [--still] -m package.module arguments...

The original and the converted script run under it alike. ``--still`` makes dropout the identity, because on two ranks
it draws other numbers than on one; ``.cuda()`` stays where it is on a machine without GPU.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import sys
from typing import Any

import numpy
import torch


def main() -> None:
    target, *command = sys.argv[1:]
    if command[0] == "--still":
        command = command[1:]
        _no_dropout()
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
        torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.set_num_threads(1)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)  # what bmt.init_distributed does where the script sets no seed
    losses: list[float] = []
    (_watch_ranks if "WORLD_SIZE" in os.environ else _watch_backward)(losses)
    module = command[0] == "-m"
    sys.argv = command[module:]
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        if int(os.environ.get("RANK", 0)) == 0:
            with open(target, "w") as file:
                json.dump(losses, file)


def _watch_backward(losses: list[float]) -> None:
    """Losses as one process has them."""
    backward = torch.Tensor.backward

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(float(self.detach().double().mean()))
        backward(self, *args, **kwargs)

    torch.Tensor.backward = watched  # type: ignore[method-assign]


def _watch_ranks(losses: list[float]) -> None:
    """Losses as their mean over the ranks."""
    import bmtrain as bmt

    scale = bmt.optim.OptimManager.scale_loss

    def watched(self: Any, loss: torch.Tensor) -> torch.Tensor:
        losses.append(float(bmt.sum_loss(loss.detach().double().mean())))
        return scale(self, loss)

    bmt.optim.OptimManager.scale_loss = watched  # type: ignore[method-assign]


def _no_dropout() -> None:
    def identity(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return input

    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
        setattr(torch.nn.functional, name, identity)
    torch.dropout = identity  # type: ignore[assignment]
    attention = torch.nn.functional.scaled_dot_product_attention

    def still(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **kwargs: Any) -> Any:
        return attention(query, key, value, attn_mask, 0.0, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = still  # type: ignore[assignment]


if __name__ == "__main__":
    main()
