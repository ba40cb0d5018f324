"""Training of a model that is split over ranks, beside the whole one in plain torch on every rank."""

from __future__ import annotations

from typing import Any

import oracle
import torch
from torch import nn

import bmtrain as bmt

VOCABULARY, ROWS, LENGTH = 14, 8, 5
SCALE, MAX_NORM = 256.0, 0.05


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the next ones, (ROWS, LENGTH), the same on all ranks."""
    generator = torch.Generator("cpu").manual_seed(50 + step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator, device="cpu")
    tokens = tokens.to(torch.get_default_device())
    tokens[:, 0] = 5  # so that masks of what is above 2 leave something
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def own_slice(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's slice, by what the shapes say."""
    for dim, (all_of_it, own) in enumerate(zip(whole.shape, like.shape, strict=True)):
        if all_of_it != own:
            return whole.chunk(all_of_it // own, dim)[bmt.mesh().get_local_rank("tensor")]
    return whole


def assert_trains_alike(model: Any, reference: nn.Module, kind: str = "torch's", noise: tuple[str, ...] = ()) -> None:
    """From equal weights: losses, gradients, norms, weights, the optimizer's state.

    Gradients of parameters whose names hold one of ``noise`` are rounding error, and not looked at by themselves.
    """
    oracle.assert_same_weights(model, reference, exact=True)
    make: Any = bmt.optim.AdamOptimizer if kind == "ours" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=0.01, eps=1e-4, weight_decay=0.1)
    manager = bmt.optim.OptimManager(loss_scale=SCALE)
    manager.add_optimizer(optimizer)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, eps=1e-4, weight_decay=0.1)
    for step in range(3):
        for micro in range(2):
            whole = reference(*batch(2 * step + micro))
            (whole / 2).backward()
            loss = model(*bmt.shard_batch(batch(2 * step + micro)))
            manager.backward(loss / 2)
            oracle.assert_close(bmt.sum_loss(loss.detach()), whole.detach(), f"the loss of step {step}")
        looked_at = zip(model.named_parameters(), reference.named_parameters(), strict=True) if step != 1 else ()
        for (name, p), (same, q) in looked_at:
            found = bmt.gather_grad(p, join=True)
            assert name == same and found is not None and q.grad is not None, name
            if not any(part in name for part in noise):
                oracle.assert_close(found / SCALE, q.grad, f"the gradient of {name}")
        norm = manager.clip_grad_norm(model.parameters(), MAX_NORM)
        oracle.assert_close(
            norm, nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM), f"the norm of step {step}"
        )
        manager.step()
        theirs.step()
        manager.zero_grad()
        theirs.zero_grad()
    oracle.assert_same_weights(model, reference, limit=1e-3)
    ours = optimizer.state_dict()["state"]
    for number, state in theirs.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            oracle.assert_close(ours[number][name], state[name], f"{name} of {number}", 1e-3)
