"""Losses that compare samples with rows that need no gradient: told of where these differ between the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from models import share
from ranks import on_ranks
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt

ROWS, WIDTH = 12, 8
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def nothing_comes_in(rows: torch.Tensor) -> torch.Tensor:
    return rows


def infonce(z: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z @ keys.T / 0.1, torch.arange(len(z)))


def with_a_queue(z: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    queue = torch.cat([keys, keys + 1, keys - 1])
    logits = torch.cat([(z * keys).sum(1, keepdim=True), z @ queue.t()], 1)
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long))


def bank() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


COMPARES: dict[str, Loss] = {
    "products": lambda z, keys: infonce(F.normalize(z, dim=1), F.normalize(keys, dim=1)),
    "a queue": with_a_queue,
    "linear": lambda z, keys: F.cross_entropy(F.linear(z, keys), torch.arange(len(z))),
    "einsum": lambda z, keys: F.cross_entropy(torch.einsum("id,jd->ij", z, keys), torch.arange(len(z))),
    "keys first": lambda z, keys: F.cross_entropy((keys @ z.T).T, torch.arange(len(z))),
    "distances": lambda z, keys: F.cross_entropy(-torch.cdist(z, keys), torch.arange(len(z))),
    "distances, keys first": lambda z, keys: F.cross_entropy(-torch.cdist(keys, z), torch.arange(len(z))),
    "scaled": lambda z, keys: -(z @ keys.T).mul(2).log_softmax(1).diagonal().mean(),
    "by hand": lambda z, keys: ((s := z @ keys.T).logsumexp(1) - s.diagonal()).mean(),
    "beside another": lambda z, keys: z.square().mean() + 0.1 * infonce(z, keys),
}  # fmt: skip
ORDINARY: dict[str, Loss] = {
    "each with its own": lambda z, keys: -F.cosine_similarity(z, keys).mean(),
    "products with its own": lambda z, keys: -(z @ keys.T).diagonal().mean(),
    "distilled": lambda z, keys: F.kl_div(z.log_softmax(1), keys.softmax(1), reduction="batchmean"),
    "regression": lambda z, keys: F.mse_loss(z, keys),
    "prototypes": lambda z, keys: infonce(z, bank()[: len(z)]),
    "as many classes as samples": lambda z, keys: F.cross_entropy(F.linear(z, bank()[: len(z)]), torch.arange(len(z))),
    "a bank": lambda z, keys: F.cross_entropy(z @ bank().T, torch.arange(len(z))),
    "rows of all ranks": lambda z, keys: (
        F.cross_entropy(z @ bmt.gather_batch(keys).T, torch.arange(len(z)) + bmt.rank() * len(z))
    ),
    "own rows, then the others'": lambda z, keys: infonce(
        z, torch.cat([keys, *(bmt.gather_batch(keys).chunk(bmt.world_size())[r] for r in others())])
    ),
    "a random projection": lambda z, keys: (z @ own_randn(WIDTH, len(z))).tanh().mean(),
}  # fmt: skip


def others() -> Iterator[int]:
    return (rank for rank in range(bmt.world_size()) if rank != bmt.rank())


def own_randn(*shape: int) -> torch.Tensor:
    with bmt.own_random():
        return torch.randn(*shape)


def said_of(loss: Loss, inside: bool) -> list[str]:
    torch.manual_seed(0)

    class Net(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.follows = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> Any:
            keys = self.follows(x).detach()
            return loss(self.layer(x), keys) if inside else (self.layer(x), keys)

    model = Net()
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.01))
    with oracle.heard("The loss compares samples with rows") as said:
        for step in range(4):
            x = share(torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step)))
            out = model(x)
            manager.zero_grad()
            manager.backward(out if inside else loss(*out))
            manager.step()
    return said


@on_ranks(2)
@pytest.mark.parametrize("inside", [False, True])
def test_rows_of_this_ranks_batch_are_told_of(inside: bool) -> None:
    for name, loss in COMPARES.items():
        said = said_of(loss, inside)
        assert len(said) == (bmt.rank() == 0), name
        assert all("bmt.gather_batch" in one for one in said)


@on_ranks(2)
@pytest.mark.parametrize("inside", [False, True])
def test_rows_that_ranks_share_are_left_alone(inside: bool) -> None:
    for name, loss in ORDINARY.items():
        assert not said_of(loss, inside), name
