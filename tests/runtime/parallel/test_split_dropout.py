"""Dropout beside tensor parallelism: masks of split activations are each rank's own, those of whole ones alike."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bmtrain as bmt
from bmtrain.errors import ConfigurationError
from bmtrain.objects import allgather_objects

on_ranks = functools.partial(ranks.on_ranks, drawn_on_cpu=False)  # what a device's generator gives is what is tested

WIDTH, INNER, ROWS = 16, 64, 8
PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}


class Seen(nn.Identity):
    """Keeps what goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[torch.Tensor] = []

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def keep(self, x: torch.Tensor) -> None:
        self.values.append(x.detach().to("cpu", copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.keep(x)
        return x


def attended(h: torch.Tensor) -> torch.Tensor:
    """Sums over few keys, of which dropout leaves some."""
    return F.scaled_dot_product_attention(h[None], h[None], torch.ones_like(h)[None], dropout_p=0.5)[0]


class Doubled(torch.autograd.Function):
    """Leaves torch's functions."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.cpu().numpy() * 2).to(x.device)

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


@functools.cache
def compiled_function(drops: bool) -> Any:
    return torch.compile(lambda x: F.dropout(x * 2, 0.5 if drops else 0.0), backend="aot_eager")


def filled(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape, device=x.device)
    out[:] = x
    return out


DROPS: dict[str, Any] = {
    "module": lambda self, h: self.drop(h),
    "function": lambda self, h: F.dropout(h, 0.5, self.training),
    "attention": lambda self, h: attended(h),
    "bernoulli": lambda self, h: h * torch.empty_like(h).bernoulli_(0.5),
    "rand_like": lambda self, h: h * (torch.rand_like(h) < 0.5),
    "in place": lambda self, h: F.dropout(h.clone(), 0.5, True, True),
    "alpha": lambda self, h: F.alpha_dropout(h, 0.5, self.training),
    "in parts": lambda self, h: torch.cat([self.drop(part) for part in h.chunk(2, -1)], -1),
    "filled": lambda self, h: self.drop(filled(h)),
    "a function of its own": lambda self, h: self.drop(Doubled.apply(h)),
    "scripted": lambda self, h: self.drop(scripted(h)),
    "compiled before": lambda self, h: self.drop(compiled_function(False)(h)),
    "compiled": lambda self, h: compiled_function(True)(h),
    "checkpointed": lambda self, h: checkpoint(self.drop, h, use_reentrant=False),
}
"""Of a split activation."""


class Layer(nn.Module):
    def __init__(self, kind: str = "module", torchs: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.Dropout(0.5)
        self.split, self.whole, self.before = Seen(), Seen(), Seen()
        self.kind, self.torchs = kind, torchs
        with torch.no_grad():  # each rank's slice is the same
            self.up.weight.fill_(0.1)
            self.up.bias.fill_(1.0)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.before(self.drop(torch.ones_like(x) + 0 * x)) * 0 + 1)
        h = self.split(DROPS[self.kind](self, h))
        out: torch.Tensor = x + self.whole(self.drop(self.down(h) * 0 + 1 + 0 * x))
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.torchs else self.inner(x)


class Model(nn.Module):
    def __init__(self, make: Any = Layer, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(**options) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def split(make: Any = Layer, recompute: bool | None = False, plan: Any = None, **options: Any) -> Any:
    torch.manual_seed(3)
    model = bmt.parallelize_module(Model(make, **options), plan or PLAN)
    if recompute is not None:
        model.layers = bmt.TransformerBlockList([bmt.Block(m, use_checkpoint=recompute) for m in model.layers])
    return bmt.BMTrainModelWrapper(model)


def masks(model: Any, steps: int = 2) -> dict[str, list[torch.Tensor]]:
    """What each layer let through, in turn; a second run is like the first."""
    found: dict[str, list[torch.Tensor]] = {}
    torch.manual_seed(11)
    for _ in range(steps):
        model(torch.ones(ROWS, WIDTH, requires_grad=True)).sum().backward()
        for number, layer in enumerate(model.layers):
            for name in ("before", "split", "whole"):
                first, *again = getattr(layer, name).values
                assert all(torch.equal(first, other) for other in again), (name, number)
                found.setdefault(name, []).append(first)
                getattr(layer, name).values.clear()
    return found


def assert_drawn_right(found: dict[str, list[torch.Tensor]]) -> None:
    """Masks of split activations have nothing to do with each other; whole ones are one on tensor-parallel ranks."""
    everyone, pair = allgather_objects(found), bmt.rank() // 2
    for name, own in found.items():
        assert len(own) > 2 and all(agreement(one, other) < 0.75 for one, other in pairwise(own))
        for rank, theirs in enumerate(everyone):
            same = rank == bmt.rank() or (name != "split" and rank // 2 == pair)
            for one, other in zip(own, theirs[name], strict=True):
                assert torch.equal(one, other) if same else agreement(one, other) < 0.75, (name, rank)
    after = torch.rand(3)
    assert all(torch.equal(after, theirs) for theirs in allgather_objects(after))


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one == other).double().mean())


@on_ranks(2, init={"tp_size": 2})
@pytest.mark.parametrize("kind", DROPS)
def test_split_activations_have_masks_of_their_own(kind: str) -> None:
    for recompute in (False, True):
        assert_drawn_right(masks(split(kind=kind, recompute=recompute)))


@on_ranks(4, init={"tp_size": 2})
def test_beside_data_parallel_ranks() -> None:
    for recompute in (True, False):
        assert_drawn_right(masks(split(recompute=recompute)))


@on_ranks(2, init={"tp_size": 2})
def test_a_second_run_draws_the_same() -> None:
    plain = masks(split(kind="attention"))
    for options in ({"recompute": True}, {"recompute": None}, {"recompute": None, "torchs": True}):
        found = masks(split(kind="attention", **options))
        assert_drawn_right(found)
        for name, values in plain.items():
            assert all(map(torch.equal, found[name], values)), (name, options)
    hooked = split(recompute=True)
    hooked.layers[0].register_forward_hook(lambda *_: None)
    assert_drawn_right(masks(hooked))


@on_ranks(2, init={"tp_size": 2})
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled(recompute: bool) -> None:
    torch._dynamo.reset()
    model = split(recompute=recompute)
    bmt.compile(model, backend="aot_eager")
    assert_drawn_right(masks(model, 3))


class Short(Layer):
    """A second run of it ends where activations are split."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.split(self.drop(self.up(x) * 0 + 1)))
        return out


@on_ranks(2, init={"tp_size": 2})
def test_a_second_run_that_ends_early() -> None:
    for options in ({"recompute": True}, {"recompute": None, "torchs": True}):
        model = split(Short, **options)
        for _ in range(2):
            model(torch.ones(ROWS, WIDTH, requires_grad=True)).sum().backward()
            after = torch.rand(3)
            assert all(torch.equal(after, theirs) for theirs in allgather_objects(after))


# ---- what cannot be told
# ------------------------------------------------------------------------------------------------------------------


class Adapted(Layer):
    """As adapters do: what is whole is dropped behind a layer of which each rank has columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.down(h + self.drop(x.detach()).sum(-1, keepdim=True))


class Late(Layer):
    """Drops what is split when something else has been joined."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        y = self.down(F.gelu(h))
        return x + y + self.down(self.drop(h))


class Noise(Layer):
    """Numbers that are made of nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return x + self.down(h * torch.rand(ROWS, 1))


class Moved(Layer):
    """Numbers of the CPU's generator, wherever the model is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return x + self.down(h * torch.rand(ROWS, INNER // 2, device="cpu").to(h.device))


WRONG = {
    Adapted: "dropout draws .* between",
    Late: "dropout draws .* outside",
    Noise: "rand draws .* between",
    Moved: "rand draws .* between",
}


@on_ranks(2, init={"tp_size": 2})
@pytest.mark.parametrize("compiled", [False, True])
def test_what_draws_from_the_wrong_stream_is_refused(compiled: bool) -> None:
    for make, message in WRONG.items():
        model = split(make)
        if compiled:
            torch._dynamo.reset()
            bmt.compile(model, backend="aot_eager")
        model.eval()(torch.ones(ROWS, WIDTH)) if make not in (Noise, Moved) else None
        with pytest.raises(ConfigurationError, match=message):
            model.train()(torch.ones(ROWS, WIDTH))
        after = torch.rand(3)
        assert all(torch.equal(after, theirs) for theirs in allgather_objects(after))


@on_ranks(2, init={"tp_size": 2})
def test_a_probability_that_grows_is_found() -> None:
    model = split(Adapted)
    for layer in model.layers:
        layer.drop.p = 0.0
    for _ in range(2):
        model(torch.ones(ROWS, WIDTH)).sum().backward()
    model.layers[1].drop.p = 0.1
    with pytest.raises(ConfigurationError, match="dropout draws"):
        model(torch.ones(ROWS, WIDTH))


class Parts(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        bmt.parallelize_module(self, {"layer.up": "colwise", "layer.down": "rowwise"})

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


@on_ranks(2, init={"tp_size": 2})
def test_a_part_called_by_itself_is_refused() -> None:
    model = Parts()
    model.eval()
    model.layer(torch.ones(ROWS, WIDTH))
    model.train()
    with pytest.raises(ConfigurationError, match="Call the whole model"):
        model.layer(torch.ones(ROWS, WIDTH))
    model(torch.ones(ROWS, WIDTH))


class Sampled(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = bmt.nn.VPEmbedding(INNER, WIDTH, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> Any:
        return self.embedding(self.embedding(x, projection=True).argmax(-1))


@on_ranks(2, init={"tp_size": 2})
def test_numbers_between_parts_called_by_themselves_are_the_scripts() -> None:
    model: Any = Sampled()
    bmt.init_parameters(model)
    for _ in range(2):
        x = model.embedding(torch.randint(INNER, (ROWS,)))
        model.embedding(x, projection=True)


class Logits(bmt.DistributedModule):
    """What it gives stays split."""

    def __init__(self) -> None:
        super().__init__()
        self.head = bmt.nn.ColumnParallelLinear(WIDTH, INNER, gather_input=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(x)


@on_ranks(2, init={"tp_size": 2})
def test_behind_the_forward_all_draw_alike() -> None:
    model: Any = Logits()
    bmt.init_parameters(model)
    for _ in range(2):
        model(torch.ones(ROWS, WIDTH))
        after = torch.rand(3)
        assert all(torch.equal(after, theirs) for theirs in allgather_objects(after))


@on_ranks(2, init={"tp_size": 2, "random": "shared"})
def test_where_all_are_to_draw_alike_they_do() -> None:
    found = masks(split())
    for theirs in allgather_objects(found):
        assert all(map(torch.equal, found["split"], theirs["split"]))
