"""fp32 models under autocast: gathered in low precision where autocast would cast anyway, with autocast's results."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ShardedAccessError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.gain = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.layers = nn.ModuleList([Layer() for _ in range(4)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), tokens.flatten())


def build() -> Net:
    torch.manual_seed(7)
    return Net()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, accumulate: int) -> list[float]:
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(steps):
        manager.zero_grad()
        for _ in range(accumulate):
            with torch.autocast(tokens.device.type, torch.bfloat16):
                loss = model(tokens)
            manager.backward(loss / accumulate)
        manager.step()
        losses.append(loss.item())
    return losses


def sharded(recompute: bool, accumulate: int) -> tuple[list[float], dict[str, torch.Tensor], set[tuple[str, str]]]:
    model = build()
    model.layers = bmt.TransformerBlockList([bmt.Block(layer, use_checkpoint=recompute) for layer in model.layers])
    seen: set[tuple[str, str]] = set()
    layer = model.layers[0]
    layer.register_forward_pre_hook(
        lambda m, _: seen.update({("up", str(m.up.weight.dtype)), ("norm", str(m.norm.weight.dtype))})
    )
    bmt.BMTrainModelWrapper(model)
    losses = train(model, bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2), 12, accumulate)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return losses, model.state_dict(), seen


def plain(accumulate: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        for _ in range(accumulate):
            with torch.autocast(tokens.device.type, torch.bfloat16):
                loss = model(tokens)
            (loss / accumulate).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize(
    ("world_size", "recompute", "accumulate"), [(1, True, 3), (2, False, 1), (2, True, 3), (3, True, 1)]
)
def test_numbers_are_autocasts(world_size: int, recompute: bool, accumulate: int) -> None:
    ((losses, state),) = run_ranks(1, plain, accumulate)
    start = build().state_dict()
    for got, weights, seen in run_ranks(world_size, sharded, recompute, accumulate):
        assert got[0] == losses[0]  # the same forward, to the bit
        # Every rank has the same data, so the mean of gradients is each rank's own but for one rounding to bf16.
        assert got == pytest.approx(losses, rel=1e-2)
        for key, value in state.items():
            # Adam divides gradients by their size, so that single small ones follow roundings; the whole does not.
            assert (weights[key] - value).norm() < 0.05 * (value - start[key]).norm(), key
        wire = "torch.bfloat16" if world_size > 1 else "torch.float32"
        assert seen == {("up", wire), ("norm", "torch.float32")}


def forward_with_and_without_autocast(is_sharded: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model = build()
    if is_sharded:
        bmt.BMTrainModelWrapper(model)
    tokens = torch.arange(6).view(1, 6)
    with torch.no_grad():
        before = model(tokens)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            low = model(tokens)
        return before, low, model(tokens)


def test_full_precision_comes_back_after_autocast() -> None:
    ((exact, rounded, _),) = run_ranks(1, forward_with_and_without_autocast, False)
    assert not torch.equal(exact, rounded)
    for before, low, after in run_ranks(2, forward_with_and_without_autocast, True):
        assert torch.equal(before, exact)
        assert torch.equal(low, rounded)
        assert torch.equal(after, exact)


def write_inside_forward() -> dict[str, torch.Tensor]:
    class Clamped(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3, bias=False)
            nn.init.constant_(self.linear.weight, 1 / 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.linear.weight.data[0].clamp_(max=0.25)
            return self.linear(x)

    model, x = Clamped(), torch.ones(1, 3)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        model(x)
    return model.state_dict()


def test_writing_in_low_precision_rounds_only_what_is_written() -> None:
    for state in run_ranks(2, write_inside_forward):
        weight = state["linear.weight"]
        assert (weight[0] == 0.25).all()
        assert (weight[1:] == torch.tensor(1 / 3)).all()


MOMENTUM = 0.999  # in bf16 a change of a thousandth is none


class Follower(nn.Module):
    """A student and what follows it, as MoCo and BYOL write it: ``update`` is called in the forward."""

    def __init__(self, update: str, when: str) -> None:
        super().__init__()
        self.update, self.when = update, when
        self.student = nn.ModuleList([nn.Linear(6, 8), Layer(), nn.Linear(8, 6)])
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for p in self.teacher.parameters():
            p.data.mul_(0.5)

    def follow(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.update == "assign":
                slow.data = slow.data * MOMENTUM + fast.data * (1 - MOMENTUM)
            elif self.update == "data":
                slow.data.mul_(MOMENTUM).add_(fast.data, alpha=1 - MOMENTUM)
            else:
                slow.copy_(slow * MOMENTUM + fast.detach() * (1 - MOMENTUM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.when == "first":
            with torch.no_grad():
                self.follow()
        out = run_in_turn(self.student, x)
        with torch.no_grad():
            if self.when == "between":
                self.follow()
            target = run_in_turn(self.teacher, x)
        return (out.float() - target.float()).square().mean()


def run_in_turn(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def how_the_teacher_moved(update: str, when: str, is_sharded: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model = Follower(update, when)
    if is_sharded:
        bmt.BMTrainModelWrapper(model)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for step in range(3):
        x = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        manager.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = model(x)
        manager.backward(loss)
        manager.step()
    return {name: value - first[name] for name, value in model.state_dict().items() if name.startswith("teacher")}


@pytest.mark.parametrize("when", ["first", "between"])
@pytest.mark.parametrize("update", ["assign", "data"])
def test_averages_that_follow_in_a_forward_are_not_rounded(update: str, when: str) -> None:
    (expected,) = run_ranks(1, how_the_teacher_moved, update, when, False)
    for ranks, init in ((2, {}), (3, {"schedule": "stress"})):
        for moved in run_ranks(ranks, how_the_teacher_moved, update, when, True, init=init):
            for name, change in expected.items():
                assert (moved[name] - change).abs().max() <= 0.02 * change.abs().max(), name


def refused_in_place(precision: str | None) -> None:
    with pytest.raises(ShardedAccessError, match=r"changed in place in a forward.*p\.data\.lerp_"):
        how_the_teacher_moved("data" if precision else "in place", "first", True)


def test_a_write_that_would_be_rounded_is_refused() -> None:
    run_ranks(2, refused_in_place, None)
    run_ranks(2, refused_in_place, "bf16", init={"precision": "bf16"})


class ReadsData(Layer):
    """Scales by the size of a weight in the middle of its forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.norm(x))
        return x + self.gain * self.down(F.gelu(h)) / self.up.weight.data.norm()


def gradients_of_a_block_that_reads_data(is_sharded: bool, recompute: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model = Net()
    model.layers = nn.ModuleList([ReadsData() for _ in range(3)])
    if is_sharded:
        model.layers = bmt.TransformerBlockList([bmt.Block(one, use_checkpoint=recompute) for one in model.layers])
        bmt.BMTrainModelWrapper(model)
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        model.zero_grad()
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = model(tokens)
        loss.backward()
    read = bmt.gather_grad if is_sharded else lambda p: p.grad
    return {name: read(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [True, False])
def test_a_block_that_reads_data_runs_again(recompute: bool) -> None:
    (expected,) = run_ranks(1, gradients_of_a_block_that_reads_data, False, recompute)
    for found in run_ranks(2, gradients_of_a_block_that_reads_data, True, recompute):
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= 0.03 * grad.norm(), name
