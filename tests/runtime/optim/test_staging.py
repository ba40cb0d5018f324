"""States beside a device: gradients come and parameters go in batches, and nothing is mixed up."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context

WIDTH = 33


def losses(kind: str, dtype: torch.dtype, together: int, clips: bool, loss_scale: float | None) -> Any:
    torch.manual_seed(2)
    blocks = [bmt.CheckpointBlock(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))) for _ in range(5)]
    model: Any = bmt.BMTrainModelWrapper(nn.Sequential(*blocks, nn.Linear(WIDTH, 3)).to(dtype))
    device = context().device.torch_device
    plain = nn.Parameter(torch.ones((), device=device))  # of no module
    make: Any = {"ours": bmt.optim.AdamOptimizer, "offload": bmt.optim.AdamOffloadOptimizer}[kind]
    optimizer = make([*model.parameters(), plain], lr=1e-2, weight_decay=0.01)
    manager = bmt.optim.OptimManager(loss_scale=loss_scale)
    manager.add_optimizer(optimizer)
    found = []
    with mock.patch("bmtrain.optim.pieces._TOGETHER", together):
        for step in range(7):
            manager.zero_grad()
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step + 10 * bmt.rank()), device="cpu")
            used = model if step != 3 else model[1:]  # the first block has no gradient
            loss = (used(x.to(device, dtype)).float() * plain).square().mean()
            if step == 4 and loss_scale is not None:
                loss = loss * float("inf")  # a step that is skipped
            manager.backward(loss)
            if clips:
                manager.clip_grad_norm(model.parameters(), 0.3)
            manager.step()
            found.append(float(bmt.sum_loss(loss.detach())))
    return found, {k: v.cpu() for k, v in model.state_dict().items()}, optimizer.state_dict()["state"], plain.item()


@pytest.mark.parametrize(
    ("dtype", "together", "clips", "loss_scale"),
    [
        (torch.float32, 1, False, None),
        (torch.float32, 2 * WIDTH * WIDTH, True, 4.0),
        (torch.bfloat16, 1, True, None),
        (torch.bfloat16, 2**25, False, None),
        (torch.float16, 1, True, 4.0),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_states_beside_the_device_change_no_number(
    ranks: int, dtype: torch.dtype, together: int, clips: bool, loss_scale: float | None
) -> None:
    init = {"schedule": "stress"}  # under which a CPU's memory counts as another one's
    on_device, beside = (
        run_ranks(ranks, losses, kind, dtype, together, clips, loss_scale, init=init)[0] for kind in ("ours", "offload")
    )
    # On a GPU both compute with the same arithmetic; on a CPU AdamOptimizer is torch's.
    exact = {} if torch.cuda.is_available() else {"rtol": 1e-5 if dtype == torch.float32 else 2e-2, "atol": 1e-6}
    exact = {"rtol": 0, "atol": 0} if torch.cuda.is_available() else exact
    torch.testing.assert_close(on_device[0], beside[0], **exact, equal_nan=True)
    assert on_device[3] == pytest.approx(beside[3], rel=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(on_device[1], beside[1], **exact)
        torch.testing.assert_close(on_device[2], beside[2], **exact)


@on_ranks(1, init={"schedule": "stress"})
def test_all_processors_work() -> None:
    with mock.patch("bmtrain.optim.adam.processors", return_value=6):
        optimizer = bmt.optim.AdamOffloadOptimizer(bmt.BMTrainModelWrapper(nn.Linear(3, 3)).parameters())
    assert optimizer._threads == 6


@on_ranks(1)
def test_numbers_of_a_step_go_wherever_states_are() -> None:
    """As for a parameter of no module that is on a CPU beside a model on a GPU."""
    optimizer, number = bmt.optim.AdamOptimizer([nn.Parameter(torch.ones(2))]), torch.ones((), device="cpu")
    for name in ("meta", "cpu", "meta"):
        brought = optimizer._there(number, torch.device(name))
        assert brought is not None and brought.device.type == name
        assert brought is optimizer._there(number, torch.device(name))
