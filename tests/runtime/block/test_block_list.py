"""A TransformerBlockList is a list of blocks that can also be called."""

from __future__ import annotations

from typing import Any

import models
import oracle
import pytest
import torch
from oracle import WIDTH
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ConfigurationError

WORLDS = [1, 2]


class Pair(nn.Module):
    """Carries two hidden values."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float, *, shift: float = 0.0) -> Any:
        return self.lin(y) * scale + shift, torch.tanh(x)


@on_ranks(*WORLDS)
def test_it_is_a_list() -> None:
    blocks = bmt.TransformerBlockList([nn.Linear(WIDTH, WIDTH) for _ in range(5)])
    assert isinstance(blocks, nn.ModuleList) and len(blocks) == 5
    assert all(isinstance(b, bmt.Block) and isinstance(b, nn.Linear) for b in blocks)
    assert blocks[-1] is blocks[4] and blocks[0] is next(iter(blocks)) and blocks[1] in blocks
    assert [b is blocks[i + 1] for i, b in enumerate(blocks[1:4])] == [True] * 3
    assert isinstance(blocks[1:], bmt.TransformerBlockList) and len(blocks[::2]) == 3
    both = blocks[:2] + [blocks[4], nn.Linear(WIDTH, WIDTH)]
    assert isinstance(both, bmt.TransformerBlockList) and both[2] is blocks[4] and isinstance(both[3], bmt.Block)
    with pytest.raises(IndexError):
        blocks[5]
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        expected = blocks[3](blocks[2](x))
        assert torch.equal(blocks[2:4](x), expected)
    blocks.append(nn.Linear(WIDTH, WIDTH))
    blocks.insert(0, nn.Linear(WIDTH, WIDTH))
    blocks[3] = nn.Linear(WIDTH, WIDTH)
    blocks.extend([nn.Linear(WIDTH, WIDTH)])
    del blocks[1]
    assert len(blocks) == 7 and all(isinstance(b, bmt.Block) for b in blocks)
    assert list(blocks.state_dict())[:2] == ["0.weight", "0.bias"]
    assert len(bmt.TransformerBlockList(nn.Linear(2, 2) for _ in range(2))) == 2
    assert bmt.TransformerBlockList([None, nn.Linear(2, 2)])[0] is None  # type: ignore[list-item]
    assert bmt.CheckpointBlock(None) is None, "what factories of optional parts give"
    for wrong in ((), (3,)):
        with pytest.raises(ConfigurationError, match="takes a torch"):
            bmt.Block(*wrong)
    empty = bmt.TransformerBlockList([])
    assert len(empty) == 0 and torch.equal(empty(x), x)


@on_ranks(*WORLDS)
def test_a_call_is_the_loop() -> None:
    for recompute in (True, False):

        def build(names: models.Names) -> Any:
            class Model(names.Module):  # type: ignore[misc, name-defined]
                def __init__(self) -> None:
                    super().__init__()
                    self.layers = names.stack([Pair() for _ in range(3)])
                    if isinstance(self.layers, bmt.TransformerBlockList):
                        self.layers.num_hidden = 2

                def forward(self, x: torch.Tensor) -> Any:
                    y = x * 0.5
                    if isinstance(self.layers, bmt.TransformerBlockList):
                        x, y, xs, ys = self.layers(x, y, 0.5, shift=0.1, return_hidden_states=True)
                        return torch.cat([x, y, xs.sum(0), ys.sum(0)], 1)
                    seen = []
                    for layer in self.layers:
                        seen.append((x, y))
                        x, y = layer(x, y, 0.5, shift=0.1)
                    return torch.cat([x, y, *(torch.stack(part).sum(0) for part in zip(*seen, strict=True))], 1)

            return Model()

        oracle.matches(build, recompute=recompute)


@on_ranks(*WORLDS)
def test_hidden_states_are_the_inputs_of_every_block() -> None:
    blocks = bmt.TransformerBlockList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    x = torch.randn(2, WIDTH)
    out, states = blocks(x, return_hidden_states=True)
    assert states.shape == (3, 2, WIDTH) and torch.equal(states[0], x)
    assert torch.allclose(blocks[2](states[2]), out)
    pairs = bmt.TransformerBlockList([Pair(), Pair()], num_hidden=2)
    result = pairs(x, x, 1.0, return_hidden_states=True)
    assert len(result) == 4 and result[2].shape == result[3].shape == (2, 2, WIDTH)


@on_ranks(*WORLDS)
def test_one_module_at_two_places() -> None:
    """One module at two places is one block, with one set of weights."""
    linear = nn.Linear(WIDTH, WIDTH)
    blocks = bmt.TransformerBlockList([linear, linear])
    assert blocks[0] is blocks[1] and len(list(blocks.parameters())) == 2
    plain = nn.Linear(WIDTH, WIDTH)
    plain.load_state_dict({k.removeprefix("0."): v for k, v in blocks.state_dict().items() if k.startswith("0.")})
    oracle.mean(plain(plain(oracle.inputs(0)))).backward()
    bmt.optim.OptimManager().backward(oracle.mean(blocks(models.share(oracle.inputs(0)))))
    oracle.assert_same_grads(blocks[0], plain)
