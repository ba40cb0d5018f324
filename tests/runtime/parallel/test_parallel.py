"""Layers: alone they are torch's; split over ranks they make the whole layer's results and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks

import bmtrain as bmt
from bmtrain import nn
from bmtrain.context import context
from bmtrain.errors import ConfigurationError
from bmtrain.parallel import parallel_linear
from bmtrain.parallel.embedding import vocab_parallel_embedding

ROWS, INPUTS, OUTPUTS, VOCABULARY = 4, 6, 8, 12
LAYERS = ["Linear", "ColumnParallelLinear", "RowParallelLinear"]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"x": (ROWS, 3, INPUTS), "weight": (OUTPUTS, INPUTS), "bias": (OUTPUTS,), "grad": (ROWS, 3, OUTPUTS)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def whole() -> dict[str, torch.Tensor]:
    values = tensors()
    inputs = [values[name].requires_grad_() for name in ("x", "weight", "bias")]
    y = F.linear(*inputs)
    grads = torch.autograd.grad(y, inputs, values["grad"])
    return {"y": y.detach(), **dict(zip(("x", "weight", "bias"), grads, strict=True))}


def part(value: torch.Tensor, dim: int | None) -> torch.Tensor:
    return value if dim is None else value.chunk(bmt.world_size(), dim)[bmt.rank()].clone()


def run(dims: dict[str, int | None], **options: Any) -> dict[str, torch.Tensor]:
    """One rank's share of a layer; ``dims`` says along which dimension each tensor is split (None: the same
    everywhere).
    """
    values = {name: part(value, dims[name]) for name, value in tensors().items()}
    inputs = [values[name].requires_grad_() for name in ("x", "weight", "bias")]
    y = parallel_linear(*inputs, context().world, **options)
    y.backward(values["grad"])
    return {"y": y.detach(), **{name: values[name].grad for name in ("x", "weight", "bias")}}  # type: ignore[dict-item]


CASES: list[tuple[dict[str, int | None], dict[str, Any]]] = [
    # columns: the input joined from rows or the same everywhere, the output joined or not
    ({"x": 0, "weight": 0, "bias": 0, "grad": 2}, {"gather_input": True}),
    ({"x": None, "weight": 0, "bias": 0, "grad": 2}, {}),
    ({"x": None, "weight": 0, "bias": 0, "grad": None}, {"gather_output": True}),
    # rows: the input split by features already or here, the output whole or split by rows
    ({"x": 2, "weight": 1, "bias": None, "grad": None}, {"reduce_type": "all_reduce"}),
    ({"x": 2, "weight": 1, "bias": None, "grad": 0}, {"reduce_type": "reduce_scatter"}),
    ({"x": None, "weight": 1, "bias": None, "grad": None}, {"split_input": True, "reduce_type": "all_reduce"}),
    ({"x": None, "weight": 1, "bias": None, "grad": 0}, {"split_input": True, "reduce_type": "reduce_scatter"}),
]


@pytest.mark.parametrize(("dims", "options"), CASES, ids=lambda value: str(value))
def test_split_layers_make_the_whole_one(dims: dict[str, int | None], options: dict[str, Any]) -> None:
    expected = whole()
    results = run_ranks(2, run, dims, **options)
    for name, dim in {**dims, "y": dims["grad"]}.items():
        if name == "grad":
            continue
        if dim is None:
            for result in results:
                torch.testing.assert_close(result[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
        else:
            torch.testing.assert_close(torch.cat([result[name] for result in results], dim), expected[name])


def embed() -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.arange(VOCABULARY * 2.0).view(VOCABULARY, 2)
    weight = part(table, 0).requires_grad_()
    tokens = torch.tensor([[0, 5, 6], [11, 5, 3]])
    y = vocab_parallel_embedding(tokens, weight, context().world)
    y.backward(torch.arange(12.0).view(2, 3, 2))
    assert weight.grad is not None
    return y.detach(), weight.grad


def test_split_embedding_makes_the_whole_one() -> None:
    table = torch.arange(VOCABULARY * 2.0).view(VOCABULARY, 2).requires_grad_()
    y = F.embedding(torch.tensor([[0, 5, 6], [11, 5, 3]]), table)
    (grad,) = torch.autograd.grad(y, table, torch.arange(12.0).view(2, 3, 2))
    results = run_ranks(3, embed)
    assert all(torch.equal(result[0], y) for result in results)
    assert torch.equal(torch.cat([result[1] for result in results]), grad)


def alone(name: str) -> dict[str, Any]:
    layer = getattr(nn, name)(INPUTS, OUTPUTS)
    bmt.init_parameters(layer)
    state = layer.state_dict()
    torch.manual_seed(0)
    expected = torch.nn.init.xavier_normal_(torch.empty(OUTPUTS, INPUTS))
    layer.load_state_dict(whole_state())
    values = tensors()
    x = values["x"].requires_grad_()
    y = layer(x)
    y.backward(values["grad"])
    grads = {name: bmt.gather_grad(parameter) for name, parameter in layer.named_parameters()}
    return {
        "initial": torch.equal(state["weight"], expected) and bool((state["bias"] == 0).all()),
        "y": y.detach(),
        "x": x.grad,
        **grads,
        "text": str(layer),
        "no bias": getattr(nn, name)(2, 3, bias=False, dtype=torch.float64)(torch.ones(1, 2).double()).dtype,
    }


def whole_state() -> dict[str, torch.Tensor]:
    values = tensors()
    return {"weight": values["weight"], "bias": values["bias"]}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("world", [1, 2])
def test_layers_without_tensor_parallelism(name: str, world: int) -> None:
    expected = whole()
    for result in run_ranks(world, alone, name):
        assert result["initial"] and result["no bias"] == torch.float64
        torch.testing.assert_close(result["y"], expected["y"])
        torch.testing.assert_close(result["x"], expected["x"])
        for parameter in ("weight", "bias"):
            torch.testing.assert_close(result[parameter], expected[parameter])
        assert "in_features=6" in result["text"] and f"{name}(" in result["text"]


def use_embedding() -> tuple[torch.Tensor, torch.Tensor, str, torch.Tensor]:
    layer = nn.VPEmbedding(VOCABULARY, INPUTS, dtype=torch.float32, init_std=0.5)
    bmt.init_parameters(layer)
    tokens = torch.tensor([[1, 11]])
    embedded = layer(tokens)
    return embedded.detach(), layer(embedded, projection=True).detach(), str(layer), layer.state_dict()["weight"]


def test_embedding_without_tensor_parallelism() -> None:
    for embedded, logits, text, weight in run_ranks(2, use_embedding):
        torch.manual_seed(0)
        assert torch.equal(weight, torch.nn.init.normal_(torch.empty(VOCABULARY, INPUTS), std=0.5))
        assert torch.equal(embedded, weight[torch.tensor([[1, 11]])])
        torch.testing.assert_close(logits, embedded @ weight.t())
        assert "12 of 12, 6" in text


@on_ranks(1)
def test_operators() -> None:
    values = whole_state()
    x = tensors()["x"]
    expected = F.linear(x, values["weight"], values["bias"])
    assert torch.equal(nn.OpLinear.apply(x, values["weight"], values["bias"]), expected)
    assert torch.equal(
        nn.OpParallelLinear.apply(x, values["weight"], values["bias"], True, True, False, None, 2), expected
    )
    with pytest.raises(ConfigurationError, match="reduce_type"):
        nn.OpParallelLinear.apply(x, values["weight"], None, False, False, False, "sum")  # type: ignore[arg-type]
