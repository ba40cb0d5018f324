"""``bmt.gather_batch``: losses that compare samples are those of the whole batch, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ConfigurationError

ROWS = 12


def _contrast(own: torch.Tensor, every: torch.Tensor, first: int) -> torch.Tensor:
    """Mean over ``own`` rows, which begin at ``first`` among ``every``."""
    own, every = F.normalize(own, dim=-1), F.normalize(every.tanh(), dim=-1)
    return F.cross_entropy(own @ every.T / 0.2, torch.arange(len(own), device=own.device) + first)


def _gradients(rows: list[int], alone: bool) -> None:
    """``rows`` are how many each rank has; ``alone``: a rank's loss is of its own rows against all."""
    torch.manual_seed(0)
    plain, device = nn.Linear(6, 4).to(context().device.torch_device), context().device.torch_device
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(nn.Linear(6, 4))
    whole = torch.randn(sum(rows), 6, generator=torch.Generator().manual_seed(1)).to(device)
    first = sum(rows[: bmt.rank()])
    out, wanted = model(whole[first : first + rows[bmt.rank()]]), plain(whole)
    every = bmt.gather_batch(out)
    assert torch.allclose(every, wanted, atol=1e-6)
    loss = _contrast(out, every, first) if alone else _contrast(every, every, 0)
    loss.backward()
    _contrast(wanted, wanted, 0).backward()
    for name, parameter in plain.named_parameters():
        found = bmt.gather_grad(getattr(model, name))
        assert torch.allclose(found, parameter.grad, atol=1e-6), name


@on_ranks(1, 2, 3)
def test_every_rank_computes_the_whole_loss() -> None:
    _gradients([ROWS // bmt.world_size()] * bmt.world_size(), alone=False)


@on_ranks(2, 3)
def test_ranks_compute_losses_of_their_own_rows() -> None:
    _gradients([ROWS // bmt.world_size()] * bmt.world_size(), alone=True)


@on_ranks(2, 3)
def test_ranks_have_different_numbers_of_rows() -> None:
    _gradients([5, 2, 4][: bmt.world_size()], alone=False)
    _gradients([0, 5, 1][: bmt.world_size()], alone=False)


@on_ranks(2)
def test_integers_and_what_has_no_gradient() -> None:
    mine = torch.arange(3) + 3 * bmt.rank()
    mine = mine.to(context().device.torch_device)
    assert bmt.gather_batch(mine).tolist() == [0, 1, 2, 3, 4, 5]
    assert not bmt.gather_batch(mine.float()).requires_grad


@on_ranks(2)
def test_rows_that_do_not_fit_are_refused() -> None:
    device = context().device.torch_device
    for given in (torch.zeros((), device=device), torch.zeros(2, 3 + bmt.rank(), device=device)):
        with pytest.raises(ConfigurationError, match="a row for each sample"):
            bmt.gather_batch(given)
