"""Inspection: every number against the same statistic of the tensor that one process would hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import run_ranks

import bmtrain as bmt
from bmtrain.errors import RankDivergenceError, ShardedAccessError
from bmtrain.inspect.moments import Moments

WIDTH = 5


class Inner(torch.nn.Module):
    def __init__(self, record: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.record = record

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.linear(x))
        if self.record:
            bmt.inspect.record_tensor(x, "hidden", group="blocks")
        return x


def fill(model: Any) -> Any:
    model.layers = torch.nn.ModuleList(Inner(index != 1) for index in range(3))
    model.scale = torch.nn.Parameter(torch.ones(1))
    model.unused = torch.nn.Parameter(torch.arange(7.0))
    return model


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        fill(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        out = x * self.scale
        bmt.inspect.record_tensor(out.detach(), "out")
        return out


class Sharded(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        fill(self)
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(layer) for layer in self.layers])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layers(x) * self.scale
        bmt.inspect.record_tensor(out.detach(), "out")
        return out


def batch(world: int) -> torch.Tensor:
    return torch.randn(world, 4, WIDTH, generator=torch.Generator().manual_seed(3))


def statistics(x: torch.Tensor) -> dict[str, float]:
    x = x.detach().double()
    return {"mean": float(x.mean()), "std": float(x.std(correction=1)), "max": float(x.max()), "min": float(x.min())}


def inspect_on_ranks() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Sharded()
    manager = bmt.optim.OptimManager(loss_scale=None)
    before = bmt.inspect.inspect_model(model, "*")
    with bmt.inspect.inspect_tensor() as inspector:
        loss = model(batch(bmt.world_size())[bmt.rank()]).square().sum()
        manager.backward(loss)
    hidden = inspector.get_tensor("hidden", group="blocks", index=1)
    assert hidden is not None
    return {
        "before": before,
        "after": bmt.inspect.inspect_model(model, "model.layers.*.weight", prefix="model."),
        "summary": inspector.get_summary(),
        "hidden": hidden.detach(),
        "none": inspector.get_tensor("hidden", group="blocks", index=2),
        "first": inspector.get_tensor("hidden", group="blocks") is inspector.summary[0]["tensor"],
        "out": inspector.get_tensor("out") is inspector.summary[-1]["tensor"],
    }


@pytest.mark.parametrize("world", [1, 2])
def test_against_one_process(world: int) -> None:
    torch.manual_seed(0)
    model = Plain()
    hidden: list[torch.Tensor] = []
    x = batch(world).flatten(0, 1)
    for layer in model.layers:
        x = layer(x)
        hidden.append(x)
    for tensor in hidden:
        tensor.retain_grad()
    out = x * model.scale
    (out.square().sum() / world).backward()

    results = run_ranks(world, inspect_on_ranks)
    result = results[0]
    assert all(str(other["summary"]) == str(result["summary"]) for other in results)

    parameters = dict(model.named_parameters())
    assert [entry["name"] for entry in result["before"]] == list(parameters)
    for entry in result["before"]:
        assert entry["shape"] == tuple(parameters[entry["name"]].shape)
        assert entry["grad_mean"] == 0.0 and entry["grad_std"] == 0.0
    matching = [name for name in parameters if name.startswith("layers.") and name.endswith("weight")]
    assert [entry["name"] for entry in result["after"]] == [f"model.{name}" for name in matching]
    for name, entry in zip(matching, result["after"], strict=True):
        compare(entry, parameters[name], parameters[name].grad)

    assert [entry["name"] for entry in result["summary"]] == ["blocks.0.hidden", "blocks.1.hidden", "out"]
    for entry, tensor in zip(result["summary"], (hidden[0], hidden[2], out), strict=True):
        assert entry["shape"] == tuple(tensor.shape)
        # A rank's own loss is not divided by the number of ranks until its gradients reach a parameter.
        grad = None if tensor is out else tensor.grad
        compare(entry, tensor, grad)
    torch.testing.assert_close(torch.cat([other["hidden"] for other in results]), hidden[2].detach())
    assert result["none"] is None and result["first"] and result["out"]


def compare(entry: dict[str, Any], tensor: torch.Tensor, grad: torch.Tensor | None) -> None:
    for key, value in statistics(tensor).items():
        assert entry[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    if grad is None:
        assert entry["grad_mean"] is None and entry["grad_std"] is None
        return
    assert entry["grad_mean"] == pytest.approx(statistics(grad)["mean"], rel=1e-4, abs=1e-6)
    assert entry["grad_std"] == pytest.approx(statistics(grad)["std"], rel=1e-4, abs=1e-6)


def misuse() -> list[str]:
    bmt.inspect.record_tensor(torch.zeros(3), "outside")
    with pytest.raises(ShardedAccessError, match="inspect_model"):
        bmt.inspect.record_tensor(torch.nn.Parameter(torch.zeros(3)), "weight")
    with bmt.inspect.inspect_tensor() as outer:
        bmt.inspect.record_tensor(torch.tensor(2.0), "scalar")
        with bmt.inspect.inspect_tensor() as inner:
            bmt.inspect.record_tensor(torch.zeros(3, 2), "x")
        for _ in range(bmt.rank()):
            bmt.inspect.record_tensor(torch.zeros(3), "uneven")
    assert [entry["shape"] for entry in inner.get_summary()] == [(6, 2)]
    with pytest.raises(RankDivergenceError, match=r"\[1, 2\]"):
        outer.get_summary()
    return [entry["name"] for entry in outer.summary]


def test_misuse_nesting_and_divergence() -> None:
    assert run_ranks(2, misuse) == [["scalar"], ["scalar", "uneven"]]


def test_moments_put_together() -> None:
    whole = torch.randn(50, dtype=torch.float64) * 3 + 1000
    parts = [whole[:1], whole[1:30], whole[30:30], whole[30:]]
    together = Moments.together([Moments.of(part) for part in parts])
    for key, value in statistics(whole).items():
        assert getattr(together, key) == pytest.approx(value, rel=1e-12)
    assert math.isnan(Moments.of(whole[:1]).std) and Moments.of(None).count == 0


def test_format_summary_lines_up() -> None:
    entries = [
        {"name": "a", "shape": (2, 3), "max": 1.0, "min": -1.0, "std": 0.5, "mean": 0.0},
        {"name": "a.long.name", "shape": (), "max": 10.0, "min": -1.0, "std": 0.5, "mean": 0.25, "grad_std": 1.5},
    ]
    head, first, second = bmt.inspect.format_summary(entries).splitlines()
    assert head.split() == ["name", "shape", "max", "min", "std", "mean", "grad_std", "grad_mean"]
    assert first.split() == ["a", "(2,", "3)", "1.0000", "-1.0000", "0.5000", "0.0000", "None", "None"]
    assert second.index("10.0000") == head.index("max") and second.index("1.5000") == head.index("grad_std")
    assert bmt.inspect.format_summary([]).split()[0] == "name"
