"""Blocks are transparent and may be used in any order: models are trained beside the same models in plain torch."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import models
import oracle
import pytest
import torch
from oracle import WIDTH, matches, mean
from ranks import on_ranks, run_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bmtrain as bmt
from bmtrain.errors import ConfigurationError

WORLDS = [1, 2]


class Layer(nn.Module):
    """A residual block, not converted: Block and BMTrainModelWrapper take any module."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        y = self.down(F.gelu(self.up(self.norm(x)))) * scale
        return x + (y if mask is None else y * mask)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.norm(x))  # type: ignore[no-any-return]


def stack_model(names: models.Names, forward: Any, layer: Any = Layer, count: int = 4) -> Any:
    """A stem, some blocks and a head; ``forward(model, x)`` says how they run."""

    class Stack(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(WIDTH, WIDTH)
            self.layers = names.stack([layer() for _ in range(count)])
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return forward(self, x)

    return Stack()


def through(x: torch.Tensor, layers: Any) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


# ---- any order
# -------------------------------------------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_any_order_is_legal() -> None:
    orders = {
        "all": lambda m, x: m.head(through(m.stem(x), m.layers)),
        "skipped first": lambda m, x: m.head(through(m.stem(x), m.layers[1:])),
        "skipped middle": lambda m, x: m.head(through(m.stem(x), [m.layers[0], m.layers[3]])),
        "early exit": lambda m, x: m.head(through(m.stem(x), m.layers[:2])),
        "reversed": lambda m, x: m.head(through(m.stem(x), reversed(list(m.layers)))),
        "twice in a row": lambda m, x: m.head(through(m.stem(x), [m.layers[0], m.layers[0], m.layers[1]])),
        "twice apart": lambda m, x: m.head(through(m.stem(x), [m.layers[0], m.layers[1], m.layers[0]])),
        "looped": lambda m, x: m.head(through(through(m.stem(x), m.layers), m.layers)),
        "parallel": lambda m, x: m.head(sum(layer(m.stem(x)) for layer in m.layers)),
        "one call": lambda m, x: m.head(m.layers(m.stem(x))) if hasattr(m.layers, "num_hidden") else m.head(
            through(m.stem(x), m.layers)
        ),
    }  # fmt: skip
    for name, order in orders.items():
        try:
            matches(lambda names, order=order: stack_model(names, order))
        except BaseException as error:
            raise AssertionError(name) from error


@on_ranks(2, 3)
def test_the_order_may_change_from_step_to_step() -> None:
    """Another order in every step: predictions from the last step are wrong and must do no harm."""
    chosen = [[0, 1, 2, 3], [3, 1], [0, 0, 2], [2, 1, 0], [0, 1, 2, 3], [1]]
    state = {"step": -1}

    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        return mean(model(x))

    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        picked = chosen[state["step"] // 2 % len(chosen)]
        return model.head(through(model.stem(x), [model.layers[i] for i in picked]))  # type: ignore[no-any-return]

    def counted(model: Any, x: torch.Tensor) -> torch.Tensor:
        state["step"] += 1
        return run(model, x)

    for recompute in (True, False):
        state["step"] = -1
        matches(lambda names: stack_model(names, forward), counted, steps=6, recompute=recompute)


@on_ranks(*WORLDS)
def test_forwards_may_lie_between_a_forward_and_its_backward() -> None:
    def build(names: models.Names) -> Any:
        return stack_model(names, lambda m, x: m.head(through(m.stem(x), m.layers)))

    def two_forwards(model: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = model(x), model(x * 2)
        return mean(first) + mean(second)

    def evaluation_between(model: Any, x: torch.Tensor) -> torch.Tensor:
        loss = mean(model(x))
        with torch.no_grad():
            model.eval()
            model(x * 3)
            model.train()
        return loss

    def inference_between(model: Any, x: torch.Tensor) -> torch.Tensor:
        loss = mean(model(x))
        with torch.inference_mode():
            model(x * 3)
        return loss

    def generate_first(model: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for _ in range(3):
                x = torch.cat([x, x[:1]])[1:] if model(x).shape else x
        return mean(model(oracle.inputs(0) if len(x) == oracle.ROWS else models.share(oracle.inputs(0))))

    def state_between(model: Any, x: torch.Tensor) -> torch.Tensor:
        loss = mean(model(x))
        model.state_dict()
        return loss

    for run in (two_forwards, evaluation_between, inference_between, generate_first, state_between):
        try:
            matches(build, run)
        except BaseException as error:
            raise AssertionError(run.__name__) from error


@on_ranks(*WORLDS)
def test_parts_of_a_model_may_be_called_directly() -> None:
    def bypass(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.stem(x)
        h = h + m.layers[0].down(F.relu(m.layers[0].encode(h)))
        return m.head(m.layers[1](h) + h @ m.layers[2].up.weight.t() @ m.layers[2].down.weight.t())  # type: ignore[no-any-return]

    def build(names: models.Names) -> Any:
        return stack_model(names, bypass)

    matches(build)
    matches(build, lambda m, x: mean(m.layers[1](m.stem(x))))
    matches(build, lambda m, x: mean(m.layers[0].encode(x)))
    matches(build, lambda m, x: mean(m.head(m.layers[0].encode(m.stem(x))[:, :WIDTH])))


@on_ranks(*WORLDS)
def test_another_method_than_forward_may_be_called() -> None:
    def build(names: models.Names) -> Any:
        class Model(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.layers = nn.Linear(WIDTH, WIDTH), names.stack([Layer(), Layer()])
                self.bias = names.Parameter(torch.randn(WIDTH))

            def encode(self, x: torch.Tensor) -> torch.Tensor:
                return through(self.stem(x) + self.bias, self.layers)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.encode(x)

        return Model()

    matches(build, lambda m, x: mean(m.encode(x)))


# ---- arguments and results
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Named:
    x: torch.Tensor
    note: str


Pair = namedtuple("Pair", "x y")


@on_ranks(*WORLDS)
def test_any_arguments_and_results_pass_through() -> None:
    class Arguments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(
            self, x: torch.Tensor, mask: Any = None, scale: float = 1.0, *more: Any, shift: float, **rest: Any
        ) -> torch.Tensor:
            y = self.lin(x) * scale + shift
            return y + sum(rest.values()) + sum(more) + (0 if mask is None else mask)

    def results(kind: str) -> type[nn.Module]:
        class Results(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(WIDTH, WIDTH)

            def forward(self, x: Any) -> Any:
                y = self.lin(x)
                made: dict[str, Any] = {
                    "dict": {"x": y, "none": None, "nested": [y, {"z": y}]},
                    "dataclass": Named(y, "kept"),
                    "namedtuple": Pair(y, 0.5),
                    "tuple": (y, None),
                    "list": [y],
                }
                return made[kind]

        return Results

    def forward_arguments(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.layers[0](x, scale=0.5, shift=0.1)
        h = m.layers[1](h, torch.ones(WIDTH), shift=1.0, extra=torch.full((WIDTH,), 2.0))
        return m.layers[2](h, None, 2.0, 0.25, 0.5, shift=0.0)  # type: ignore[no-any-return]

    matches(lambda names: stack_model(names, forward_arguments, Arguments))
    unpack = {
        "dict": lambda r: r["x"] + r["nested"][1]["z"],
        "dataclass": lambda r: r.x if r.note == "kept" and isinstance(r, Named) else None,
        "namedtuple": lambda r: r.x * r.y,
        "tuple": lambda r: r[0] if r[1] is None else None,
        "list": lambda r: r[0],
    }
    for kind, take in unpack.items():

        def forward(m: Any, x: torch.Tensor, take: Any = take) -> torch.Tensor:
            for layer in m.layers:
                x = take(layer(x))
            return x

        matches(lambda names, f=forward, kind=kind: stack_model(names, f, results(kind)))


@on_ranks(*WORLDS)
def test_an_input_without_gradient_may_have_two_outputs() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = m.layers[0](x)  # x needs no gradient
        return a * b  # type: ignore[no-any-return]

    matches(lambda names: stack_model(names, forward, Split, 1))
    matches(lambda names: stack_model(names, lambda m, x: m.layers[0](x)[1], Split, 1))


@on_ranks(*WORLDS)
def test_a_block_is_the_module_itself() -> None:
    layer = Layer()
    layer.note = "set before"  # type: ignore[assignment]
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    layer.register_forward_hook(lambda m, a, out: out + 1)
    expected_keys = list(layer.state_dict())
    with torch.no_grad():
        expected = layer(torch.ones(2, WIDTH))
    block = bmt.Block(layer)
    assert block is layer and isinstance(block, Layer) and isinstance(block, bmt.Block)
    assert isinstance(block, bmt.CheckpointBlock) and type(block).__name__ == "Layer"
    assert list(block.state_dict()) == expected_keys
    assert block.note == "set before"
    block.extra = 3
    assert block.extra == 3 and layer.extra == 3
    assert block.train() is block and block.eval() is block and not block.training
    block.train()
    calls.clear()
    assert torch.equal(block(torch.ones(2, WIDTH)), expected)
    assert calls == ["pre"]
    assert "Linear" in repr(block)
    with pytest.raises(AttributeError):
        _ = block.missing


@on_ranks(*WORLDS)
def test_hooks_work() -> None:
    def prepare(model: Any) -> None:
        model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
        model.layers[1].register_forward_hook(lambda m, args, out: out * 0.5)
        model.layers[2].register_forward_hook(lambda m, args, kwargs, out: out + 1, with_kwargs=True)
        model.layers[0].register_full_backward_hook(lambda m, gi, go: tuple(g * 2 for g in gi if g is not None) or None)
        model.layers[3].up.register_forward_hook(lambda m, args, out: out * m.weight.mean())
        model.register_forward_hook(lambda m, args, out: out * m.head.weight.norm())

    matches(lambda names: stack_model(names, lambda m, x: m.head(through(m.stem(x), m.layers))), prepare=prepare)


# ---- nesting, sharing, recomputation
# -------------------------------------------------------------------------------------------------------------------


@on_ranks(1, 2, long=(3,))
def test_blocks_may_be_nested() -> None:
    def build(names: models.Names) -> Any:
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.inner = nn.Linear(WIDTH, WIDTH), names.block(Layer())
                self.list = names.stack([Layer(), Layer()])
                self.last = nn.Linear(WIDTH, WIDTH)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = torch.relu(self.first(x))
                x = self.inner(x, scale=0.5)
                return self.last(through(x, self.list))  # type: ignore[no-any-return]

        return stack_model(names, lambda m, x: m.head(through(m.stem(x), m.layers)), Outer, 2)

    matches(build)
    matches(build, zero_level=2)


@on_ranks(*WORLDS)
def test_parameters_may_be_shared_between_blocks() -> None:
    def build(names: models.Names) -> Any:
        class Sharing(nn.Module):
            def __init__(self, common: nn.Parameter, tied: nn.Linear) -> None:
                super().__init__()
                self.common, self.tied, self.own = common, tied, nn.Linear(WIDTH, WIDTH)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.own(x) @ self.common + self.tied(x)  # type: ignore[no-any-return]

        class Model(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                common, tied = names.Parameter(torch.randn(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH)
                self.layers = names.stack([Sharing(common, tied), Sharing(common, nn.Linear(WIDTH, WIDTH))])
                self.layers[1].tied.weight = tied.weight
                self.same = names.stack([self.layers[0]])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return through(x, [*self.layers, *self.same])

        return Model()

    matches(build)
    _, model = oracle.pair(build)
    assert model.layers[0].common is model.layers[1].common
    assert model.layers[0].tied.weight is model.layers[1].tied.weight
    assert len(list(model.parameters())) == 8  # common, tied.weight, two tied.bias, two own.weight and own.bias


@on_ranks(*WORLDS)
def test_first_layers_may_be_frozen() -> None:
    def freeze(model: Any) -> None:
        for p in [*model.stem.parameters(), *model.layers[0].parameters(), *model.layers[2].up.parameters()]:
            p.requires_grad_(False)

    matches(lambda names: stack_model(names, lambda m, x: m.head(through(m.stem(x), m.layers))), prepare=freeze)


@on_ranks(*WORLDS)
def test_torchs_own_checkpoint_may_be_around_blocks() -> None:
    for reentrant in (True, False):

        def forward(m: Any, x: torch.Tensor, reentrant: bool = reentrant) -> torch.Tensor:
            x = m.stem(x)
            for layer in m.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return m.head(x)  # type: ignore[no-any-return]

        def build(names: models.Names, f: Any = forward) -> Any:
            return stack_model(names, f)

        matches(build)

        def whole(m: Any, x: torch.Tensor, reentrant: bool = reentrant) -> torch.Tensor:
            x = m.stem(x)
            return m.head(checkpoint(lambda h: through(h, m.layers), x, use_reentrant=reentrant))  # type: ignore[no-any-return]

        matches(lambda names, f=whole: stack_model(names, f))


def dropout_is_repeated() -> list[torch.Tensor]:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.lin(x), 0.5, training=True)

    grads = []
    for recompute in (True, False):
        torch.manual_seed(1)
        model = stack_model(models.sharded(recompute), lambda m, x: through(m.stem(x), m.layers), Noisy)
        torch.manual_seed(2)
        loss = mean(model(models.share(oracle.inputs(0))))
        bmt.optim.OptimManager().backward(loss)
        grads.append(torch.cat([g.flatten() for p in model.parameters() if (g := bmt.gather_grad(p)) is not None]))
        grads.append(torch.rand(3))  # recomputation leaves the generator where it was
    return grads


@pytest.mark.parametrize("world_size", WORLDS)
def test_recomputation_repeats_random_numbers(world_size: int) -> None:
    for with_it, after, without, after_too in run_ranks(world_size, dropout_is_repeated):
        assert torch.equal(with_it, without)
        assert torch.equal(after, after_too)


def recompute_changes_nothing() -> list[dict[str, torch.Tensor]]:
    ends = []
    for recompute in (True, False):
        model = models.build("gpt", models.sharded(recompute))
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
        for step in range(5):
            manager.zero_grad()
            manager.backward(model(*(models.share(t) for t in models.batch("gpt", step))))
            manager.step()
        ends.append(model.state_dict())
    return ends


@pytest.mark.parametrize("world_size", WORLDS)
def test_recomputation_changes_no_bit(world_size: int) -> None:
    for one, other in run_ranks(world_size, recompute_changes_nothing):
        assert all(torch.equal(one[k], other[k]) for k in one)


@on_ranks(*WORLDS)
def test_a_recomputed_block_that_changes_its_input_says_so() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += self.lin(x.detach() * 1.0)
            return x.sin()

    def build(names: models.Names) -> Any:
        return stack_model(names, lambda m, x: m.head(through(m.stem(x), m.layers)), InPlace)

    matches(build, recompute=False)
    _, model = oracle.pair(build)
    with pytest.raises(ConfigurationError, match="use_checkpoint=False"):
        mean(model(models.share(oracle.inputs(0)))).backward()


# ---- after an exception
# -------------------------------------------------------------------------------------------------------------------


class Fails(Layer):
    """Raises in the forward or in the backward when told to."""

    when = ""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = super().forward(x)
        if Fails.when == "forward":
            raise KeyError("forward")
        if Fails.when == "backward" and out.requires_grad:
            out.register_hook(_raise)  # type: ignore[no-untyped-call]
        return out


def _raise(grad: torch.Tensor) -> None:
    raise KeyError("backward")


@on_ranks(*WORLDS)
def test_training_goes_on_after_an_exception() -> None:
    def build(names: models.Names) -> Any:
        return stack_model(names, lambda m, x: m.head(through(m.stem(x), m.layers)), Fails, 3)

    for recompute in (True, False):
        reference, model = oracle.pair(build, recompute)
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(4):
            Fails.when = ("", "forward", "backward", "")[step]
            if Fails.when:
                with pytest.raises(KeyError):
                    manager.backward(mean(model(models.share(oracle.inputs(step)))))
                Fails.when = ""
                manager.zero_grad()
            manager.backward(mean(model(models.share(oracle.inputs(step)))))
            mean(reference(oracle.inputs(step))).backward()
            oracle.assert_same_grads(model, reference)
            manager.zero_grad()
            reference.zero_grad()
