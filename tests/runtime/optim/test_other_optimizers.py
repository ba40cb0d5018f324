"""Optimizers of other packages, which write to ``p.data`` as was usual before ``torch.no_grad``."""

from __future__ import annotations

from typing import Any

import models
import oracle
import torch
from ranks import on_ranks

import bmtrain as bmt


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, written through ``.data``."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p.data))
                    momentum.mul_(0.9).add_(p.grad.data)
                    p.data.mul_(1 - 1e-3).addcmul_(momentum, torch.ones_like(p.data), value=-group["lr"])
                    p.data[p.data > 100] = 0


@on_ranks(1, 2)
def test_optimizers_that_write_data() -> None:
    model, plain = models.build("gpt", models.sharded()), models.build("gpt", models.plain())
    reference = Momentum(plain.parameters(), 0.1)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(Momentum(model.parameters(), 0.1))
    for step in range(3):
        batch = models.batch("gpt", step)
        manager.zero_grad()
        reference.zero_grad()
        manager.backward(model(*batch))
        plain(*batch).backward()
        manager.step()
        reference.step()
    oracle.assert_same_weights(model, plain)
