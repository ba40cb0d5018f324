"""TorchScript inside recomputed blocks: its executor profiles the first calls and runs the later ones otherwise."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import models
import oracle
import torch
from oracle import WIDTH
from ranks import on_ranks
from torch import Tensor, nn

import bmtrain as bmt

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


def fresh_norm() -> Any:
    """One that has never run: its first calls decide how it runs later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)

        @torch.jit.script  # type: ignore[untyped-decorator]
        def norm(hidden: Tensor, weight: Tensor) -> Tensor:
            variance = hidden.to(torch.float32).pow(2).mean(dim=-1, keepdim=True)
            return hidden * torch.rsqrt(variance + 1e-6) * weight

    return norm


def sandwiched(first: bool, between: bool, last: bool) -> Any:
    """Norms by one script in blocks, and before, between and after them."""

    def build(names: models.Names) -> Any:
        norm = fresh_norm()

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

            def forward(self, x: Tensor) -> Tensor:
                return x + self.lin(norm(x, self.weight))  # type: ignore[no-any-return]

        class Model(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.weights = norm, nn.ParameterList(torch.ones(WIDTH) for _ in range(3))
                self.layers = names.stack([Block() for _ in range(3)])

            def forward(self, x: Tensor) -> Tensor:
                x = norm(x * self.weights[0], self.weights[0]) if first else x
                for index, layer in enumerate(self.layers):
                    x = layer(x)
                    x = norm(x, self.weights[1]) if between and index == 0 else x
                return norm(x, self.weights[2]) if last else x  # type: ignore[no-any-return]

        return Model()

    return build


@on_ranks(1, 2)
def test_a_script_that_blocks_share_with_the_model_around_them() -> None:
    """It is optimized at its second call outside of blocks, which may come between a block's two runs."""
    for places in ((0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)):
        oracle.matches(sandwiched(*map(bool, places)), steps=4, recompute=True)
    assert torch._C._get_graph_executor_optimize()


@on_ranks(1, 2)
def test_a_script_that_blocks_share_with_code_outside_of_the_model() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        return oracle.mean(model.norm(model(x), torch.full((WIDTH,), 2.0)))

    oracle.matches(sandwiched(False, False, False), run=run, steps=4, recompute=True)
    assert torch._C._get_graph_executor_optimize()


@on_ranks(1, 2)
def test_scripts_are_optimized_again_after_a_backward_of_another_thread() -> None:
    """As every backward on a GPU ends in one of autograd's."""
    model = oracle.pair(build, recompute=True)[1]
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        thread = threading.Thread(target=oracle.mean(model(oracle.inputs(step))).backward)
        thread.start()
        thread.join()
        manager.step()
        assert torch._C._get_graph_executor_optimize()
        manager.zero_grad()


@on_ranks(1, 2)
def test_another_forward_between_a_blocks_two_runs() -> None:
    def twice(model: Any, x: Tensor) -> Tensor:
        return oracle.mean(model(x)) + oracle.mean(model(x * 2))

    oracle.matches(sandwiched(True, False, False), run=twice, steps=3, recompute=True)
