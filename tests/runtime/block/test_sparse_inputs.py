"""Sparse tensors, which have no memory of one piece: saved by autograd, as inputs of blocks, and as buffers."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import bmtrain as bmt


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        return torch.relu(torch.sparse.mm(neighbours, x @ self.weight))


class Graph(nn.Module):
    def __init__(self, neighbours: Tensor | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Convolution() for _ in range(3)])
        self.register_buffer("neighbours", neighbours)

    def forward(self, x: Tensor, neighbours: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.neighbours if neighbours is None else neighbours)
        return x


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("buffer", [False, True])
@on_ranks(1, 2)
def test_a_sparse_graph(layout: torch.layout, blocks: bool, buffer: bool) -> None:
    torch.manual_seed(0)
    neighbours, x = (torch.rand(6, 6) > 0.5).float().to_sparse(layout=layout), torch.randn(6, 4)
    plain, model = (Graph(neighbours if buffer else None) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    for layer in model.layers if blocks else ():
        bmt.Block(layer, use_checkpoint=True)
    given = () if buffer else (neighbours,)
    model = bmt.BMTrainModelWrapper(model)
    steps = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (plain, model)]
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(steps[1])
    for _ in range(2):
        loss = plain(x, *given).square().mean()
        steps[0].zero_grad()
        loss.backward()
        steps[0].step()
        manager.zero_grad()
        manager.backward(model(x, *given).square().mean())
        manager.step()
    state = model.state_dict()
    assert all(torch.allclose(state[name].to_dense(), value.to_dense()) for name, value in plain.state_dict().items())
    model.load_state_dict(plain.state_dict())
    if buffer:
        dense = dict(plain.state_dict(), neighbours=neighbours.to_dense())
        with pytest.raises(bmt.errors.CheckpointError, match="neighbours: a strided tensor given"):
            model.load_state_dict(dense)
