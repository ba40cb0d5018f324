"""The same numbers, bit for bit, however collectives are scheduled.  On GPUs: a CPU has one schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ConfigurationError

GPUS = torch.cuda.device_count()
STEPS = 20 if GPUS else 8


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(16, dim), nn.Linear(dim, 16)
        self.layers = nn.ModuleList([Layer(dim) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def train(dtype: torch.dtype, recompute: bool, steps: int = STEPS) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(5)
    model = Net(64, 6).to(dtype)
    model.layers = bmt.TransformerBlockList([bmt.Block(layer, use_checkpoint=recompute) for layer in model.layers])
    bmt.BMTrainModelWrapper(model)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2, weight_decay=0.01)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    device = next(model.parameters()).device
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * step + bmt.rank())
        manager.zero_grad()
        for _ in range(2):
            x = torch.randn(8, 16, generator=generator).to(device, dtype)
            loss = (model(x) - x.flip(-1)).float().square().mean()
            manager.backward(loss)
        manager.clip_grad_norm(optimizer.param_groups, 1.0)
        manager.step()
        losses.append(loss.item())
    torch.use_deterministic_algorithms(False)
    return losses, model.state_dict()


def results(world_size: int, dtype: torch.dtype, recompute: bool, schedule: str) -> list[Any]:
    init = {"device": "cuda" if GPUS else "cpu", "schedule": schedule}
    return run_ranks(world_size, train, dtype, recompute, init=init, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})


def assert_same(one: list[Any], other: list[Any]) -> None:
    for (losses, state), (other_losses, other_state) in zip(one, other, strict=True):
        assert losses == other_losses
        assert all(torch.equal(state[key], other_state[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)])
def test_schedule_recomputation_and_repetition_change_no_bit(dtype: torch.dtype) -> None:
    reference = results(2, dtype, True, "overlap")
    assert reference[0][0][-1] < reference[0][0][0]
    assert_same(reference, results(2, dtype, True, "overlap"))
    assert_same(reference, results(2, dtype, True, "serial"))
    assert_same(reference, results(2, dtype, False, "overlap"))
    assert_same(reference, results(2, dtype, True, "stress"))
    assert_same(reference, results(2, dtype, False, "stress"))


def memory_after_deletion() -> tuple[int, int]:
    import gc

    train(torch.bfloat16, True, steps=2)
    gc.collect()
    bmt.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    train(torch.bfloat16, False, steps=2)
    gc.collect()
    bmt.synchronize()
    torch.cuda.empty_cache()
    return before, torch.cuda.mem_get_info()[0]


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_deleted_model_leaves_no_memory_behind() -> None:
    for before, after in run_ranks(2, memory_after_deletion, init={"device": "cuda"}):
        assert before - after < 32 * 2**20  # what libraries keep for themselves


def init_with(schedule: str) -> str:
    with pytest.raises(ConfigurationError) as error:
        bmt.init_distributed(schedule=schedule)  # type: ignore[arg-type]
    return str(error.value)


def test_an_unknown_schedule_is_refused() -> None:
    assert "'fast'" in run_ranks(1, init_with, "fast", initialize=False)[0]
