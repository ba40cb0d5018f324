"""On one rank blocks that keep their activations are part of the code around them, and train as in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from fresh import PLENTY, fresh_graphs, fresh_plan, memory_of
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context

WIDTH, BLOCKS = 8, 3
Graphs = list[torch.fx.GraphModule]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.layers = nn.ModuleList([Layer() for _ in range(BLOCKS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.leave(x).square().mean()  # type: ignore[no-any-return]


def pair(recompute: bool | None, make: Callable[[], Net] = Net, **how: Any) -> tuple[Any, Any, Graphs]:
    """A plain model, the same with blocks and compiled, and what was compiled so far."""
    torch._dynamo.reset()
    engine: Any = context().engine
    engine.schedule.pools.moves = bmt.world_size() > 1  # not what other tests' models in this process did
    torch.manual_seed(2)
    plain = make()
    model: Any = copy.deepcopy(plain)
    model.layers = bmt.TransformerBlockList([bmt.Block(one, use_checkpoint=recompute, **how) for one in model.layers])
    graphs: Graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    bmt.compile(bmt.BMTrainModelWrapper(model), backend=backend)
    return plain.to(context().device.torch_device), model, graphs


def data(rows: int = 6) -> torch.Tensor:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return x.to(context().device.torch_device)


def step(plain: nn.Module, model: Any, rows: int = 6) -> None:
    """Both get the same gradients, and weights that stay alike."""
    x = data(rows)
    for net in (plain, model):
        net.zero_grad()
        loss = net(x)
        loss.backward()
    for (name, theirs), ours in zip(plain.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
            continue
        oracle.assert_close(bmt.gather_grad(ours), theirs.grad, name)
    with torch.no_grad():
        for net in (plain, model):
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-0.1)


def layers_in(graph: torch.fx.GraphModule) -> int:
    return sum(node.target is F.gelu for node in graph.graph.nodes)


@pytest.mark.parametrize("recompute", [True, None])
@on_ranks(1)
def test_blocks_that_are_recomputed_stay_apart(recompute: bool | None) -> None:
    fresh_plan(None)
    plain, model, graphs = pair(recompute)
    for _ in range(3):
        step(plain, model)
    assert max(map(layers_in, graphs)) == 1


@on_ranks(2)
def test_blocks_of_several_ranks_stay_apart() -> None:
    plain, model, graphs = pair(False)
    for _ in range(5):
        step(plain, model)
    assert max(map(layers_in, graphs)) == 1


@on_ranks(1)
def test_blocks_that_compute_in_another_dtype_stay_apart() -> None:
    fresh_plan(None)
    _, model, graphs = pair(False, precision=bmt.Precision(param=torch.bfloat16, output=torch.float32))
    for _ in range(3):
        model.zero_grad()
        model(data()).backward()
    assert max(map(layers_in, graphs)) == 1


@on_ranks(1, init={"schedule": "stress", "graphs": True})
def test_blocks_that_are_recorded_stay_apart() -> None:
    fresh_graphs(PLENTY, graphs=True)
    plain, model, graphs = pair(False)
    for _ in range(3):
        step(plain, model)
    assert max(map(layers_in, graphs)) == 1


@on_ranks(1)
def test_blocks_that_keep_their_activations_are_part_of_the_model() -> None:
    fresh_plan(None)
    plain, model, graphs = pair(False)
    for _ in range(4):
        step(plain, model)
    assert list(filter(None, map(layers_in, graphs))) == [1, BLOCKS], [*map(layers_in, graphs)]
    step(plain, model, rows=9)  # larger: their sizes are seen first, then they are variables of the code
    step(plain, model, rows=9)
    count = len(graphs)
    for rows in (9, 5, 7, 6):
        step(plain, model, rows)
    assert len(graphs) == count and layers_in(graphs[-1]) == BLOCKS, [*map(layers_in, graphs)]


@on_ranks(1)
def test_the_plan_for_memory_decides() -> None:
    plan = fresh_plan(PLENTY)
    plain, model, graphs = pair(None)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=0.0))
    for number in range(6):
        model.zero_grad()
        manager.backward(model(data()))
        manager.step()
        assert not any(layers_in(graph) == BLOCKS for graph in graphs) or number > 2
    assert not plan.measuring and layers_in(graphs[-1]) == BLOCKS
    step(plain, model)
    compiled = len(graphs)
    step(plain, model, rows=12)  # blocks are recomputed, as nobody knows what so much needs
    step(plain, model, rows=12)
    assert not any(layers_in(graph) == BLOCKS for graph in graphs[compiled:])
    step(plain, model)
    fresh_plan(None)


@on_ranks(1)
def test_where_memory_is_scarce_they_stay_apart() -> None:
    fresh_plan(memory_of(0))
    _, model, graphs = pair(None)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=0.0))
    for _ in range(5):
        manager.backward(model(data()))
        manager.step()
    assert max(map(layers_in, graphs)) == 1
    fresh_plan(None)


class Batch:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


@on_ranks(1)
def test_what_is_given_in_an_object_says_nothing_of_its_size() -> None:
    fresh_plan(None)
    plain, model, graphs = pair(False)
    for net in (plain, model):
        net.forward = lambda batch, forward=net.forward: forward(batch.x)
    for _ in range(3):
        for net in (plain, model):
            net.zero_grad()
            net(Batch(data())).backward()
        oracle.assert_close(bmt.gather_grad(model.enter.weight), plain.enter.weight.grad, "enter")
    assert max(map(layers_in, graphs)) == 1


def evaluates(plain: nn.Module, model: Any) -> None:
    with torch.no_grad():
        oracle.assert_close(model(data(5)), plain(data(5)), "evaluated")


def calls_a_block(plain: Any, model: Any) -> None:
    x = torch.ones(2, WIDTH, device=context().device.torch_device)
    oracle.assert_close(model.layers[1](x), plain.layers[1](x), "a block by itself")


def freezes(plain: Any, model: Any) -> None:
    for net in (plain, model):
        net.layers[0].requires_grad_(False)


def hooks(plain: Any, model: Any) -> None:
    for net in (plain, model):
        net.layers[1].register_forward_hook(lambda module, args, out: 2 * out)


def loads(plain: Any, model: Any) -> None:
    state = {key: 0.5 * value for key, value in plain.state_dict().items()}
    for net in (plain, model):
        net.load_state_dict(state)


def trains_less(plain: Any, model: Any) -> None:
    for net in (plain, model):
        net.eval()


def takes_less(plain: Any, model: Any) -> None:
    """Layers that are there no more."""
    for net in (plain, model):
        del net.layers[1]


@pytest.mark.parametrize("change", [evaluates, calls_a_block, freezes, hooks, loads, trains_less, takes_less])
@pytest.mark.parametrize("first", [False, True])
@on_ranks(1)
def test_what_is_done_between_steps_counts(change: Callable[[Any, Any], None], first: bool) -> None:
    fresh_plan(None)
    plain, model, graphs = pair(False)
    for number in range(5):
        if number == (0 if first else 3):
            change(plain, model)
        step(plain, model)
    assert change is hooks or layers_in(graphs[-1]) in (BLOCKS, BLOCKS - 1, 1)


@on_ranks(1)
def test_accumulated_under_autocast_with_clipping_and_two_models() -> None:
    fresh_plan(None)
    pairs = [pair(False)[:2], pair(False)[:2]]
    sides: list[Any] = [(*p, bmt.optim.OptimManager(loss_scale=None)) for p in pairs]
    for plain, model, manager in sides:
        plain.optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2, weight_decay=1e-2))
    kind = context().device.torch_device.type
    for number in range(5):
        for plain, model, manager in sides:
            for rows in (6, 4 + number):
                with torch.autocast(kind, dtype=torch.bfloat16):
                    losses = [net(data(rows)) / 2 for net in (plain, model)]
                losses[0].backward()
                manager.backward(losses[1])
                torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=1e-4)
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            plain.optimizer.step()
            plain.optimizer.zero_grad()
            manager.clip_grad_norm(model.parameters(), 0.1)
            manager.step()
            manager.zero_grad()


class Skips(Net):
    """The layers run without gradients at first, or not at all."""

    how = "skips"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        with torch.set_grad_enabled(self.how != "evaluates"):
            for layer in self.layers if self.how != "skips" else ():
                x = layer(x, scale=0.5)
        return self.leave(x).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["skips", "evaluates"])
@pytest.mark.parametrize("recompute", [True, None])
@on_ranks(1)
def test_blocks_that_a_first_run_did_not_train_are_recomputed(how: str, recompute: bool | None) -> None:
    fresh_plan(None)
    plain, model, graphs = pair(recompute, Skips)
    for number in range(5):
        for net in (plain, model):
            net.how = how if number < 3 else "trains"
        if number == 3:
            graphs.clear()
        step(plain, model)
    assert max(map(layers_in, graphs), default=1) == 1


@on_ranks(1, 2)
def test_hooks_inside_of_one_of_equal_blocks_are_its_own() -> None:
    fresh_plan(None)
    plain, model, _ = pair(False)
    handles = [net.layers[1].up.register_forward_hook(lambda module, args, out: 2 * out) for net in (plain, model)]
    for number in range(9):
        if number == 5:
            for handle in handles:
                handle.remove()
        if number == 7:
            for net in (plain, model):
                net.layers[2].up.register_forward_hook(lambda module, args, out: 3 * out)
        step(plain, model)
