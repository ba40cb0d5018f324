"""What a backward needs, changed in place since its forward: an error, as torch's, and never another gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
from oracle import WIDTH
from ranks import on_ranks, run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import bmtrain as bmt
from bmtrain.errors import ConfigurationError, InPlaceError

Layers = Callable[[nn.Module, nn.Module, Tensor], Tensor]


def added(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    z: Tensor = a(x).exp()
    z += 1
    return b(z)  # type: ignore[no-any-return]


def operand(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = a(x)
    z = y * y
    y.add_(1)
    return b(z)  # type: ignore[no-any-return]


def one_row(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = F.softmax(a(x), -1)
    y[0] = 0
    return b(y)  # type: ignore[no-any-return]


def through_a_view(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = a(x).sigmoid()
    y.view(-1)[:3].zero_()
    return b(y)  # type: ignore[no-any-return]


def relu_of_what_is_needed(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = a(x).tanh()
    return b(F.relu(y, inplace=True))  # type: ignore[no-any-return]


def allowed(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = a(x)
    y += 1
    return b(F.relu(y, inplace=True)).sigmoid_()  # type: ignore[no-any-return]


def a_copy(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = a(x).exp()
    z = y.clone()
    z[:, 0] = 0
    return b(y) + z  # type: ignore[no-any-return]


def detached(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = a(x)
    with torch.no_grad():
        y.detach().clone().add_(1)
    return b(y.tanh())  # type: ignore[no-any-return]


WRONG: list[Layers] = [added, operand, one_row, through_a_view, relu_of_what_is_needed]
RIGHT: list[Layers] = [allowed, a_copy, detached]


class Two(nn.Module):
    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers, self.a, self.b = layers, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.a, self.b, x)


def build(inner: nn.Module, how: str) -> Any:
    """``how``: plain, or as one whole, or with ``inner`` as a block that is kept or run again."""
    torch.manual_seed(3)
    for layer in inner.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    first = nn.Linear(WIDTH, WIDTH)
    if how == "plain":
        return nn.Sequential(first, inner)
    return bmt.BMTrainModelWrapper(
        nn.Sequential(first, inner if how == "whole" else bmt.Block(inner, use_checkpoint=how == "again"))
    )


def batch(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def share(x: Tensor) -> Tensor:
    return x.chunk(bmt.world_size())[bmt.rank()]


HOW = ["whole", "kept", "again"]
WORLDS = [(1, None), (2, None), (2, "stress")]


def changed_after_use(layers: Layers, how: str) -> None:
    model, plain = build(Two(layers), how), build(Two(layers), "plain")
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(4):
        loss, theirs = model(share(batch(step))).square().mean(), plain(batch(step)).square().mean()
        if layers in WRONG:
            with pytest.raises(RuntimeError, match="inplace"):
                theirs.backward()
            with pytest.raises(RuntimeError, match=r"in place|inplace"):
                manager.backward(loss)
            return
        theirs.backward()
        manager.backward(loss)
        sgd.step()
        manager.step()
        sgd.zero_grad()
        manager.zero_grad()
    for ours, value in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours.cpu(), value.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layers", [*RIGHT, *WRONG])
@pytest.mark.parametrize(("world_size", "schedule"), WORLDS)
def test_tensors(world_size: int, schedule: str | None, layers: Layers, how: str) -> None:
    run_ranks(world_size, changed_after_use, layers, how, init={"schedule": schedule} if schedule else {})


Between = Callable[[Any, Any], None]


def steps(model: Any, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def loads(model: Any, optimizer: Any) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def multiplies(model: Any, optimizer: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def fills(model: Any, optimizer: Any) -> None:
    nn.init.ones_(next(iter(model.parameters())))
    nn.init.ones_([p for p in model.parameters() if p.dim() == 2][-1])


def reads(model: Any, optimizer: Any) -> None:
    assert all(bool(p.isfinite().all()) for p in model.parameters()) and model.state_dict()


def through_data(model: Any, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def between_forward_and_backward(between: Between, how: str, ours: bool) -> None:
    model, plain = (
        build(nn.Sequential(nn.Linear(WIDTH, WIDTH)), how),
        build(nn.Sequential(nn.Linear(WIDTH, WIDTH)), "plain"),
    )
    make = bmt.optim.AdamOptimizer if ours else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=0.1)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.1)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    for step in range(4 if how == "again" else 1):  # a block's first runs are compared
        manager.backward(model(share(batch(step))).square().mean())
        manager.step()
        manager.zero_grad()
    loss, expected = model(share(batch(9)).requires_grad_()).mean(), plain(batch(9).requires_grad_()).mean()
    between(model, optimizer if between is not steps else ManagerAsOptimizer(manager))
    between(plain, theirs)
    if between in (reads, through_data):
        expected.backward()
        if how != "again" or between is reads:
            manager.backward(loss)
        return
    with pytest.raises(RuntimeError, match="inplace"):
        expected.backward()
    with pytest.raises((InPlaceError, RuntimeError, ConfigurationError), match=r"in place since|inplace|other values"):
        manager.backward(loss)


class ManagerAsOptimizer:
    def __init__(self, manager: Any) -> None:
        self.step, self.zero_grad = manager.step, manager.zero_grad


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("between", "ours"),  # where no optimizer does anything, one kind is enough
    [(steps, True), *((between, False) for between in (reads, through_data, steps, loads, multiplies, fills))],
)
@pytest.mark.parametrize(("world_size", "schedule"), WORLDS)
def test_parameters(world_size: int, schedule: str | None, between: Between, how: str, ours: bool) -> None:
    run_ranks(
        world_size, between_forward_and_backward, between, how, ours, init={"schedule": schedule} if schedule else {}
    )


def two_optimizers(schedule: str | None) -> None:
    """A step on other parameters, as of a GAN's other half in one model, is none on these."""
    model = bmt.BMTrainModelWrapper(nn.ModuleDict({"g": nn.Linear(WIDTH, WIDTH), "d": nn.Linear(WIDTH, WIDTH)}))
    manager = bmt.optim.OptimManager(loss_scale=None)
    for kind, name in ((torch.optim.AdamW, "g"), (bmt.optim.AdamOptimizer, "d")):
        manager.add_optimizer(kind(model[name].parameters(), lr=0.1))
    for step in range(3):
        made = model["g"](batch(step))
        first = model["d"](made.detach()).square().mean()
        second = made.tanh().square().mean()
        manager.backward(first)
        manager.optimizers[1].step()
        manager.backward(second)
        manager.step()
        manager.zero_grad()


@pytest.mark.parametrize(("world_size", "schedule"), WORLDS)
def test_steps_on_other_parameters(world_size: int, schedule: str | None) -> None:
    run_ranks(world_size, two_optimizers, schedule, init={"schedule": schedule} if schedule else {})


@on_ranks(1, 2)
@pytest.mark.parametrize("recompute", [True, False])
def test_a_step_on_biases_alone_before_a_backward(recompute: bool) -> None:
    """No backward of torch's needs the values of these; a recomputed block does."""
    reference, model = oracle.pair(
        lambda names: names.stack([nn.Linear(oracle.WIDTH, oracle.WIDTH) for _ in range(2)]), recompute=recompute
    )
    for net in (reference, model):
        optimizer = torch.optim.SGD([layer.bias for layer in net], lr=0.1)
        manager = bmt.optim.OptimManager()
        x = oracle.inputs(0)
        if net is model:
            x = models.share(x)
            manager.add_optimizer(optimizer)
        first, second = (oracle.mean(net[1](net[0](x))) for _ in range(2))
        first.backward()
        (manager if net is model else optimizer).step()
        if net is model and recompute:
            with pytest.raises(InPlaceError, match=r"bias.*use_checkpoint=False\) it does not"):
                second.backward()
            return
        second.backward()
    oracle.assert_same_grads(model, reference)
