"""TorchScript inside recomputed blocks: its executor profiles the first calls and runs the later ones otherwise."""

from __future__ import annotations

import warnings
from typing import Any

import models
import oracle
import torch
from oracle import WIDTH
from ranks import on_ranks
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script  # type: ignore[untyped-decorator]
    def bias_gelu(bias: Tensor, y: Tensor) -> Tensor:
        x = bias + y
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @torch.jit.script  # type: ignore[untyped-decorator]
    def rotated(x: Tensor, angle: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    @torch.jit.script  # type: ignore[untyped-decorator]
    def branching(x: Tensor, deep: bool) -> Tensor:
        for _ in range(3):
            x = torch.sigmoid(x) * x
            if deep:
                x = x + x.square()
        return x

    traced = torch.jit.trace(lambda x: torch.tanh(x) * x.exp(), torch.ones(2, WIDTH))  # type: ignore[no-untyped-call]


class ScriptLast(nn.Module):
    """What a script saves is the last that is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bias = nn.Linear(WIDTH, WIDTH, bias=False), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return bias_gelu(self.bias, self.lin(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), ScriptLast()
        self.angle = nn.Parameter(torch.rand(WIDTH // 2))

    def forward(self, x: Tensor) -> Tensor:
        y = rotated(self.last(self.norm(x)), self.angle)
        return x + branching(traced(y.tanh()), x.shape[0] > 2)  # type: ignore[no-any-return]


def build(names: models.Names) -> Any:
    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = names.stack([Layer(), ScriptLast(), Layer(), ScriptLast()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return Model()


@on_ranks(1, 2)
def test_scripts_in_recomputed_blocks() -> None:
    oracle.matches(build, steps=5)
    assert torch._C._get_graph_executor_optimize()
