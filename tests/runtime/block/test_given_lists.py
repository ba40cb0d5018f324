"""Lists that become TransformerBlockLists after they were made elsewhere: given to a constructor, or torch's own."""

from __future__ import annotations

from typing import Any

import models
import oracle
import torch
from oracle import WIDTH
from ranks import on_ranks
from torch import nn

import bmtrain as bmt

WORLDS = [1, 2]


def again(names: models.Names, modules: Any) -> Any:
    """What conversion writes around a list that is there already."""
    return bmt.TransformerBlockList(modules) if names.Module is bmt.DistributedModule else modules


def build(names: models.Names) -> Any:
    class Layer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.gain = names.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.linear(x)) * self.gain

        def step(self, x: torch.Tensor) -> torch.Tensor:
            return self.forward(x).tanh()

    class Encoder(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self, layers: nn.ModuleList) -> None:
            super().__init__()
            self.layers = again(names, layers)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
                seen.append(x)
            for layer in self.layers[:2]:
                x = layer.step(x)
            return self.norm(x)  # type: ignore[no-any-return]

    class Whole(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self, encoder: Any) -> None:
            super().__init__()
            self.encoder = encoder
            made = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True), 3)
            self.coder = made
            self.coder.layers = again(names, self.coder.layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen: list[torch.Tensor] = []
            x = self.encoder(x, seen)[:, None]
            for layer in self.coder.layers:
                x = layer(x)
            return self.coder(x)[:, 0] + seen[0]  # type: ignore[no-any-return]

    # Every constructor ends outside of any other, so every layer is sharded by itself before a list takes it over.
    return Whole(Encoder(nn.ModuleList([Layer() for _ in range(3)])))


@on_ranks(*WORLDS)
def test_given_lists() -> None:
    oracle.matches(build)
    model = build(models.sharded())
    blocks = [*model.encoder.layers, *model.coder.layers]
    assert len(blocks) == 6 and all(isinstance(block, bmt.Block) for block in blocks)
    with torch.no_grad():
        model.eval()(oracle.inputs(0))
    assert not any(block.__dict__["_bmt"].unit.moves and block.__dict__["_bmt"].unit.is_whole for block in blocks)
