"""Linear layers whose weight gradients land in the reduction buffer, in eager and in compiled code.

Only GPUs use them of their own accord; what they do does not depend on the device.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block import linear
from bmtrain.errors import UnsupportedError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
        for _ in range(times):
            x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return x


def build() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(*[Layer() for _ in range(3)])


def data(world_size: int) -> torch.Tensor:
    return torch.randn(world_size, 5, 8, generator=torch.Generator().manual_seed(3))


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    found = bmt.gather_grad(parameter)
    assert found is not None
    return found


def landing_model(compiled: bool = False, recompute: bool = False) -> nn.Module:
    with mock.patch.object(linear, "_LARGE", 0):
        model = nn.Sequential(*[bmt.Block(layer, use_checkpoint=recompute) for layer in build()])
        bmt.BMTrainModelWrapper(model)
        linear.land_gradients(model)
    return bmt.compile(model, backend="aot_eager") if compiled else model


def landed(recompute: bool, compiled: bool, times: int, backwards: int) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and how many weights' gradients landed."""
    model = landing_model(compiled, recompute)
    manager = bmt.optim.OptimManager()
    x = data(bmt.world_size())[bmt.rank()]
    count = 0
    land = linear._land

    def counted(*args: object) -> None:
        nonlocal count
        count += 1
        land(*args)  # type: ignore[arg-type]

    with mock.patch.object(linear, "_land", counted):
        for _ in range(backwards):
            out = x
            for layer in model:
                out = layer(out, times)
            manager.backward(out.square().mean())
    return {name: gradient(p) for name, p in model.named_parameters()}, count


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("recompute", "times", "backwards"), [(False, 1, 1), (True, 2, 2), (False, 2, 1)])
def test_gradients_are_torchs(recompute: bool, times: int, backwards: int, compiled: bool) -> None:
    model, x = build(), data(2)
    for _ in range(backwards):
        out = x
        for layer in model:
            out = layer(out, times)
        out.square().mean().backward()
    for grads, count in run_ranks(2, landed, recompute, compiled, times, backwards, timeout=240):
        assert count == 6 * times * backwards
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6)


def asked_for(compiled: bool, recompute: bool) -> tuple[torch.Tensor, list[bool], list[torch.Tensor]]:
    """The gradient of an input, which parameters got one meanwhile, and gradients of parameters, asked for by name."""
    model = landing_model(compiled, recompute)
    x = data(2)[0].requires_grad_()
    (of_input,) = torch.autograd.grad(model(x).square().mean(), x)
    got = [bmt.gather_grad(p) is not None for p in model.parameters()]
    if compiled:
        return of_input, got, []
    with bmt.gathered(model):
        of_weights = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    return of_input, got, [g.clone() for g in of_weights]


@pytest.mark.parametrize(("compiled", "recompute"), [(False, False), (False, True), (True, False)])
def test_a_gradient_that_is_asked_for_is_not_added_to_others(compiled: bool, recompute: bool) -> None:
    model, x = build(), data(2)[0].requires_grad_()
    model(x).square().mean().backward()
    for of_input, got, of_weights in run_ranks(2, asked_for, compiled, recompute, timeout=240):
        torch.testing.assert_close(of_input, x.grad)
        assert not any(got)
        for found, parameter in zip(of_weights, model.parameters(), strict=not compiled):
            torch.testing.assert_close(found, parameter.grad)


def interrupted() -> dict[str, torch.Tensor]:
    """Gradients after a backward that failed half-way and was given up."""
    model, x = landing_model(), data(2)[0]
    failing = model(x).square().mean()
    model[1].register_full_backward_pre_hook(fail)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(KeyError):
        manager.backward(model(x).square().mean() + failing)
    manager.zero_grad()
    model[1]._backward_pre_hooks.clear()
    manager.backward(model(x).square().mean())
    return {name: gradient(p) for name, p in model.named_parameters()}


def fail(module: nn.Module, grad: object) -> None:
    raise KeyError("half-way")


def test_an_interrupted_backward_leaves_nothing_behind() -> None:
    model = build()
    model(data(2)[0]).square().mean().backward()
    for grads in run_ranks(2, interrupted):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6)


def penalised(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.norm(dim=-1) - 1).square().mean() + model(x).mean()


def penalty_gradients() -> dict[str, torch.Tensor]:
    model = landing_model()
    bmt.optim.OptimManager().backward(penalised(model, data(2)[0]))
    return {name: gradient(p) for name, p in model.named_parameters()}


def test_gradients_of_gradients_are_torchs() -> None:
    model = build()
    penalised(model, data(2)[0]).backward()
    for grads in run_ranks(2, penalty_gradients):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6)


def hooked(compile_first: bool) -> tuple[float, float]:
    with mock.patch.object(linear, "_LARGE", 0):
        model = bmt.Block(build()[0], use_checkpoint=False)
        bmt.BMTrainModelWrapper(model)
        linear.land_gradients(model)
    if compile_first:
        bmt.compile(model, backend="aot_eager")
    model.down.weight.register_hook(lambda grad: torch.zeros_like(grad))
    if not compile_first:
        bmt.compile(model, backend="aot_eager")
    loss = model(data(bmt.world_size())[bmt.rank()]).square().mean()
    if (
        compile_first and not torch._C._len_torch_function_stack()
    ):  # under a default device these layers are not compiled
        with pytest.raises(UnsupportedError, match="register it before compiling"):
            bmt.optim.OptimManager().backward(loss)
        return 0.0, 1.0
    bmt.optim.OptimManager().backward(loss)
    return float(gradient(model.down.weight).abs().sum()), float(gradient(model.up.weight).abs().sum())


@pytest.mark.parametrize("compile_first", [True, False])
def test_gradients_with_hooks_do_not_land(compile_first: bool) -> None:
    for down, up in run_ranks(2, hooked, compile_first):
        assert down == 0.0
        assert up > 0.0
