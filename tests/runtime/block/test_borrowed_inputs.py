"""Blocks whose inputs are views of parameters, which their gather buffer does not hold until the backward."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import Tensor, nn

import bmtrain as bmt


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x) + shift)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Part(), Part()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.second(self.first(x, shift), shift)


class Latents(nn.Module):
    """Learned queries are the first layer's input; part of a learned table is an input of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, 8))
        self.table = nn.Parameter(torch.randn(9, 8))
        self.layers = nn.ModuleList([Layer() for _ in range(4)])
        self.head = nn.Linear(8, 3)

    def forward(self, batch: int) -> Tensor:
        x = self.latents.expand(batch, 5, 8)
        for layer in self.layers:
            x = layer(x, self.table[2:7])
        return self.head(x)


@pytest.mark.parametrize("nested", [False, True])
@on_ranks(1, 2)
def test_views_of_parameters_as_inputs(nested: bool) -> None:
    torch.manual_seed(1)
    plain = Latents()
    copied = copy.deepcopy(plain)
    for layer in copied.layers:
        if nested:
            layer.second = bmt.Block(layer.second)
        bmt.Block(layer)
    model = bmt.BMTrainModelWrapper(copied)
    manager = bmt.optim.OptimManager()
    for _ in range(2):  # the second run is prefetched along the first
        plain.zero_grad()
        for parameter in model.parameters():
            parameter.grad = None
        plain(3).square().mean().backward()
        manager.backward(model(3).square().mean())
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            gradient = bmt.gather_grad(q)
            assert p.grad is not None and gradient is not None
            assert torch.allclose(p.grad, gradient, atol=1e-7), name


class Prompt(nn.Module):
    """Learned tokens, once for each sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, batch: int) -> Tensor:
        return torch.broadcast_to(self.tokens, (batch, 5, 8)).reshape(batch * 5, 8)


class Repeated(nn.Module):
    """Views of parameters where the batch is one, and copies elsewhere, in the ways that ``kind`` names."""

    def __init__(self, kind: str, recompute: bool) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Parameter(torch.randn(1, 5, 8))
        self.prompt = bmt.Block(Prompt()) if kind == "returned by a block" else None
        self.layer = bmt.Block(Part(), use_checkpoint=recompute)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        if self.prompt is not None:
            table = self.prompt(batch)
        elif self.kind == "reshaped":
            table = self.table.expand(batch, 5, 8).reshape(batch * 5, 8)
        else:
            table = self.table.expand(batch, 5, 8).contiguous().view(-1, 8)
        if self.kind == "first input":
            return self.head(self.layer(table, x.flatten(0, 1)))
        if self.kind == "by name":
            return self.head(self.layer(x.flatten(0, 1), shift=table))
        if self.kind == "outside of blocks":
            return self.head(self.layer(x.flatten(0, 1), x.flatten(0, 1)) * table)
        if self.kind == "twice":
            return self.head(self.layer(table, table) * x.flatten(0, 1))
        return self.head(self.layer(x.flatten(0, 1) * table, table))


KINDS = ["reshaped", "contiguous", "first input", "by name", "twice", "returned by a block", "outside of blocks"]


def with_a_batch_of_one(kind: str, recompute: bool) -> dict[str, Tensor]:
    """Weights after steps on three items, of which rank 0 has two and the last rank one."""
    torch.manual_seed(1)
    model = bmt.BMTrainModelWrapper(Repeated(kind, recompute))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for step in range(3):
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(step))
        share = x.tensor_split(bmt.world_size())[bmt.rank()] if step else x
        manager.zero_grad()
        manager.backward(model(share).square().sum() / 9 * bmt.world_size() / (1 if step else bmt.world_size()))
        manager.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_with_a_batch_of_one_sees_views_of_parameters(kind: str, recompute: bool) -> None:
    (expected,) = run_ranks(1, with_a_batch_of_one, kind, recompute)
    for got in run_ranks(2, with_a_batch_of_one, kind, recompute):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


class Mixes(nn.Module):
    """One operation on what a block was lent, what it has itself and what it has computed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.own = kind, nn.Parameter(torch.randn(8))
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor, lent: Tensor, more: Tensor) -> Tensor:
        made = torch.tanh(self.lin(x))
        if self.kind == "with what it has":
            return x + made * 0.1 + (lent * self.own).sum() * 0.01
        if self.kind == "two lent":
            return x + made + lent * more
        if self.kind == "of three":
            return x + torch.addcmul(made, lent, self.own.expand_as(lent))
        if self.kind == "as weights":
            return x + torch.nn.functional.layer_norm(made, (8,), lent[0], self.own)
        if self.kind == "as a matrix":
            return x + made * (lent.T @ made).sum() * 0.01
        if self.kind == "attention":
            scores = lent[: len(x), : len(x)] if len(x) <= 8 else lent[0, 0]
            heads = (x[None, None], made[None, None], (made * self.own)[None, None])
            return x + torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=scores)[0, 0]
        if self.kind == "lerp":
            return torch.lerp(made, x, torch.sigmoid(lent))
        return x + made * lent  # with what it has computed


MIXED = ["with what it has computed", "with what it has", "two lent", "of three", "as weights", "as a matrix"]
MIXED += ["attention", "lerp"]


class Lends(nn.Module):
    """Blocks that come in another order each time get views of a root's parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(1, 8))
        self.table = nn.Parameter(torch.randn(8, 8))
        self.layers = nn.ModuleList([Mixes(kind) for _ in range(4)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        for at in order:
            lent = self.table.T if x.shape == (8, 8) else self.gate.expand_as(x)
            x = self.layers[at](x, lent, self.gate.expand_as(x))
        return self.head(x)


ORDERS = [[0, 1, 2, 3], [0, 1, 2, 3], [3, 1], [0, 2, 1, 3], [0, 1, 2, 3], [2, 2, 0, 3], [0, 1, 2, 3], [1, 0]]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", MIXED)
@on_ranks(2, init={"schedule": "stress"})
def test_what_a_node_is_given_is_there_until_it_has_run(kind: str, recompute: bool) -> None:
    """Whatever is gathered for the rest of it, and ahead of its time."""
    torch.manual_seed(1)
    plain = Lends(kind)
    copied = copy.deepcopy(plain)
    for layer in copied.layers:
        bmt.Block(layer, use_checkpoint=recompute)
    model = bmt.BMTrainModelWrapper(copied)
    manager = bmt.optim.OptimManager()
    for step, order in enumerate(ORDERS):
        plain.zero_grad()
        model.zero_grad()
        x = torch.randn(8 if step % 3 else 5, 8)
        plain(x, order).square().mean().backward()
        manager.backward(model(x, order).square().mean())
        for (name, p), q in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            gradient = bmt.gather_grad(q[1])
            if p.grad is None:
                assert gradient is None or not gradient.any(), name
            else:
                assert gradient is not None
                torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5)


class LendsTable(nn.Module):
    """Blocks that are lent a view, and nothing that they could fill."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8) * 0.1)
        self.layers = nn.ModuleList([bmt.Block(Mixes("as a matrix"), use_checkpoint=True) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.table.T, x)
        return x


@on_ranks(2)
def test_a_lent_view_is_no_object_that_a_block_may_fill() -> None:
    """What moves in it is the library's own, on each rank at another time: some ranks would not recompute the block."""
    model = bmt.BMTrainModelWrapper(LendsTable())
    looked_into: list[object] = []
    with mock.patch("bmtrain.block.repeat._all_inside", lambda objects: looked_into.extend(objects) or []):
        model(torch.randn(8, 8)).square().mean().backward()
    assert not looked_into
