"""fp32 models under autocast: gathered in low precision where autocast would cast anyway, with autocast's results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

import bmtrain as bmt


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
