"""Compiled blocks under autocast: every parameter gets torch's gradient, large linear weights first."""

from __future__ import annotations

import copy
import importlib
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block import linear
from bmtrain.context import context

WIDTH, ROWS, BLOCKS = 32, 12, 3
block_compile = importlib.import_module("bmtrain.block.compile")  # its name is also that of the function


class Layer(nn.Module):
    """A norm, linear layers with and without bias, one weight used twice, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gain * self.down(F.gelu(self.up(self.norm(x))))
        return x + self.down(self.up(x).tanh())


def build() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(*[Layer() for _ in range(BLOCKS)])


def data(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module, x: torch.Tensor, cast: bool) -> torch.Tensor:
    kind = x.device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=cast):
        return model(x).float().square().mean()


def plain(cast: bool) -> dict[str, torch.Tensor]:
    model = build()
    loss_of(model, data(), cast).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sharded(cast: bool, backend: str | None, recompute: bool, backwards: int) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, each a mean over the backwards, and how many products landed in the reduction buffer."""
    torch._dynamo.reset()
    with mock.patch.object(linear, "_LARGE", WIDTH * WIDTH):
        model = nn.Sequential(*[bmt.Block(layer, use_checkpoint=recompute) for layer in build()])
        bmt.BMTrainModelWrapper(model)
    if backend is not None:
        bmt.compile(model, backend=backend)
    device = next(model.parameters()).device
    x = data().chunk(bmt.world_size())[bmt.rank()].to(device).requires_grad_()
    manager = bmt.optim.OptimManager(loss_scale=None)
    landed, land = 0, linear._land

    def counted(*args: object) -> None:
        nonlocal landed
        landed += 1
        land(*args)  # type: ignore[arg-type]

    with mock.patch.object(linear, "_land", counted):
        for _ in range(backwards):
            manager.backward(loss_of(model, x, cast) / backwards)
    found = {name: bmt.gather_grad(p) for name, p in model.named_parameters()}
    return {name: grad.cpu() for name, grad in found.items() if grad is not None}, landed


def check(cast: bool, backend: str | None, recompute: bool, backwards: int) -> None:
    expected = plain(cast)
    assert len(expected) == BLOCKS * 6
    for grads, landed in run_ranks(2, sharded, cast, backend, recompute, backwards, timeout=240):
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            error = float((grad - expected[name]).norm() / expected[name].norm())
            assert error < (0.02 if cast else 1e-5), (name, error)
        assert landed == BLOCKS * 4 * backwards


@pytest.mark.parametrize("backwards", [3, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.parametrize("cast", [False, True])
def test_every_gradient_is_torchs(cast: bool, backend: str | None, recompute: bool, backwards: int) -> None:
    check(cast, backend, recompute, backwards)


@pytest.mark.parametrize(("recompute", "backwards"), [(False, 3), (True, 1)])
def test_every_gradient_of_inductors_code_is_torchs(recompute: bool, backwards: int) -> None:
    check(True, "inductor", recompute, backwards)


def compiled_whole(in_place: bool, blocks: bool) -> dict[str, torch.Tensor | None]:
    """Gradients of a model that is compiled as one by torch's own means."""
    torch._dynamo.reset()
    with mock.patch.object(linear, "_LARGE", 0):
        layers = build()
        model = bmt.BMTrainModelWrapper(nn.Sequential(*[bmt.Block(x) for x in layers]) if blocks else layers)
    run: nn.Module = model
    if in_place:
        model.compile(backend="aot_eager")
    else:
        run = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    device = next(model.parameters()).device
    x = data().chunk(bmt.world_size())[bmt.rank()].to(device).requires_grad_()
    bmt.optim.OptimManager().backward(loss_of(run, x, cast=True))
    return {name: bmt.gather_grad(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_every_gradient_of_a_model_compiled_whole_is_torchs(in_place: bool, blocks: bool) -> None:
    expected = plain(cast=True)
    for grads in run_ranks(2, compiled_whole, in_place, blocks, timeout=240):
        for name, right in expected.items():
            grad = grads[name]
            assert grad is not None, name
            assert float((grad.cpu() - right).norm() / right.norm()) < 0.02, name


def compiled_again() -> list[float]:
    """Losses of training with evaluations, and of other batch sizes, between a backward and the next zero_grad."""
    torch._dynamo.reset()
    model: nn.Module = build()
    if bmt.is_initialized():
        model = nn.Sequential(*[bmt.Block(layer) for layer in model])  # type: ignore[arg-type]
        bmt.BMTrainModelWrapper(model)
        bmt.compile(model, backend="eager")
    adam: Any = bmt.optim.AdamOptimizer if bmt.is_initialized() else torch.optim.Adam
    optimizer = adam(model.parameters(), lr=1e-2, eps=1e-4)
    losses = []
    for step in range(2):
        loss_of(model, data().chunk(bmt.world_size())[bmt.rank()] if bmt.is_initialized() else data(), False).backward()
        loss_of(model, data(2 * ROWS), False).backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(float(loss_of(model, data(), False)))
        if step:
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_again_while_gradients_are_there(ranks: int) -> None:
    right = run_ranks(1, compiled_again, initialize=False)[0]
    for losses in run_ranks(ranks, compiled_again):
        assert losses == pytest.approx(right, rel=1e-4)


class Language(nn.Module):
    """Blocks between a table and a loss, which share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
        self.layers, self.norm = build(), nn.LayerNorm(WIDTH)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.layers(self.table(tokens)))
        return F.cross_entropy(self.head(x), (tokens + 1) % 11)


def language_losses(compiled: bool) -> tuple[list[float], list[int]]:
    """Losses of five steps, and for each piece of compiled code how many matrix products it has."""
    torch._dynamo.reset()
    products: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        products.append(sum(node.target in (F.linear, torch._C._nn.linear) for node in graph.graph.nodes))
        return graph.forward

    torch.manual_seed(3)
    model: Any = Language()
    if bmt.is_initialized():
        for i, layer in enumerate(model.layers):
            model.layers[i] = bmt.Block(layer)
        model = bmt.BMTrainModelWrapper(model)
    if compiled:
        assert bmt.compile(model, backend=backend, fullgraph=True) is model
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, steps = [], optimizer
    if bmt.is_initialized():
        steps = bmt.optim.OptimManager()
        steps.add_optimizer(optimizer)
    for step in range(5):
        tokens = torch.randint(11, (4 * 6,), generator=torch.Generator().manual_seed(step)).chunk(bmt.world_size())
        loss = model(tokens[bmt.rank()])
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(float(bmt.sum_loss(loss) if bmt.is_initialized() else loss))
    return losses, products


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_outside_of_blocks_is_compiled_too(world_size: int) -> None:
    expected, _ = language_losses(compiled=False)
    for losses, products in run_ranks(world_size, language_losses, True, init={"device": "cpu"}):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert sorted(set(products) - {13}) == [0, 1, 4], "the table, the head with the loss, and a block"
        assert (13 in products) == (world_size == 1), "all in one piece, once the blocks keep their activations"


def hooks_are_not_compiled() -> None:
    torch._dynamo.reset()
    seen: list[str] = []
    with mock.patch("torch._dynamo.convert_frame.log_dynamo_start", lambda code, *_: seen.append(code.co_name)):
        for backend in ("eager", "aot_eager", "eager"):
            model: Any = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(WIDTH, WIDTH), build()))
            bmt.compile(model, backend=backend)
            optimizer, manager = bmt.optim.AdamOptimizer(model.parameters()), bmt.optim.OptimManager(loss_scale=None)
            manager.add_optimizer(optimizer)
            for _ in range(6):  # first as it is written, while losses are looked at
                x = data().chunk(bmt.world_size())[bmt.rank()].to(next(model.parameters()).device)
                manager.backward(model(x).square().mean())
                manager.step()
    assert seen and not {"_pack", "of"} & set(seen), seen


def test_what_autograd_saves_is_not_compiled() -> None:
    for ranks in (1, 2):
        run_ranks(ranks, hooks_are_not_compiled, fresh=True)


OF_TORCH = [
    lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True),
]


def layers_of_torchs_own(number: int, recompute: bool) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(5)
    reference = nn.Sequential(*[OF_TORCH[number]() for _ in range(3)])
    model: Any = nn.Sequential(*[bmt.Block(copy.deepcopy(one), use_checkpoint=recompute) for one in reference])
    bmt.compile(bmt.BMTrainModelWrapper(model), backend=backend)
    x = torch.randn(2, 4, WIDTH, device=next(model.parameters()).device)
    reference.to(x.device)
    for _ in range(5):
        model.zero_grad()
        model(x).square().mean().backward()
    most = 2 if recompute or bmt.world_size() > 1 else 3  # on one rank the whole model is one, in the end
    assert 1 <= len(graphs) <= most  # for all three, with an input that has a gradient and without
    reference(x).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        oracle.assert_close(bmt.gather_grad(ours), theirs.grad, name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("number", range(len(OF_TORCH)))
def test_blocks_of_torchs_own_classes_are_compiled(number: int, recompute: bool) -> None:
    for ranks in (1, 2):
        # Under a default device torch runs its own layers as they are written.
        run_ranks(ranks, layers_of_torchs_own, number, recompute, fresh=True, default_device=False)


@on_ranks(1)
def test_cuda_graphs_are_left_out() -> None:
    model: Any = bmt.BMTrainModelWrapper(nn.Sequential(bmt.Block(Layer())))
    gpu = SimpleNamespace(device=SimpleNamespace(is_cuda=True))
    for mode, left in (("reduce-overhead", "default"), ("max-autotune", "max-autotune-no-cudagraphs")):
        with (
            mock.patch.object(torch, "compile") as compiled,
            mock.patch.object(block_compile, "context", lambda: gpu),
            pytest.warns(UserWarning, match=f"leaves out the CUDA graphs of mode='{mode}'"),
        ):
            bmt.compile(model, mode=mode)
        assert {call.kwargs["mode"] for call in compiled.mock_calls} == {left}
    with mock.patch.object(torch, "compile") as compiled, warnings.catch_warnings():
        warnings.simplefilter("error")
        bmt.compile(model, mode="max-autotune-no-cudagraphs", fullgraph=True)
    assert {call.kwargs["mode"] for call in compiled.mock_calls} == {"max-autotune-no-cudagraphs"}


class Activation(bmt.DistributedModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() * 2


class Child(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(WIDTH, WIDTH), Activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.linear(x))


class Parent(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = Child(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.child(x))


def parts_alone_and_inside(alone_first: bool) -> None:
    torch._dynamo.reset()
    model: Any = Parent()
    x = data().to(next(model.parameters()).device)
    calls = [model, model.child, model.child.activation]
    expected = [call(x).detach().clone() for call in calls]
    model.child.compile(backend="eager")
    model.child.activation.compile(backend="eager")
    for number in [2, 1, 0, 0, 1, 2] if alone_first else [0, 1, 2, 2, 1, 0]:
        out = calls[number](x)
        oracle.assert_close(out.detach(), expected[number], str(number))
        if out.requires_grad:
            out.square().mean().backward()


@pytest.mark.parametrize("alone_first", [False, True])
def test_a_part_that_is_compiled_is_called_alone_and_inside(alone_first: bool) -> None:
    for ranks in (1, 2):
        run_ranks(ranks, parts_alone_and_inside, alone_first, fresh=True)


def with_the_model(model: Any, loss: torch.Tensor, manager: Any) -> None:
    loss.backward()


def with_autograd(model: Any, loss: torch.Tensor, manager: Any) -> None:
    torch.autograd.backward(loss)


def with_a_step(model: Any, loss: torch.Tensor, manager: Any) -> None:
    loss.backward()
    if manager is not None:
        manager.step()
        manager.zero_grad()


STEPS = {call.__name__: call for call in (with_the_model, with_autograd, with_a_step)}


def step_compiled_whole(how: str, recompute: bool, blocks: bool) -> None:
    torch._dynamo.reset()
    device = context().device.torch_device
    reference = build().to(device)
    with mock.patch.object(linear, "_LARGE", 0):
        layers = [bmt.Block(layer, use_checkpoint=recompute) for layer in build()]
        model = bmt.BMTrainModelWrapper(nn.Sequential(*layers, nn.LayerNorm(WIDTH)))
    reference.append(nn.LayerNorm(WIDTH, device=device))
    if blocks:
        bmt.compile(model, backend="aot_eager")
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)

    @torch.compile(backend="aot_eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        STEPS[how](model, loss, manager)
        return loss

    for _ in range(4):
        x = data().to(device)
        whole = reference(x).square().mean()
        whole.backward()
        loss = step(x.chunk(bmt.world_size())[bmt.rank()])
        oracle.assert_close(bmt.sum_loss(loss.detach()), whole.detach(), "loss")
        if how == "with_a_step":
            theirs.step()
            theirs.zero_grad()
        else:
            oracle.assert_same_grads(model, reference)
    oracle.assert_same_weights(model, reference)


@pytest.mark.parametrize("how", list(STEPS))
@pytest.mark.parametrize(("recompute", "blocks"), [(False, False), (True, False), (True, True)])
def test_a_step_that_is_compiled_whole_trains_as_torchs(how: str, recompute: bool, blocks: bool) -> None:
    for ranks in (1, 2) if blocks else (2,):
        run_ranks(ranks, step_compiled_whole, how, recompute, blocks)


HOOKS: dict[str, Any] = {
    "forward": lambda block: block.register_forward_hook(lambda module, args, out: 1.5 * out),
    "before": lambda block: block.register_forward_pre_hook(lambda module, args: (0.5 * args[0],)),
    "backward": lambda block: block.register_full_backward_hook(lambda module, given, made: (0.5 * given[0],)),
}


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_a_recomputed_block_that_is_compiled(kind: str) -> None:
    torch._dynamo.reset()
    reference, model = build(), build()
    for i, layer in enumerate(model):
        model[i] = bmt.Block(layer, use_checkpoint=True)
    bmt.BMTrainModelWrapper(model)
    for net in (reference, model):
        HOOKS[kind](net[1])
    bmt.compile(model, backend="aot_eager")
    for _ in range(2):
        for net in (reference, model):
            net.zero_grad()
        reference(data()).square().mean().backward()
        model(data().chunk(bmt.world_size())[bmt.rank()]).square().mean().backward()
        oracle.assert_same_grads(model, reference)
