"""Torch's losses over targets that count on all ranks, beside torch's on the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from ranks import on_ranks
from torch.nn import functional as F

import bmtrain as bmt

TARGETS = torch.tensor([1, 0, 0, 0, 2, 3, 1, 0, 2, 2, 3, 1])


def share(whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(bmt.world_size())[bmt.rank()]


@on_ranks(1, 2, 3)
def test_the_mean_and_its_gradient_are_the_batchs() -> None:
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ways: list[dict[str, Any]] = [
        {"ignore_index": 0}, {}, {"ignore_index": 0, "weight": weight}, {"ignore_index": 2, "label_smoothing": 0.1}
    ]  # fmt: skip
    for options in ways:
        whole = logits.clone().requires_grad_()
        expected = F.cross_entropy(whole, TARGETS, **options)
        expected.backward()
        for criterion in (
            bmt.loss.mean_over_ranks(torch.nn.CrossEntropyLoss(**options)),
            lambda x, y, o=options: bmt.loss.mean_over_ranks(F.cross_entropy)(x, y, **o),
        ):
            mine = share(logits).clone().requires_grad_()
            loss = criterion(mine, share(TARGETS))
            torch.testing.assert_close(loss, expected)
            loss.backward()
            assert whole.grad is not None and mine.grad is not None
            torch.testing.assert_close(mine.grad / bmt.world_size(), share(whole.grad))


@on_ranks(2)
def test_what_is_no_mean_stays() -> None:
    for reduction in ("sum", "none"):
        kept = bmt.loss.mean_over_ranks(torch.nn.CrossEntropyLoss(reduction=reduction))
        x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
        assert kept(x, y).equal(F.cross_entropy(x, y, reduction=reduction))
        assert bmt.loss.mean_over_ranks(F.cross_entropy)(x, y, reduction=reduction).equal(kept(x, y))
    other = torch.nn.MSELoss()
    assert bmt.loss.mean_over_ranks(other) is other
    assert bmt.loss.mean_over_ranks(torch.nn.CrossEntropyLoss(ignore_index=3)).ignore_index == 3
