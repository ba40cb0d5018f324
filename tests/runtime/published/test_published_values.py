"""Parameters read away from the forward of their own module, as published scripts read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn

import bmtrain as bmt

WIDTH = 4


class Layer(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = bmt.DistributedParameter(torch.randn(WIDTH, WIDTH))
        self.bias = bmt.DistributedParameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.bias


class Head(bmt.DistributedModule):
    """Its own forward never runs: the model around it uses its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(WIDTH, WIDTH)
        self.scale = bmt.DistributedParameter(torch.tensor(0.5))


class Model(bmt.DistributedModule):
    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()) for _ in range(2)])
        self.head = bmt.CheckpointBlock(Head())
        self.temperature = bmt.DistributedParameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return USES[self.use](self, self.layers(x))


USES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "added": lambda m, x: x + m.head.decoder.bias,
    "added on the left": lambda m, x: m.head.decoder.bias + x,
    "in a function": lambda m, x: F.linear(x, m.head.decoder.weight, m.head.decoder.bias),
    "transposed": lambda m, x: x @ m.head.decoder.weight.t(),
    "its method": lambda m, x: m.head.decoder(x),
    "a scalar": lambda m, x: x * m.head.scale,
    "the root's": lambda m, x: x / m.temperature,
    "another block's": lambda m, x: F.linear(x, m.layers[0].weight),
    "indexed": lambda m, x: x + m.head.decoder.weight[0],
    "sliced": lambda m, x: x[:, :2] @ m.head.decoder.weight[:2],
    "summed": lambda m, x: x + m.head.decoder.weight.sum(0),
    "joined": lambda m, x: x @ torch.cat([m.head.decoder.weight, m.layers[1].weight]).t(),
    "gathered by hand": lambda m, x: x @ m.head.decoder.weight.gather(),
    "by its name": lambda m, x: x + dict(m.named_parameters())["head.decoder.bias"],
    "from the dictionary": lambda m, x: x + m.head.decoder._parameters["bias"],
    "in place": lambda m, x: x.clone().add_(m.head.decoder.bias),
    "a penalty": lambda m, x: x + sum((p * p).sum() for p in m.parameters()),
    "a norm": lambda m, x: x * m.head.decoder.weight.norm(),
    "detached": lambda m, x: x + m.head.decoder.bias.detach(),
    "cast": lambda m, x: x + m.head.decoder.bias.double().float(),
}


def reference(model: Any, use: str, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The loss and every gradient in plain torch, of the model's values."""
    from types import SimpleNamespace

    values = {n: v.to(x.device, copy=True).requires_grad_() for n, v in model.state_dict().items()}
    layers = [SimpleNamespace(weight=values[f"layers.{i}.weight"], bias=values[f"layers.{i}.bias"]) for i in range(2)]
    for v in values.values():
        v.gather = lambda v=v: v  # type: ignore[method-assign]

    class Linear(SimpleNamespace):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight, self.bias)

    decoder = Linear(weight=values["head.decoder.weight"], bias=values["head.decoder.bias"])
    decoder._parameters = {"weight": decoder.weight, "bias": decoder.bias}
    plain = SimpleNamespace(
        layers=layers, head=SimpleNamespace(decoder=decoder, scale=values["head.scale"]),
        temperature=values["temperature"], parameters=values.values, named_parameters=values.items,
    )  # fmt: skip
    for layer in layers:
        x = F.linear(x, layer.weight) + layer.bias
    loss = USES[use](plain, x).tanh().square().mean()
    loss.backward()
    return loss.detach(), {n: v.grad for n, v in values.items()}


@on_ranks(1, 2)
def test_in_an_enclosing_modules_forward() -> None:
    for use in USES:
        torch.manual_seed(1)
        model = Model(use)
        for _ in range(2):  # the second time everything is foreseen
            x = torch.randn(2 * bmt.world_size(), WIDTH)
            expected, grads = reference(model, use, x)
            loss = model(x[2 * bmt.rank() : 2 * bmt.rank() + 2]).tanh().square().mean()
            manager = bmt.optim.OptimManager()
            manager.backward(loss)
            assert bmt.sum_loss(loss).item() == pytest.approx(expected.item(), rel=1e-4), use
            for name, parameter in model.named_parameters():
                found, theirs = bmt.gather_grad(parameter), grads[name]
                if theirs is None:
                    assert found is None or not found.any(), (use, name)
                else:
                    assert found is not None and torch.allclose(found, theirs, rtol=1e-4, atol=1e-6), (use, name)
            model.zero_grad()


OUTSIDE: dict[str, Callable[[Any], Any]] = {
    "plus a number": lambda w: w + 1,
    "a number plus it": lambda w: 1 + w,
    "negated": lambda w: -w,
    "sum": lambda w: w.sum(),
    "mean over rows": lambda w: w.mean(dim=0),
    "norm": lambda w: w.norm(),
    "torch.norm": lambda w: torch.norm(w),
    "detached on the CPU": lambda w: w.detach().cpu(),
    "as float": lambda w: w.float(),
    "as half": lambda w: w.half(),
    "first row": lambda w: w[0],
    "one element": lambda w: w[1, 2],
    "a mask": lambda w: w[torch.arange(WIDTH) > 1],
    "compared with a number": lambda w: w > 0,
    "compared with itself": lambda w: w == w,
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, w]),
    "transposed": lambda w: w.t(),
    "T": lambda w: w.T,
    "view": lambda w: w.view(-1),
    "reshape": lambda w: w.reshape(2, -1),
    "matmul": lambda w: w @ w,
    "matmul from a tensor": lambda w: torch.ones(2, WIDTH) @ w,
    "clone": lambda w: w.clone(),
    "data plus a number": lambda w: w.data + 1,
    "unbind": lambda w: torch.stack(list(w)),
    "allclose": lambda w: torch.tensor(torch.allclose(w, w)),
    "max": lambda w: w.max(),
    "argmax": lambda w: w.argmax(dim=1),
    "topk": lambda w: w.topk(2).values,
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "svd": lambda w: torch.linalg.svdvals(w),
    "gather": lambda w: w.gather(),
    "gather_all": lambda w: w.gather_all(),
}


@on_ranks(1, 2)
def test_outside_of_any_forward() -> None:
    torch.manual_seed(2)
    model = Layer()
    whole = model.state_dict()["weight"].to(torch.get_default_device(), copy=True)
    for method in ("gather", "gather_all"):
        setattr(whole, method, lambda: whole)
    for name, read in OUTSIDE.items():
        expected, found = read(whole), read(model.weight)
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        assert torch.allclose(found.detach().float(), expected.detach().float(), atol=1e-6), name


@on_ranks(1, 2)
def test_a_loss_of_parameters_alone_trains_them() -> None:
    torch.manual_seed(3)
    model = Layer()
    plain = {n: v.clone().requires_grad_() for n, v in model.state_dict().items()}
    ours = (model.weight[1:] + 1).square().sum() + (model.weight @ model.bias).sum() + model.bias.gather().exp().sum()
    w, b = plain["weight"], plain["bias"]
    ((w[1:] + 1).square().sum() + (w @ b).sum() + b.exp().sum()).backward()
    ours.backward()
    for name, parameter in model.named_parameters():
        found = bmt.gather_grad(parameter)
        assert found is not None and torch.allclose(found, plain[name].grad, rtol=1e-5, atol=1e-6), name
