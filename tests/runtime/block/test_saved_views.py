"""Views of a parameter that autograd saves as numbers of another kind: complex pairs, parts of them, conjugates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt

WIDTH = 6
Use = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """``pairs``: (width, 2); ``numbers``: (width, width) complex; a bias of three in front of both."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = use
        self.front = nn.Parameter(torch.randn(3))
        self.pairs = nn.Parameter(torch.randn(WIDTH, 2))
        self.numbers = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.front.sum() * self.use(x, self.pairs, self.numbers).tanh()


def real(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z.resolve_conj()).sum(-1)


def filtered(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * weight, n=WIDTH, dim=1)


USES: dict[str, Use] = {
    "complex pairs": lambda x, p, n: real(x * torch.view_as_complex(p)),
    "a filter": lambda x, p, n: filtered(x, torch.view_as_complex(p)[: WIDTH // 2 + 1]),
    "a later part": lambda x, p, n: filtered(x, torch.view_as_complex(p[2:])),
    "conjugate pairs": lambda x, p, n: real((x + 1j) * torch.view_as_complex(p).conj()),
    "real numbers": lambda x, p, n: x @ n.real,
    "imaginary numbers": lambda x, p, n: x @ n.imag,
    "negated numbers": lambda x, p, n: x @ n.conj().imag,
    "conjugate numbers": lambda x, p, n: real((x + 1j) * n[0].conj()),
    "a conjugate product": lambda x, p, n: real((x + 1j) @ n.mH),
    "numbers": lambda x, p, n: real((x + 1j) @ n),
    "pairs of numbers": lambda x, p, n: (x[..., None] * torch.view_as_real(n[1])).sum(-1),
    "pairs as they are": lambda x, p, n: x * p[:, 0] + p.square().sum(1),
}


def trained(use: str, recompute: bool, blocks: bool) -> None:
    torch.manual_seed(0)
    plain: Any = nn.Sequential(*[Layer(USES[use]) for _ in range(3)])
    ours: Any = copy.deepcopy(plain)
    if blocks:
        for n, layer in enumerate(ours):
            ours[n] = bmt.Block(layer, use_checkpoint=recompute)
    model: Any = bmt.BMTrainModelWrapper(ours)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(12, WIDTH)
    for step in range(2):
        plain.zero_grad()
        model.zero_grad()
        plain(x + step).square().mean().backward()
        manager.backward(model(models.share(x) + step).square().mean())
        oracle.assert_same_grads(model, plain, 1e-4)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("recompute", "blocks"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("schedule", ["overlap", "stress"])
def test_gradients_of_what_is_made_of_the_view(schedule: str, recompute: bool, blocks: bool, use: str) -> None:
    run_ranks(2, trained, use, recompute, blocks, init={"schedule": schedule})
