"""Adapters and enclosing code that use a sharded model's parts directly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn

import bmtrain as bmt

WIDTH, WORDS = 6, 9


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def merge(self) -> None:
        with torch.no_grad():
            self.base.weight.add_(self.up.weight @ self.down.weight * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 0.5  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList([Lora(nn.Linear(WIDTH, WIDTH)) for _ in range(2)])
        self.first, self.bias = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.zeros(WORDS))

    def features(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(tokens), -1, -1), self.words(tokens)], 1)
        for layer in self.layers:
            x = x + torch.tanh(layer.forward(x))
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))  # type: ignore[no-any-return]


class Around(nn.Module):
    """Plain code around a converted model."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        net = self.net
        more = net.layers[1].down.weight.T.norm() + net.layers[0].base.bias.to(torch.float64).float().mean()
        return net(tokens) + net.bias.clone() + net.layers[0].base.weight.sum() + more  # type: ignore[no-any-return]


class Saved(nn.Module):
    """As peft's modules_to_save: the original frozen, a copy of it trained."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original, self.copies = original, nn.ModuleDict({"default": copy.deepcopy(original)})
        self.original.requires_grad_(False)
        self.copies.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.copies["default"](x)  # type: ignore[no-any-return]


def tokens() -> Tensor:
    return torch.randint(WORDS, (4, 3), generator=torch.Generator().manual_seed(1))


def gathered_head(net: Any) -> Tensor:
    weight = net.head.weight
    whole = weight.gather() if isinstance(weight, bmt.DistributedParameter) else weight
    return whole @ torch.ones(WIDTH) + net(tokens())  # type: ignore[no-any-return]


def under_autocast(net: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        square = net.head.weight.pow(2).sum()
        assert square.dtype == torch.float32, "only what autocast casts is gathered cast"
        return net(tokens()).float() + square + net.layers[0].base.weight.T.norm()  # type: ignore[no-any-return]


USES: dict[str, Callable[[Any], Tensor]] = {
    "features": lambda net: net.features(tokens()),
    "head by hand": lambda net: net.features(tokens()) @ net.head.weight.T + net.bias,
    "tied by hand": lambda net: F.linear(net.features(tokens()), net.words.weight, net.bias),
    "one adapter": lambda net: net.layers[0].forward(torch.ones(2, WIDTH)),
    "around": lambda net: Around(net)(tokens()),
    "gathered": gathered_head,
    "autocast": under_autocast,
}


def make(blocks: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = Net()
    torch.manual_seed(0)
    model = Net()
    if blocks:
        model.layers = nn.ModuleList([bmt.Block(layer, use_checkpoint=True) for layer in model.layers])
    return plain, bmt.BMTrainModelWrapper(model)


@pytest.mark.parametrize("blocks", [False, True])
@on_ranks(1, 2)
def test_parts_used_directly(blocks: bool) -> None:
    plain, model = make(blocks)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for name, use in USES.items():
        plain.zero_grad()
        manager.zero_grad()
        use(plain).square().mean().backward()  # type: ignore[no-untyped-call]
        manager.backward(use(model).square().mean())
        oracle.assert_same_grads(model, plain, limit=2e-2 if name == "autocast" else oracle.LIMIT)
    for m in (plain, model):
        for layer in m.layers:
            layer.merge()
    oracle.assert_same_weights(model, plain)


@pytest.mark.parametrize("blocks", [False, True])
@on_ranks(1, 2)
def test_a_copy_of_a_part_is_trained_in_its_place(blocks: bool) -> None:
    plain, model = make(blocks)
    for m in (plain, model):
        m.head = Saved(m.head)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (plain, model)]
    sgd = torch.optim.SGD(trained[0], lr=0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(trained[1], lr=0.1))
    for _ in range(3):
        sgd.zero_grad()
        manager.zero_grad()
        plain(tokens()).square().mean().backward()
        manager.backward(model(tokens()).square().mean())
        oracle.assert_same_grads(model, plain)
        sgd.step()
        manager.step()
    oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_what_was_put_in_later_moves_along() -> None:
    net = bmt.BMTrainModelWrapper(nn.Sequential(bmt.CheckpointBlock(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH)))
    device = next(net.parameters()).device
    net[0].later = nn.Parameter(torch.ones(WIDTH, device="cpu"))
    net[1].later = nn.Linear(WIDTH, WIDTH)
    net.to(device).double()
    assert {(p.dtype, p.device.type) for p in net.parameters()} == {(torch.float64, device.type)}
    assert net[0].later.is_leaf and net[0].later.requires_grad
