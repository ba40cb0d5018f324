"""What ranks tell each other goes over the CPU, whatever device the caller has made the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain import objects


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


@on_ranks(1, 2)
def test_under_another_default_device(folder: str) -> None:
    model = bmt.BMTrainModelWrapper(nn.Sequential(bmt.Block(nn.Linear(3, 3)), nn.Linear(3, 2)))
    x = torch.ones(4, 3, device=model[1].weight.device)
    with bmt.inspect.inspect_tensor() as inspected:
        out = model(x)
        bmt.inspect.record_tensor(out, "out")
        out.sum().backward()
    bmt.save(model, f"{folder}/model.pt")
    expected = model.state_dict()
    with torch.device("meta"):
        assert objects.allgather_objects(bmt.rank()) == list(range(bmt.world_size()))
        assert objects.broadcast_object({"rank": bmt.rank()}) == {"rank": 0}
        gathered = bmt.gather_result(x)
        grads: list[Any] = [bmt.gather_grad(p) for p in model.parameters()]
        summary = inspected.get_summary()
        bmt.load(model, f"{folder}/model.pt")
        found = model.state_dict()
        built = bmt.BMTrainModelWrapper(nn.Sequential(bmt.Block(nn.Linear(3, 3)), nn.Linear(3, 2)))
    assert gathered.shape == (4 * bmt.world_size(), 3) and gathered.eq(1).all()
    assert all(grad is not None and not grad.is_meta and grad.isfinite().all() for grad in grads)
    assert summary[0]["shape"][0] == 4 * bmt.world_size()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not any(value.is_meta for value in built.state_dict().values())
