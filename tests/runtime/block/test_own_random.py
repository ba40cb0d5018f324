"""Ranks in training draw numbers of their own in their layers, and the same ones wherever they decide."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain import objects
from bmtrain.context import context
from bmtrain.errors import ConfigurationError

ROWS, WIDTH = 6, 8


class Noisy(nn.Module):
    """Drops entries and adds noise; keeps what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drawn: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(x)
        self.drawn.append(noise.flatten().tolist())
        return x + F.dropout(self.linear(x + noise), 0.5, self.training)


class Stack(nn.Module):
    """Blocks, some of which are dropped as a whole."""

    def __init__(self, nested: bool = False, recompute: bool = True) -> None:
        super().__init__()
        blocks = [Noisy() for _ in range(4)]
        if nested:
            pairs = [
                nn.Sequential(*[bmt.Block(b, use_checkpoint=recompute) for b in blocks[i : i + 2]]) for i in (0, 2)
            ]
            self.layers = nn.ModuleList(bmt.Block(pair, use_checkpoint=recompute) for pair in pairs)
        else:
            self.layers = nn.ModuleList(bmt.Block(b, use_checkpoint=recompute) for b in blocks)
        self.ran: list[int] = []

    def forward(self, x: torch.Tensor, drop: float = 0.0) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if self.training and torch.rand([]) < drop:
                continue
            self.ran.append(index)
            x = layer(x)
        return x


def drawn_in(model: nn.Module) -> list[list[float]]:
    return [row for module in model.modules() if isinstance(module, Noisy) for row in module.drawn]


def rows() -> torch.Tensor:
    return torch.ones(ROWS, WIDTH, device=context().device.torch_device)


def differ_everywhere(values: list[object]) -> bool:
    return len({repr(value) for value in values}) == len(values)


# ---- what does not part
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_choice_is_refused() -> None:
    assert "'apart'" in run_ranks(1, refused, initialize=False)[0]


def refused() -> str:
    with pytest.raises(ConfigurationError) as error:
        bmt.init_distributed(random="apart")  # type: ignore[arg-type]
    return str(error.value)


@on_ranks(1)
def test_one_rank_draws_what_plain_torch_does() -> None:
    torch.manual_seed(3)
    plain = nn.Sequential(Noisy(), Noisy()).to(context().device.torch_device)
    expected = plain(rows())
    torch.manual_seed(3)
    model = bmt.BMTrainModelWrapper(nn.Sequential(bmt.Block(Noisy()), bmt.Block(Noisy())))
    with bmt.own_random():
        assert torch.equal(model(rows()), expected)


@on_ranks(2, init={"random": "shared"})
def test_the_published_way_can_be_asked_for() -> None:
    model = bmt.BMTrainModelWrapper(Stack())
    model(rows())
    with bmt.own_random():
        noise = torch.rand(3).tolist()
    first, second = objects.allgather_objects((drawn_in(model), noise))
    assert first == second


@on_ranks(2)
def test_evaluation_and_plain_code_draw_alike() -> None:
    model = bmt.BMTrainModelWrapper(Stack()).eval()
    model(rows())
    seen = drawn_in(model), torch.rand(3).tolist(), random.random(), torch.randperm(9).tolist()
    first, second = objects.allgather_objects(seen)
    assert first == second


@on_ranks(2)
def test_a_forward_without_draws_leaves_the_shared_stream_where_it_is() -> None:
    model = bmt.BMTrainModelWrapper(nn.Sequential(bmt.Block(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, 1)))
    before = torch.get_rng_state()
    model(rows()).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


# ---- what parts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["blocks", "nested blocks", "no blocks"])
@on_ranks(2, 3)
def test_layers_in_training_draw_apart(kind: str) -> None:
    model = bmt.BMTrainModelWrapper(Noisy() if kind == "no blocks" else Stack(kind == "nested blocks"))
    model(rows())
    mine = drawn_in(model)
    assert differ_everywhere(mine), "no stretch is drawn twice"
    every = objects.allgather_objects(mine)
    assert differ_everywhere([row for rank in every for row in rank])
    after = objects.allgather_objects(torch.rand(4).tolist())
    assert all(row == after[0] for row in after), "the shared stream goes on as one"


@on_ranks(2)
def test_ranks_that_draw_more_or_less_stay_together() -> None:
    model = bmt.BMTrainModelWrapper(Stack())
    model(rows()[: 2 + bmt.rank()])
    first, second = objects.allgather_objects(torch.rand(4).tolist())
    assert first == second


@on_ranks(2, 3)
def test_layers_are_dropped_alike() -> None:
    model = bmt.BMTrainModelWrapper(Stack())
    for _ in range(6):
        model(rows(), drop=0.5).sum().backward()
    every = objects.allgather_objects(model.ran)
    assert all(ran == every[0] for ran in every) and 0 < len(every[0]) < 24


@on_ranks(2)
def test_own_random_is_for_what_belongs_to_a_share() -> None:
    def draw() -> Iterator[list[float]]:
        with bmt.own_random():
            yield torch.rand(3).tolist()
            with bmt.own_random():
                yield torch.rand(3).tolist()

    every = [row for rank in objects.allgather_objects(list(draw())) for row in rank]
    assert differ_everywhere(every)
    first, second = objects.allgather_objects(torch.rand(3).tolist())
    assert first == second


@on_ranks(2)
def test_own_random_is_for_random_and_numpy_too() -> None:
    numpy = pytest.importorskip("numpy")
    rows = []
    for _ in range(2):
        with bmt.own_random():
            rows.append([*numpy.random.normal(0, 1, 3).tolist(), random.random()])
            with bmt.own_random():
                rows.append([*numpy.random.rand(3).tolist(), random.random()])
        rows.append([*numpy.random.rand(3).tolist(), random.random()])
    every = objects.allgather_objects(rows)
    shared = [ranks[2::3] for ranks in every]
    assert shared[0] == shared[1] and shared[0][0] != shared[0][1]
    assert differ_everywhere([row for ranks in every for index, row in enumerate(ranks) if index % 3 < 2])
    with bmt.own_random():
        pass  # nothing drawn, nothing moved
    at = numpy.random.get_state()[2]
    with bmt.own_random():
        torch.rand(1)
    assert numpy.random.get_state()[2] == at


@on_ranks(2)
def test_an_error_inside_leads_back_to_the_shared_stream() -> None:
    with pytest.raises(KeyError), bmt.own_random():
        torch.rand(3 + bmt.rank())
        raise KeyError
    first, second = objects.allgather_objects(torch.rand(3).tolist())
    assert first == second


# ---- the same again
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
@on_ranks(2)
def test_a_seed_decides_what_is_drawn(compiled: bool) -> None:
    model = bmt.BMTrainModelWrapper(Stack())
    if compiled:
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    results = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        results.append(torch.cat([model(rows()), model(rows())]))
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


@on_ranks(2)
def test_the_shared_state_restores_both() -> None:
    model = bmt.BMTrainModelWrapper(Stack())
    model(rows())
    cpu, here, *others = context().device.rng_state()
    saved: Any = (*objects.broadcast_object((cpu, here)), *others)  # a checkpoint is rank 0's
    first = [model(rows()) for _ in range(3)]
    context().device.set_rng_state(saved)
    assert all(torch.equal(a, model(rows())) for a in first)


def gradients(nested: bool, recompute: bool) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = bmt.BMTrainModelWrapper(Stack(nested, recompute))
    for _ in range(2):
        model(rows()).square().sum().backward()
    return [g for p in model.parameters() if (g := bmt.gather_grad(p)) is not None]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_recomputation_repeats_what_each_rank_drew(world_size: int, nested: bool) -> None:
    kept = run_ranks(world_size, gradients, nested, False)
    again = run_ranks(world_size, gradients, nested, True)
    for one, other in zip(kept, again, strict=True):
        assert len(one) == 8 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
