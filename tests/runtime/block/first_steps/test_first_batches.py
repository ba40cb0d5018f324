"""Ranks that all train on the same batches are told, once."""

from __future__ import annotations

import warnings

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt


class Timed(nn.Sequential):
    """Gets a time, the same on all ranks, in front of its batch, as what an ODE is solved with."""

    def forward(self, time: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return time * super().forward(x)


def said(kind: str) -> list[str]:
    timed = kind == "timed"
    layers = nn.Linear(4, 4), nn.Linear(4, 4)
    model = bmt.BMTrainModelWrapper(Timed(*layers) if timed else nn.Sequential(*layers))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            seed = 10 * step + bmt.rank() if kind in {"parted", "timed"} else step
            x = torch.randn(
                3 + (kind == "lengths") * bmt.rank(),
                4,
                generator=torch.Generator().manual_seed(seed),
            )
            if kind == "once" and step == 1:
                x = x + bmt.rank()
            if kind == "evaluated":
                model.eval()
                with torch.no_grad():
                    model(torch.ones(2, 4))
                model.train()
                x = x + bmt.rank()
            manager.zero_grad()
            manager.backward((model(torch.tensor(0.5), x) if timed else model(x)).square().mean())
            manager.step()
    return [str(w.message) for w in caught if "same batches" in str(w.message)]


@pytest.mark.parametrize("kind", ["parted", "lengths", "once", "evaluated", "timed"])
def test_nothing_is_said_of_ranks_with_batches_of_their_own(kind: str) -> None:
    assert run_ranks(2, said, kind, fresh=True) == [[], []]


def test_the_same_batches_are_said_once_and_where() -> None:
    found = run_ranks(2, said, "same", fresh=True)
    assert len(found[0]) == 1 and not found[1]
    assert "test_first_batches.py:" in found[0][0] and "shard_loader" in found[0][0]
    assert run_ranks(1, said, "same", fresh=True) == [[]]
