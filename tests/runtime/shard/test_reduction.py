"""What is lost when gradients travel in low precision, and what is not reduced at all."""

from __future__ import annotations

from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block.sharded import owned_units

SIZE = 20_000


class Weighted(nn.Module):
    """Its gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).sum()


def gradient_of(rank: int) -> torch.Tensor:
    """(SIZE,) bf16, of all sizes and signs, so that ranks cancel each other in part."""
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(SIZE, generator=generator) * 10 ** torch.empty(SIZE).uniform_(-3, 3, generator=generator)
    return values.bfloat16()


def errors(policy: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Largest and mean square error of a sum over ranks: ours, and that of fp32 sums rounded once to bf16."""
    model = bmt.BMTrainModelWrapper(Weighted())
    if policy:
        bmt.Block(model, precision="bf16")
    else:
        model.bfloat16()
    x = gradient_of(bmt.rank()).to(model.weight.device)
    model(x.float() if policy else x).float().backward()
    found = bmt.gather_grad(model.weight)
    assert found is not None
    total = gradient_of(bmt.rank()).float().to(found.device)
    total = bmt.distributed.all_reduce(total, "sum").bfloat16()
    exact = sum(gradient_of(rank).double() for rank in range(bmt.world_size()))
    return error((found * bmt.world_size()).bfloat16(), exact), error(total, exact)


def error(found: torch.Tensor, exact: Any) -> dict[str, float]:
    difference = found.double().cpu() - exact.cpu()
    return {"largest": float(difference.abs().max()), "mean square": float(difference.square().mean())}


def check_errors(world_size: int, policy: bool, device: str) -> None:
    for ours, rounded_once in run_ranks(world_size, errors, policy, init={"device": device}):
        assert rounded_once["largest"] > 0
        for name, value in ours.items():
            assert value <= rounded_once[name], (name, value, rounded_once)


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bf16_on_the_wire_loses_one_rounding(world_size: int, policy: bool) -> None:
    check_errors(world_size, policy, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_bf16_over_nccl_loses_one_rounding(world_size: int, policy: bool) -> None:
    if world_size > max(torch.cuda.device_count(), 2):  # over sockets more than two ranks round at every hop
        pytest.skip(f"needs {world_size} GPUs")
    check_errors(world_size, policy, "cuda")


# ---- what does not train
# ---------------------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen layer with two small trainable matrices beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(oracle.WIDTH, oracle.WIDTH)
        self.down = nn.Linear(oracle.WIDTH, 2, bias=False)
        self.up = nn.Linear(2, oracle.WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def adapters(names: models.Names) -> Any:
    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Linear(oracle.WIDTH, oracle.WIDTH)
            self.layers = names.stack([Adapted() for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.emb(x)
            for layer in self.layers:
                x = layer(x)
            return x

    return Model()


def freeze(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".up." in name or ".down." in name)


def frozen_adapters(names: models.Names) -> Any:
    """Frozen before they are sharded, in a converted script by a constructor."""

    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = adapters(names)
            freeze(self.inner)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    return Model()


@pytest.mark.parametrize("early", [True, False])
@on_ranks(1, 3, long=(2,))
def test_adapters_are_reduced_alone(early: bool) -> None:
    build, prepare = (frozen_adapters, lambda model: None) if early else (adapters, freeze)
    oracle.matches(build, prepare=prepare)
    _, model = oracle.pair(build)
    prepare(model)
    before = model.state_dict()
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    with torch.no_grad():
        model(oracle.inputs(0))  # an evaluation before, to see that it changes nothing
    for _ in range(2):
        manager.zero_grad()
        manager.backward(oracle.mean(model(oracle.inputs(0))))
        manager.step()
    flats = [flat for unit in owned_units(model) for flat in unit.flats]
    reduced = {id(p) for flat in flats if flat.gradient.present for p in flat.params}
    assert reduced == {id(p) for p in model.parameters() if p.requires_grad}
    for flat in flats:
        assert flat.trainable == (flat.gradient._came is not None), "a frozen parameter has no memory for a gradient"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (".up." in name or ".down." in name), name


@pytest.mark.parametrize("optimizer", ["ours", "adam", "adagrad"])
@on_ranks(1, 3)
def test_adapters_resume(optimizer: str) -> None:
    """States that were cut to shards before the first forward fit the shards of the first step."""

    def make() -> tuple[Any, Any, bmt.optim.OptimManager]:
        _, model = oracle.pair(adapters)
        freeze(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        made = {
            "ours": lambda: bmt.optim.AdamOptimizer(trained, lr=1e-2),
            "adam": lambda: torch.optim.AdamW(trained, lr=1e-2),
            "adagrad": lambda: torch.optim.Adagrad(trained, lr=1e-2),
        }[optimizer]()
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(made)
        return model, made, manager

    def run(model: Any, manager: bmt.optim.OptimManager, first: int, last: int) -> None:
        for step in range(first, last):
            manager.zero_grad()
            manager.backward(oracle.mean(model(models.share(oracle.inputs(step)))))
            manager.step()

    straight, _, manager = make()
    run(straight, manager, 0, 4)
    model, made, manager = make()
    run(model, manager, 0, 2)
    weights, state = model.state_dict(), made.state_dict()
    model, made, manager = make()
    model.load_state_dict(weights)
    made.load_state_dict(state)
    run(model, manager, 2, 4)
    oracle.assert_same_weights(model, straight)


def mixed(names: models.Names) -> Any:
    class Layer(nn.Module):
        """Parameters of four dtypes."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(oracle.WIDTH)
            self.low = nn.Linear(oracle.WIDTH, oracle.WIDTH).bfloat16()
            self.small = nn.Parameter(torch.linspace(0.5, 1, oracle.WIDTH, dtype=torch.float16))
            self.exact = nn.Parameter(torch.linspace(1, 2, oracle.WIDTH, dtype=torch.float64))
            self.table = nn.Parameter(torch.arange(oracle.WIDTH), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.low(self.norm(x).bfloat16()).float() * self.small.float()
            return x + (y.double() * self.exact).float()[:, self.table]

    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = names.stack([Layer() for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return Model()


@on_ranks(1, 3, long=(2,))
def test_one_block_may_mix_dtypes() -> None:
    # Low-precision parameters are the oracle's to a few roundings of theirs: its ranks are one batch.
    oracle.matches(mixed, limit=2e-2)
    _, model = oracle.pair(mixed)
    found = {p.dtype for p in model.parameters()}
    assert found == {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64}
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer([p for p in model.parameters() if p.dtype != torch.int64], lr=1e-2))
    losses = []
    for _ in range(10):
        manager.zero_grad()
        loss = oracle.mean(model(oracle.inputs(0)))
        manager.backward(loss)
        manager.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
