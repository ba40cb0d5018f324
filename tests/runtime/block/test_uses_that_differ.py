"""A module that is run inside a forward as often as a rank's own data ask for: sequences of other lengths."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.out(torch.softmax(self.attend(h), -1) * h))


class Attention(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.score(h), -1) * h


class Decoder(bmt.DistributedModule):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.out = attention, nn.Linear(8, 8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.out(self.attention(h)))


class Encoder(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inp(x))


class Translator(bmt.DistributedModule):
    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        h = self.encoder(x)
        total = h.sum() * 0
        for _ in range(steps):
            h = self.decoder(h)
            total = total + h.square().mean()
        return total / steps


class Blocks(bmt.DistributedModule):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.Block(Cell(), use_checkpoint=recompute) for _ in range(2)])

    def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        total = x.sum() * 0
        for _ in range(steps):
            x = self.layers[0](x)
            total = total + x.square().mean()
        return total / steps + self.layers[1](x).square().mean()


MADE = {
    "a decoder of several parts": lambda: Translator(Encoder(), Decoder(Attention())),
    "a block": lambda: Blocks(False),
    "a block that is recomputed": lambda: Blocks(True),
}
STEPS = [(3, 3), (5, 2), (1, 4), (2, 1), (4, 4)]


def trained(kind: str, steps_of: list[list[int]], batches: list[int]) -> dict[str, torch.Tensor]:
    """The weights after some steps, the loss of each being the mean over the given shares."""
    torch.manual_seed(1)
    model = MADE[kind]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    for step, steps in enumerate(steps_of):
        shares = [torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + b)) for b in batches]
        manager.zero_grad()
        loss = torch.stack([model(x, n) for x, n in zip(shares, steps, strict=True)]).mean()
        manager.backward(loss)
        manager.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def on_one(kind: str) -> dict[str, torch.Tensor]:
    return trained(kind, [list(steps) for steps in STEPS], [0, 1])


def on_two(kind: str) -> dict[str, torch.Tensor]:
    return trained(kind, [[steps[bmt.rank()]] for steps in STEPS], [bmt.rank()])


@pytest.mark.parametrize("kind", MADE)
def test_ranks_use_a_unit_as_often_as_they_need(kind: str) -> None:
    expected = run_ranks(1, on_one, kind)[0]
    for got in run_ranks(2, on_two, kind):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


class Cycle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([bmt.Block(nn.Linear(8, 8)) for _ in range(3)])
        self.times = 1

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            for cell in self.cells:
                h = torch.tanh(cell(h))
        return h


def cycled() -> str:
    model = bmt.BMTrainModelWrapper(Cycle())
    model.times = 3 + bmt.rank()
    with pytest.raises(bmt.errors.RankDivergenceError) as error:
        model(torch.ones(2, 8)).sum().backward()
    return str(error.value)


def test_units_that_take_turns_unequally_are_named() -> None:
    for message in run_ranks(2, cycled, timeout=40, fresh=True):
        assert "the forward of cells.0" in message, message
