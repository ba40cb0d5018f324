"""Blocks that cannot be recomputed, because a second run finds something the first has left: an error that says so."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import bmtrain as bmt
from bmtrain.block.frame import _sums
from bmtrain.errors import ConfigurationError


class Remembering(nn.Module):
    """Computes its keys once, and takes them from the cache afterwards, as cross attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        if "key" not in cache:
            cache["key"] = torch.tanh(self.key(x))
        return self.query(x) * cache["key"]


class Model(bmt.DistributedModule):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.block = bmt.Block(Remembering(), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, _Cache()).sum()  # type: ignore[no-any-return]


class _Cache(dict[str, Tensor]):
    """Not a plain dict, which would be copied before the first run."""


@on_ranks(2)
def test_a_block_that_fills_a_cache_is_not_recomputed() -> None:
    x, gradients = torch.randn(2, 8), []
    for recompute in (True, False):
        torch.manual_seed(0)
        model = Model(use_checkpoint=recompute)
        model(x).backward()
        gradients.append(bmt.gather_grad(model.block.key.weight))
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)


_KEPT: dict[str, Tensor] = {}


class Hiding(Remembering):
    """Keeps its keys where nobody looks."""

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        return super().forward(x, _KEPT)


@on_ranks(2)
def test_a_block_that_fills_what_is_not_its_own_is_an_error() -> None:
    _KEPT.clear()
    loss = bmt.Block(Hiding(), use_checkpoint=True)(torch.randn(2, 8, requires_grad=True), {}).sum()
    with pytest.raises(ConfigurationError, match="use_cache=False"):
        loss.backward()


@on_ranks(2)
def test_lists_of_blocks_that_fill_caches() -> None:
    blocks = bmt.TransformerBlockList([Remembering(), Remembering()], use_checkpoint=False)
    blocks.append(Remembering())
    x = torch.randn(2, 8, requires_grad=True)
    for part in (blocks, blocks[1:]):
        y = x
        for block in part:
            y = block(y, _Cache())
        y.sum().backward()
    assert all(bmt.gather_grad(block.key.weight).abs().sum() > 0 for block in blocks)


class Growing(nn.Module):
    """Adds its keys to those of earlier calls, as self attention with a cache does, where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.tanh(self.key(x))
        _KEPT["key"] = torch.cat([_KEPT["key"], keys]) if "key" in _KEPT else keys
        return x + (torch.softmax(x @ _KEPT["key"].t(), dim=-1) @ _KEPT["key"])


@on_ranks(2)
def test_a_second_run_that_saves_as_many_tensors_of_other_shapes() -> None:
    _KEPT.clear()
    block = bmt.Block(Growing(), use_checkpoint=True)
    loss = block(torch.randn(2, 8, requires_grad=True)).sum()
    with pytest.raises(ConfigurationError, match="other shapes"):
        loss.backward()


class Slope(nn.Module):
    """Asks autograd for a gradient in its forward, as models of forces do."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(x).square().sum(), x, create_graph=True)
        return slope


@on_ranks(1, 2)
def test_a_backward_inside_a_recomputed_forward_is_named() -> None:
    x = torch.randn(2, 8)
    again = bmt.Block(Slope(), use_checkpoint=True)
    with pytest.raises(ConfigurationError, match=r"torch\.autograd\.grad.*use_checkpoint=False"):
        again(x).square().sum().backward()
    block = bmt.Block(Slope(), use_checkpoint=False)
    block(x).square().sum().backward()
    assert bmt.gather_grad(block.energy.weight).abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_what_is_saved_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    sums = _sums(torch.arange(6, device="cpu").to(dtype))
    assert sums.shape == (4,) and bool(sums.isfinite().all())
