"""Ranks that start apart: rank 0's model is everybody's, and another model is refused."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import models
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.alike import digest
from bmtrain.context import context
from bmtrain.errors import BMTrainError, ConfigurationError, RankDivergenceError

Make = Callable[[models.Names], Any]
SHARDED = models.sharded()


def net(names: models.Names, layers: int = 3, width: int = 6, frozen: bool = True) -> Any:
    """Blocks in a stack, nested modules, tied and frozen parameters, buffers of several kinds, and a single value."""

    class Layer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
            self.norm = nn.BatchNorm1d(width)
            self.register_buffer("noise", torch.randn(width), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x + self.inner(x) + self.noise)  # type: ignore[no-any-return]

    class Net(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(width, width, bias=False)
            self.layers = names.stack([Layer() for _ in range(layers)])
            self.head = nn.Linear(width, width)
            self.head.weight = self.embed.weight
            self.scale = names.Parameter(torch.randn(()))
            self.low = names.Parameter(torch.randn(3, 5).bfloat16())
            self.head.bias.requires_grad_(not frozen)
            self.register_buffer("order", torch.randperm(7))
            self.register_buffer("mask", torch.rand(9) > 0.5)
            self.register_buffer("wave", torch.randn(4, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers[0](self.embed(x))) * self.scale  # type: ignore[no-any-return]

    return Net()


def wrapped(names: models.Names) -> Any:
    plain = net(models.plain())
    return bmt.BMTrainModelWrapper(plain) if names is SHARDED else plain


def block_alone(names: models.Names) -> Any:
    return names.block(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)))


def blocks_then_root(names: models.Names) -> Any:
    first, second = block_alone(names), block_alone(names)
    whole = nn.Sequential(first, second, nn.Linear(6, 3))
    return bmt.BMTrainModelWrapper(whole) if names is SHARDED else whole


MAKE: dict[str, Make] = {
    "distributed": net, "wrapped": wrapped, "block": block_alone, "blocks, then root": blocks_then_root,
}  # fmt: skip


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """This rank's collectives that compare values or send them, by name.

    Reductions are not counted: with them a GPU looks for memory that no rank uses any more.
    """
    ctx = context()
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        for communicator, name in itertools.product((ctx.control, ctx.world), ("all_gather", "broadcast")):
            stack.enter_context(mock.patch.object(communicator, name, _counting(calls, communicator, name)))
        yield calls


def _counting(calls: list[str], communicator: Any, name: str) -> Callable[..., None]:
    original = getattr(communicator, name)

    def call(*args: Any) -> None:
        calls.append(name)
        original(*args)

    return call


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """What is said inside about values of ranks."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if "rank 0" in str(w.message)]


def assert_is(model: nn.Module, plain: nn.Module) -> None:
    """Parameters and buffers, those of no state dict too, are equal bit for bit."""
    found, expected = model.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    for key, value in [*expected.items(), *plain.named_buffers()]:
        ours = found[key] if key in found else model.get_buffer(key)
        assert ours.dtype == value.dtype and digest(ours) == digest(value), key


@pytest.mark.parametrize("kind", list(MAKE))
@on_ranks(2, 3)
def test_rank_0s_values_are_used(kind: str) -> None:
    torch.manual_seed(20)
    plain = MAKE[kind](models.plain())
    torch.manual_seed(20 + bmt.rank())
    with warned() as said:
        model = MAKE[kind](SHARDED)
    assert_is(model, plain)
    if bmt.rank():
        assert not said
    else:
        assert said and all("0.weight" in text or "embed" in text or "2.weight" in text for text in said), said
        assert len(said) == (3 if kind == "blocks, then root" else 1)


@pytest.mark.parametrize("kind", list(MAKE))
@on_ranks(1, 2, 3)
def test_equal_starts_cost_one_exchange(kind: str) -> None:
    torch.manual_seed(20)
    with warned() as said, counted() as calls:
        model = MAKE[kind](SHARDED)
    sharded = {"distributed": 1, "wrapped": 1, "block": 1, "blocks, then root": 3}[kind]
    assert calls == ["all_gather"] * (sharded if bmt.world_size() > 1 else 0)
    assert not said
    torch.manual_seed(20)
    assert_is(model, MAKE[kind](models.plain()))


@on_ranks(2, 3)
def test_a_single_bit_is_seen_and_nothing_else_is_sent() -> None:
    for bits in (1, 0x7FC00001):  # the least denormal, and a NaN that differs from others in its bits alone
        torch.manual_seed(20)
        plain = net(models.plain())
        values = plain.layers[1].inner[2].weight.detach()
        values[3, 4] = float("nan") if bits > 1 else 0.0
        other = copied(plain)
        if bmt.rank() == bmt.world_size() - 1:
            other.layers[1].inner[2].weight.detach().view(torch.int32)[3, 4] = bits
        with counted() as calls:
            model = bmt.BMTrainModelWrapper(other)
        assert calls == ["all_gather", "all_gather", "broadcast"]
        assert_is(model, plain)


def copied(model: nn.Module) -> Any:
    made = net(models.plain())
    made.load_state_dict(model.state_dict())
    for name, buffer in model.named_buffers():
        made.get_buffer(name).copy_(buffer)
    return made


def test_the_digest_sees_places_and_signs() -> None:
    x = torch.arange(200_000, dtype=torch.float32)
    seen = {int(digest(x)), int(digest(x.flip(0))), int(digest(x.view(400, 500).t())), int(digest(torch.zeros(3)))}
    swapped = x.clone()
    swapped[[1, 199_999]] = swapped[[199_999, 1]]
    seen |= {int(digest(swapped)), int(digest(torch.tensor([0.0, -0.0, 0.0]))), int(digest(x.double()))}
    assert len(seen) == 7
    assert digest(x) == digest(x.clone()) and digest(x.view(400, 500).t()) == digest(x.view(400, 500).t().contiguous())
    for dtype in (torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.complex64, torch.complex128):
        assert digest(torch.ones(5, dtype=dtype)) == digest(torch.ones(5, dtype=dtype)) != 0
        assert digest(torch.ones(0, dtype=dtype)) == 0


@pytest.mark.parametrize("tied", [False, True])
@on_ranks(2, 3)
def test_models_built_on_the_meta_device(tied: bool) -> None:
    def build() -> Any:
        class Net(bmt.DistributedModule):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(7, 6)
                self.layers = bmt.TransformerBlockList(
                    [bmt.Block(nn.Sequential(nn.Linear(6, 6), nn.Tanh())) for _ in range(3)]
                )
                self.head = nn.Linear(6, 7, bias=False)
                if tied:
                    self.head.weight = self.embed.weight

        with torch.device("meta"):
            return Net()

    torch.manual_seed(5)
    with counted() as calls, warned() as said:
        wanted = build().state_dict()
    assert calls.count("broadcast") == 0 and not said
    torch.manual_seed(5 + bmt.rank())
    with warned() as said:
        found = build().state_dict()
    assert len(said) == (bmt.rank() == 0)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


@on_ranks(2)
def test_what_trained_stays_as_it_is_when_more_is_added() -> None:
    torch.manual_seed(20)
    model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model[1].running_mean += bmt.rank()
    torch.manual_seed(20 + bmt.rank())
    model.add_module("2", nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with warned() as said:
        bmt.BMTrainModelWrapper(model)
    assert model[1].running_mean.eq(bmt.rank()).all()
    assert len(said) == (bmt.rank() == 0)
    torch.manual_seed(20)
    assert torch.equal(model.state_dict()["2.0.weight"], nn.Linear(4, 3).weight)


@on_ranks(2)
def test_values_that_are_initialised_later_may_differ_before() -> None:
    late = bmt.DistributedParameter(torch.full((3,), float(bmt.rank())), init_method=nn.init.ones_)
    module = nn.Module()
    module.register_parameter("late", late)
    with warned() as said:
        bmt.BMTrainModelWrapper(module)
    assert not said
    assert not late.gather().any()
    bmt.init_parameters(module)
    assert late.gather().eq(1).all()


@on_ranks(1, 2, 3, drawn_on_cpu=False)
def test_values_written_later_are_rank_0s_too() -> None:
    class Late(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = bmt.DistributedParameter(torch.zeros(5, 3), init_method=nn.init.normal_)
            self.second = bmt.DistributedParameter(torch.zeros(4), init_method=nn.init.normal_)

    device = context().device.torch_device
    torch.manual_seed(20)
    first, second = torch.randn(5, 3, device=device), torch.randn(4, device=device)
    model = Late()
    for apart in (0, 1):
        torch.manual_seed(20 + apart * bmt.rank())
        with warned() as said, counted() as calls:
            bmt.init_parameters(model)
        assert bool(said) == bool(apart and not bmt.rank() and bmt.world_size() > 1), said
        assert ("broadcast" in calls) == bool(apart and bmt.world_size() > 1)
        assert torch.equal(model.first.gather(), first) and torch.equal(model.second.gather(), second)
    with warned() as said, bmt.gathered(model, write=True), torch.no_grad():
        model.second.copy_(torch.full((4,), 7.0 + bmt.rank()))
    assert model.second.gather().eq(7).all() and torch.equal(model.first.gather(), first)
    assert bool(said) == (bmt.rank() == 0 and bmt.world_size() > 1)


# ---- other models on other ranks
# -------------------------------------------------------------------------------------------------------------------


def refused(kind: str) -> tuple[str, str]:
    other = bmt.rank() == 1
    start = time.monotonic()
    try:
        if kind == "renamed":
            module = nn.Module()
            module.register_parameter("gain" if other else "scale", nn.Parameter(torch.ones(3)))
            bmt.BMTrainModelWrapper(module)
        elif kind == "none":
            bmt.BMTrainModelWrapper(nn.LayerNorm(3, elementwise_affine=not other))
        elif kind == "meta":
            with torch.device("meta" if other else "cpu"):
                net(SHARDED)
        elif kind == "dtype":
            bmt.BMTrainModelWrapper(nn.Linear(3, 3, dtype=torch.float64 if other else torch.float32))
        else:
            changed: dict[str, Any] = {"layers": 4, "width": 7, "frozen": False}
            net(SHARDED, **({kind: changed[kind]} if other else {}))
    except BMTrainError as error:
        assert time.monotonic() - start < 10
        return type(error).__name__, str(error)
    return "", "no error"


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("renamed", "scale"), ("none", "weight"), ("layers", "layers.3"), ("width", "(7, 7)"), ("frozen", "head.bias"),
        ("dtype", "float64"), ("meta", "meta device"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("world_size", [2, 3])
def test_another_model_on_one_rank_is_an_error_on_all(world_size: int, kind: str, named: str) -> None:
    for error, text in run_ranks(world_size, refused, kind, timeout=40):
        assert error == ConfigurationError.__name__ and named in text and "rank 1 " in text, (error, text)


def parted(kind: str) -> tuple[str, str]:
    start = time.monotonic()
    model = bmt.BMTrainModelWrapper(nn.Linear(3, 3))
    try:
        if bmt.rank() == 0:
            bmt.BMTrainModelWrapper(nn.Bilinear(3, 3, 3))
        elif kind == "other class":
            bmt.BMTrainModelWrapper(nn.Linear(3, 4))
        elif kind == "forward":
            model(torch.ones(2, 3))
    except BMTrainError as error:
        assert time.monotonic() - start < 20
        return type(error).__name__, str(error)
    return "", "no error"


@pytest.mark.parametrize("kind", ["other class", "forward", "nothing"])
def test_a_model_built_on_some_ranks_only_is_named(kind: str) -> None:
    said = run_ranks(2, parted, kind, timeout=40, fresh=True, init={"timeout": timedelta(seconds=4)})
    assert said[0][0] == RankDivergenceError.__name__ and "the sharding of Bilinear" in said[0][1], said
    if kind != "nothing":
        assert said[1][0] == RankDivergenceError.__name__ and "the sharding of Bilinear" in said[1][1], said
