"""Tensors of a state dict: copies to keep, save and compute with, through which the model can be written."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import models
import oracle
import pytest
import torch
from oracle import WIDTH
from ranks import RanksFailed, on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(x).tanh())  # type: ignore[no-any-return]


def pair() -> tuple[Any, Any]:
    return oracle.pair(lambda names: Net() if names.Module is nn.Module else wrapped(Net()))


def wrapped(net: Any) -> Any:
    net.mid = bmt.CheckpointBlock(net.mid)
    return bmt.BMTrainModelWrapper(net)


def take_what_fits(own: dict[str, Any]) -> None:
    saved = {"mid.weight": torch.full((6, 6), 0.05), "mid.bias": torch.zeros(6), "head.weight": torch.zeros(9, 8)}
    for name, value in saved.items():
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)


WRITES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "take what fits": take_what_fits,
    "operators": lambda own: [own["mid.weight"].__imul__(2), own["mid.bias"].__iadd__(1)],
    "one row": lambda own: own["emb.weight"].__setitem__(3, 0.5),
    "a row's row": lambda own: own["emb.weight"][2][1:3].fill_(7.0),
    "a slice": lambda own: own["mid.weight"][:2, 1:].zero_(),
    "a transposed one": lambda own: own["mid.weight"].t().copy_(torch.arange(36.0).view(6, 6)),
    "a mask": lambda own: own["mid.weight"].__setitem__(own["mid.weight"] > 0, 0.0),
    "a flat view": lambda own: own["mid.weight"].view(-1)[5:9].mul_(3),
    "detached": lambda own: own["mid.weight"].detach().add_(1),
    "data": lambda own: own["mid.weight"].data.copy_(torch.ones(6, 6)),
    "unbound": lambda own: [row.zero_() for row in own["mid.weight"].unbind()[:2]],
    "lists": lambda own: torch._foreach_mul_([own["mid.weight"], own["mid.bias"]], 0.5),
    "out": lambda own: torch.add(own["mid.bias"], 1, out=own["mid.bias"]),
    "initialised": lambda own: [nn.init.constant_(own["mid.bias"], 0.3), nn.init.eye_(own["mid.weight"])],
    "tied": lambda own: own["head.weight"].mul_(2),
    "a buffer": lambda own: own["norm.running_mean"].fill_(3.0),
    "all": lambda own: [v.mul_(0.9) for v in own.values() if v.is_floating_point()],
    "through numpy": lambda own: own["mid.bias"].numpy().sum(),
}  # fmt: skip


@on_ranks(2, init={"schedule": "stress"})
def test_writes_reach_the_model_where_memory_is_apart() -> None:
    writes_reach_the_model()


@on_ranks(1, 2, 3)
def test_writes_reach_the_model() -> None:
    writes_reach_the_model()


def writes_reach_the_model() -> None:
    for what, write in WRITES.items():
        plain, model = pair()
        owns = [m.state_dict() for m in (model, plain)]
        with torch.no_grad():  # the model goes on: a write in part must not bring old values back
            for m in (model, plain):
                for p in m.parameters():
                    p.mul_(0.5)
        for own in owns:
            if what != "through numpy" or not own["mid.bias"].is_cuda:  # numpy reads the host's memory alone
                write(own)
        for (key, value), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
            torch.testing.assert_close(value.clone(), other, msg=lambda m, what=what, key=key: f"{what}, {key}: {m}")
        x = oracle.inputs(0)
        torch.testing.assert_close(model(x), plain(x))
    if not model.state_dict()["mid.bias"].is_cuda:
        with pytest.raises(ValueError, match="read-only"):
            model.state_dict()["mid.bias"].numpy()[0] = 1.0
    with bmt.gathered(model, write=True):
        model.state_dict()["mid.bias"].copy_(torch.ones(6))
    assert torch.equal(model.mid.bias.gather(), torch.ones(6))


@on_ranks(1, 2)
def test_a_default_device_does_not_say_where_a_copy_lies() -> None:
    _, model = pair()
    own = model.state_dict()
    with torch.device("meta"):
        nn.init.eye_(own["mid.weight"])
        torch.zeros(6, out=own["mid.bias"])
    assert torch.equal(model.mid.weight.gather().cpu(), torch.eye(6, device="cpu"))
    assert not model.mid.bias.gather().any()


@on_ranks(1, 2)
def test_all_else_is_as_for_ordinary_tensors(tmp_path: Any) -> None:
    plain, model = pair()
    own = model.state_dict()
    kept = {k: v.clone() for k, v in own.items()}
    best, also = copy.deepcopy(own), copy.copy(own)
    for some in (kept, best, {k: v + 0 for k, v in own.items()}, {k: v.cpu().double() for k, v in own.items()}):
        assert all(type(v) is torch.Tensor for v in some.values() if v.is_floating_point())
        for v in some.values():
            v.zero_()
    oracle.assert_same_weights(model, plain, exact=True)
    path = tmp_path / f"{bmt.rank()}.pt"
    torch.save(also, path)
    for read in (torch.load(path, weights_only=True), pickle.loads(pickle.dumps(own))):
        assert all(type(v) is torch.Tensor for v in read.values())
        assert list(read) == list(plain.state_dict())
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in read.items())
        assert read["head.weight"].data_ptr() == read["emb.weight"].data_ptr(), "tied in the file, too"
    assert path.stat().st_size < 8000, "nothing but its own values"
    Net().load_state_dict(own)
    model.load_state_dict(own)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert own["emb.weight"].any(), "values of when it was taken"
    model.load_state_dict(own)
    oracle.assert_same_weights(model, plain, exact=True)


@on_ranks(1, 2)
def test_buffers_may_be_in_parts() -> None:
    plain, model = pair()
    for m in (model, plain):
        m.mid.register_buffer("start", m.mid.weight.data.clone())
        m.mid.weight.data.zero_()
        own = m.state_dict()
        assert own["mid.start"].any() and not own["mid.weight"].any()
        own["mid.start"][0] = 3.0
        m.load_state_dict({k: v.clone() for k, v in own.items()})
    oracle.assert_same_weights(model, plain, exact=True)


@on_ranks(2)
def test_ranks_that_write_different_values_follow_rank_0() -> None:
    _, model = pair()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.state_dict()["mid.bias"].fill_(float(bmt.rank() + 1))
    assert torch.equal(model.mid.bias.gather(), torch.ones(6))
    assert len([w for w in caught if "different values" in str(w.message)]) == (bmt.rank() == 0)


def write_on_rank_0() -> str:
    engine: Any = context().engine
    engine.schedule.trace._patience = timedelta(seconds=2)
    _, model = pair()
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    own = model.state_dict()
    for step in range(3):
        if bmt.rank() == 0 and step == 1:
            own["mid.bias"].zero_()
        manager.backward(oracle.mean(model(models.share(oracle.inputs(0)))))
        manager.step()
    return "silent"


def test_a_write_on_one_rank_is_found_out() -> None:
    with pytest.raises(RanksFailed, match="RankDivergenceError"):
        run_ranks(2, write_on_rank_0, timeout=40, fresh=True, init={"timeout": timedelta(seconds=4)})


@on_ranks(1, 2)
def test_what_was_just_loaded_is_read_without_a_warning() -> None:
    _, model = pair()
    own = model.state_dict()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    own.update({"mid.bias": torch.ones(6)})
    with pytest.warns(UserWarning, match="values changed"):
        model.load_state_dict(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(value.clone(), model.state_dict()[name]) for name, value in own.items())
    model.load_state_dict(kept)
    with pytest.warns(UserWarning, match="values changed"):
        own["mid.weight"].clone()
    crossed = model.state_dict()
    model.load_state_dict({**crossed, "mid.weight": crossed["mid.weight"].t()})
    with pytest.warns(UserWarning, match="values changed"):
        crossed["mid.weight"].clone()


@on_ranks(2)
def test_buffers_that_were_just_loaded_are_read_without_a_warning() -> None:
    _, model = pair()
    model.mid.register_buffer("start", model.mid.weight.data.clone())  # in parts, so that state dicts have a copy
    own = model.state_dict()
    model.mid.start.mul_(0.5)
    with pytest.warns(UserWarning, match="values changed"):
        model.load_state_dict(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(own["mid.start"].clone(), model.state_dict()["mid.start"])
    model.load_state_dict({**own, "mid.start": torch.zeros(6, 6)})
    with pytest.warns(UserWarning, match="values changed"):
        own["mid.start"].clone()


class Sharing(bmt.DistributedModule):
    """Blocks, one of them inside another module, whose parameters the model around them has, too."""

    def __init__(self, where: str) -> None:
        super().__init__()
        first, inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        if where == "before":
            self.tied = first
        self.blocks = bmt.TransformerBlockList([bmt.CheckpointBlock(nn.Sequential(first, nn.BatchNorm1d(WIDTH)))])
        self.middle = bmt.BMTrainModelWrapper(nn.Sequential(bmt.CheckpointBlock(nn.Sequential(inner))))
        self.own = bmt.DistributedParameter(torch.ones(3))
        if where == "behind":
            self.tied, self.deep = first, inner
        elif where == "weights":
            self.weight, self.deep = first.weight, nn.ParameterList([inner.bias])
        elif where == "blocks":
            self.others = bmt.TransformerBlockList([bmt.CheckpointBlock(nn.Sequential(first, inner))])


@pytest.mark.parametrize("schedule", [None, "stress"])
@pytest.mark.parametrize("where", ["before", "behind", "weights", "blocks"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_blocks_share_with_the_model_is_one_copy(world_size: int, where: str, schedule: str | None) -> None:
    run_ranks(world_size, shares_copies, where, init={"schedule": schedule} if schedule else {})


def shares_copies(where: str) -> None:
    model = Sharing(where)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    for inside in (False, True):
        with bmt.gathered(model) if inside else contextlib.nullcontext():
            state = model.state_dict()
            block = model.blocks[0].state_dict()
        places: dict[int, list[str]] = {}
        for name, value in state.items():
            places.setdefault(value.data_ptr(), []).append(name)
            assert torch.equal(value, plain[name]), name
        together = sorted(names for names in places.values() if len(names) > 1)
        assert together == sorted(names for names in SHARED[where] if len(names) > 1), together
        assert all(torch.equal(block[name], plain[f"blocks.0.{name}"]) for name in block)
    for number, name in enumerate(("blocks.0.0.weight", "blocks.0.1.running_mean", "middle.0.0.bias", "own")):
        state[name].fill_(3.0 + number)
        assert model.state_dict()[name].eq(3.0 + number).all(), name
    block["0.bias"].fill_(9.0)
    assert model.state_dict()["blocks.0.0.bias"].eq(9.0).all()


SHARED = {
    "before": [["tied.weight", "blocks.0.0.weight"], ["tied.bias", "blocks.0.0.bias"]],
    "behind": [
        [f"{block}.{kind}", f"{name}.{kind}"]
        for block, name in (("blocks.0.0", "tied"), ("middle.0.0", "deep"))
        for kind in ("weight", "bias")
    ],
    "weights": [["weight", "blocks.0.0.weight"], ["middle.0.0.bias", "deep.0"]],
    "blocks": [
        [f"{block}.{kind}", f"{name}.{kind}"]
        for block, name in (("blocks.0.0", "others.0.0"), ("middle.0.0", "others.0.1"))
        for kind in ("weight", "bias")
    ],
}
