"""Views of a block's parameters that outlive its forward: given on, kept, or held by autograd's own code."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import bmtrain as bmt
from bmtrain.block.record import unit_of


class Scaled(torch.autograd.Function):
    """A function that keeps what it was given on its context, unknown to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x, ctx.weight = x, weight
        return x * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return g * ctx.weight, (g * ctx.x).sum(0)


class Turned(torch.autograd.Function):
    """The same with a view of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.turned = weight.t()
        return x @ ctx.turned

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g @ ctx.turned.t(), g.t() @ x


class Given(dict[str, Tensor]):
    """A container that is no leaf, and none of torch's."""


GIVES: dict[str, Callable[[Layer, Tensor, list[Any]], Any]] = {
    "nothing": lambda self, x, box: x,
    "the parameter": lambda self, x, box: (x, self.scale),
    "a view": lambda self, x, box: (x, self.scale.view(1, 8)),
    "expanded": lambda self, x, box: [x, self.scale.expand_as(x)],
    "a transpose": lambda self, x, box: {"x": x, "lent": self.matrix.T},
    "a column": lambda self, x, box: (x, {"lent": self.matrix.T[0]}),
    "an object": lambda self, x, box: (x, Given(lent=self.scale.expand_as(x))),
    "a closure": lambda self, x, box: (x, partial(torch.mul, self.scale.view(1, 8))),
    "a view alone": lambda self, x, box: self.matrix.T,
    "expanded alone": lambda self, x, box: self.scale.expand_as(x),
    "an attribute": lambda self, x, box: _kept(self, x, self.scale.view(1, 8)),
    "an attribute, expanded": lambda self, x, box: _kept(self, x, self.scale.expand_as(x)),
    "a box": lambda self, x, box: (box.append(self.scale.view(1, 8)), x)[1],
    "a context": lambda self, x, box: Scaled.apply(x, self.scale),
    "a context, a view": lambda self, x, box: Turned.apply(x, self.matrix),
    "a hook": lambda self, x, box: _hooked(x, self.scale.detach().view(1, 8)),
}
"""What a layer gives or leaves behind, by name."""
READ_AFTER: dict[str, Callable[[nn.ModuleList, int, Tensor], Tensor]] = {
    "its own": lambda layers, at, x: layers[at].scale.expand_as(x),
    "its own, a column": lambda layers, at, x: layers[at].matrix.T[0],
    "another's": lambda layers, at, x: layers[2 * at % len(layers)].scale.view(1, 8),
    "one that comes": lambda layers, at, x: layers[(at + 1) % len(layers)].scale.view(1, 8),
}
"""What the enclosing forward reads once a layer has run."""


def _kept(layer: Layer, x: Tensor, view: Tensor) -> Tensor:
    layer.last = view
    return x


def _hooked(x: Tensor, view: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: g * view)  # type: ignore[no-untyped-call]
    return x


class Layer(nn.Module):
    """Gives or leaves behind something of its parameters."""

    last: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.randn(8) * 0.5 + 1)
        self.matrix = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor, lent: Tensor | None, box: list[Any]) -> Any:
        if lent is not None:
            x = x * lent if lent.shape != (8, 8) else x @ lent
        return GIVES.get(self.kind, GIVES["nothing"])(self, x + torch.tanh(self.lin(x)), box)


class Stack(nn.Module):
    """Lends what a layer gave to the next, and uses all of it again at the end."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([Layer(kind) for _ in range(5)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        lent: Any = None
        box: list[Any] = []
        for at, layer in enumerate(self.layers):
            out = layer(x, lent if isinstance(lent, Tensor) else None, box)
            if self.kind.endswith("alone"):
                x = x @ out if out.shape == (8, 8) else x + out
                box.append(out[0])
                continue
            x, lent = out.values() if isinstance(out, dict) else (out, None) if isinstance(out, Tensor) else out
            if isinstance(lent, dict):
                lent = lent["lent"]
            if self.kind.startswith("an attribute"):
                lent = layer.last
            if self.kind in READ_AFTER:
                lent = READ_AFTER[self.kind](self.layers, at, x)
            if lent is not None:
                box.append(lent)
        for one in box:
            lent = one if isinstance(one, Tensor) else one(torch.ones_like(x))
            x = 0.5 * x + 0.5 * (x @ lent if lent.shape == (8, 8) else x * lent)
        return self.head(x)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [*GIVES, *READ_AFTER])
@on_ranks(2, init={"schedule": "stress"})
def test_views_that_outlive_a_forward(kind: str, recompute: bool) -> None:
    """They hold what they held, though memory is used again; in evaluation, too."""
    torch.manual_seed(1)
    plain = Stack(kind)
    copied = copy.deepcopy(plain)
    for layer in copied.layers:
        bmt.Block(layer, use_checkpoint=recompute)
    trains_alike(plain, bmt.BMTrainModelWrapper(copied))


class LeavesGarbage(nn.Module):
    """Its forward leaves a frame behind that holds itself, as every exception that is kept does."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer("nothing") for _ in range(layers)])
        self.gate = nn.Parameter(torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate.expand_as(x)
        for layer in self.layers:
            x = layer(x, gate, [])
        try:
            raise ValueError
        except ValueError as error:
            kept = error  # noqa: F841
        if bmt.is_initialized() and bmt.rank():
            gc.collect()
        return x * gate


class Looping(nn.Module):
    """A loop over layers whose methods run, not their forwards."""

    def __init__(self, pause: float = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer("nothing") for _ in range(5)])
        self.pause = pause

    def forward(self, x: Tensor) -> Tensor:
        views, first = [], self.layers[0].scale.expand_as(x)
        for at, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            views.append(layer.scale.view(1, 8))
            x = x + torch.tanh(layer.lin(x)) * first * self.layers[max(0, at - 2)].scale
        for view in views:
            x = 0.5 * x + 0.5 * x * view
        time.sleep(self.pause)
        return x


def trains_alike(plain: nn.Module, model: nn.Module, steps: int = 3) -> None:
    manager, optimizer = bmt.optim.OptimManager(), torch.optim.SGD(model.parameters(), lr=0.01)
    manager.add_optimizer(optimizer)
    for _ in range(steps):
        x = torch.randn(5, 8)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        expected, got = plain(x).square().mean(), model(x).square().mean()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        plain.zero_grad()
        manager.zero_grad()
        expected.backward()
        manager.backward(got)
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            gradient = bmt.gather_grad(q)
            if p.grad is None:
                assert gradient is None or not gradient.any(), name
            else:
                assert gradient is not None, name
                torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for p in plain.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
        manager.step()


@pytest.mark.parametrize("as_list", [False, True])
@on_ranks(2, init={"schedule": "stress"})
def test_views_taken_in_a_loop(as_list: bool) -> None:
    """They outlive its turn."""
    torch.manual_seed(1)
    plain = Looping()
    copied = copy.deepcopy(plain)
    blocks = [bmt.Block(layer, use_checkpoint=False) for layer in copied.layers]
    if as_list:
        copied.layers = bmt.TransformerBlockList(blocks)
    trains_alike(plain, bmt.BMTrainModelWrapper(copied))


@on_ranks(2, init={"schedule": "stress"})
def test_garbage_holds_nothing() -> None:
    """Each rank collects it in its own time."""
    torch.manual_seed(1)
    plain = LeavesGarbage(4)
    copied = copy.deepcopy(plain)
    for layer in copied.layers:
        bmt.Block(layer, use_checkpoint=False)
    gc.collect()
    gc.disable()
    try:
        model = bmt.BMTrainModelWrapper(copied)
        trains_alike(plain, model, 6)
        assert not unit_of(copied).was_seen  # type: ignore[union-attr]
    finally:
        gc.enable()


@on_ranks(2, init={"schedule": "stress"})
def test_a_thread_that_looks_at_frames_holds_nothing() -> None:
    """As the watchdog does, which finds out where a rank is: the views in them are held for a moment, on that rank."""
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            frames = sys._current_frames()
            time.sleep(0.01)
            del frames

    watcher = threading.Thread(target=look)
    if bmt.rank() == 0:
        watcher.start()
    try:
        torch.manual_seed(1)
        plain = Looping(pause=0.01)
        copied = copy.deepcopy(plain)
        for layer in copied.layers:
            bmt.Block(layer, use_checkpoint=False)
        model = bmt.BMTrainModelWrapper(copied)
        trains_alike(plain, model, 10)
        assert not any(unit_of(layer).was_seen for layer in copied.layers)  # type: ignore[union-attr]
    finally:
        over.set()
        if bmt.rank() == 0:
            watcher.join()


@on_ranks(2, init={"schedule": "stress"}, fresh=True)  # what is compiled holds its model
def test_nothing_is_held_for_what_holds_nothing() -> None:
    """A unit of which nobody has views is not kept, whatever autograd, autocast or a compiler save of it."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0) for _ in range(4)]
    layers[1].compile(backend="aot_eager")
    model = bmt.BMTrainModelWrapper(nn.Sequential(*[bmt.Block(layer, use_checkpoint=False) for layer in layers]))
    units = [unit for layer in layers if (unit := unit_of(layer)) is not None]
    assert len(units) == 4
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(torch.randn(2, 3, 8))
        assert not any(unit.is_seen for unit in units)
        bmt.optim.OptimManager().backward(out.float().square().mean())
        assert not any(unit.is_seen for unit in units)
