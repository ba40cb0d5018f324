"""Models saved, loaded and handed over as published scripts do."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain import store
from bmtrain.context import context
from bmtrain.errors import CheckpointError, ConfigurationError

WIDTH = 3


class Layer(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(x)  # type: ignore[no-any-return]


class Base(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = bmt.DistributedParameter(torch.randn(5, WIDTH))
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Layer()) for _ in range(2)])
        self.tied = self.layers[0].project
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layers(x))  # type: ignore[no-any-return]


class TakesNothing(Base):
    def state_dict(self) -> Any:  # type: ignore[override]
        return store._save_to_rank0(self)


class PassesOn(Base):
    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:  # type: ignore[override]
        return store._save_to_rank0(self, destination, prefix)


class TakesAnything(Base):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict((f"model.{n}", v) for n, v in store._save_to_rank0(self).items())


class AsksAbove(Base):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return super().state_dict(*args, **kwargs)


class AsksAboveAndSaves(Base):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        assert set(store._save_to_rank0(self, prefix="again.")) == (
            {f"again.{n}" for n in state} if bmt.rank() == 0 else set()
        )
        return state


class OfABlock(Layer):
    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return store._save_to_rank0(self, destination, prefix)


class Outer(bmt.DistributedModule):
    """The model that overrides the method is part of another, which does so too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TakesNothing()
        self.blocks = bmt.TransformerBlockList([bmt.CheckpointBlock(OfABlock()) for _ in range(2)])

    def state_dict(self) -> Any:  # type: ignore[override]
        return store._save_to_rank0(self)


def expected_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every value under its name in the state dict, by other means."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        dot = f"{name}." if name else ""
        found |= {f"{dot}{n}": p.gather().detach() for n, p in module.named_parameters(recurse=False)}  # type: ignore[call-arg]
        found |= {f"{dot}{n}": b for n, b in module.named_buffers(recurse=False)}
    return found


@on_ranks(1, 2)
def test_a_models_own_state_dict_may_be_made_of_save_to_rank0(tmp_path: Path) -> None:
    for kind in (TakesNothing, PassesOn, TakesAnything, AsksAbove, AsksAboveAndSaves, Outer):
        torch.manual_seed(0)
        model: Any = kind()
        expected = {("model." if kind is TakesAnything else "") + n: v for n, v in expected_of(model).items()}
        path = os.path.join(tmp_path, f"{kind.__name__}.pt")
        bmt.save(model, path)
        read = torch.load(path, weights_only=True)
        assert sorted(read) == sorted(expected), kind
        for name, value in expected.items():
            assert torch.equal(read[name], value.cpu()), (kind, name)
        on_every_rank = kind in (AsksAbove, AsksAboveAndSaves)
        assert set(model.state_dict()) == (set(expected) if on_every_rank or bmt.rank() == 0 else set()), kind
        torch.manual_seed(1)
        again = kind()
        assert not torch.equal(expected_of(again)[next(n for n in expected_of(model) if "weight" in n)],
                               expected_of(model)[next(n for n in expected_of(model) if "weight" in n)])  # fmt: skip
        if kind is not TakesAnything:
            bmt.load(again, path)
            for name, value in expected_of(again).items():
                assert torch.equal(value.cpu(), read[name]), (kind, name)


@on_ranks(1, 2)
def test_save_to_rank0_gives_what_state_dict_gives() -> None:
    model = Base()
    whole = model.state_dict()
    found = store._save_to_rank0(model)
    assert list(found) == (list(whole) if bmt.rank() == 0 else [])
    for name, value in found.items():
        assert torch.equal(value, whole[name]) and value.device.type == "cpu"
    if bmt.rank() == 0:
        assert found["tied.weight"].data_ptr() == found["layers.0.project.weight"].data_ptr()
        assert found._metadata.keys() == whole._metadata.keys()  # type: ignore[attr-defined]
    given = OrderedDict(here=1)
    assert store._save_to_rank0(model, given, "m.") is given
    assert ("m.embedding" in given) is (bmt.rank() == 0) and given["here"] == 1
    assert set(store._save_to_local_rank0(model)) == (set(whole) if bmt.config["local_rank"] == 0 else set())
    of_a_part = store._save_to_rank0(model.layers, prefix="layers.")
    assert set(of_a_part) == ({n for n in whole if n.startswith("layers.")} if bmt.rank() == 0 else set())
    plain = nn.Sequential(nn.Linear(2, 2), model)
    assert ("1.embedding" in store._save_to_rank0(plain)) is (bmt.rank() == 0)


@on_ranks(1, 2)
def test_hooks_of_the_state_dict_run() -> None:
    model = Base()
    model.layers[0].register_state_dict_pre_hook(lambda module, prefix, keep_vars: module.seen.fill_(7.0))
    model._register_state_dict_hook(lambda m, state, *_: OrderedDict((k.upper(), v) for k, v in state.items()))
    devices: list[str] = []
    model._register_state_dict_hook(lambda m, state, *_: devices.append(state["LAYERS.1.PROJECT.WEIGHT"].device.type))
    found = store._save_to_rank0(model)
    assert devices == ["cpu" if bmt.rank() == 0 else "meta"]  # no copies for nobody
    if bmt.rank() == 0:
        assert "EMBEDDING" in found and float(found["LAYERS.0.SEEN"]) == 7.0


@on_ranks(1, 2)
def test_save_param_to_cpu_is_obeyed() -> None:
    model, device = Base(), bmt.config["comm"] and torch.device(os.environ.get("BMTRAIN_TEST_DEVICE", "cpu"))
    assert bmt.config["save_param_to_cpu"] is True
    assert all(v.device.type == "cpu" for v in model.state_dict().values())
    bmt.config["save_param_to_cpu"] = False
    try:
        assert bmt.config["save_param_to_cpu"] is False
        whole = model.state_dict()
        assert all(v.device.type == device.type for v in whole.values())
        # Copies all the same: what is trained later does not change them.
        before = whole["embedding"].clone()
        with torch.no_grad():
            model.embedding.add_(1.0)
        assert torch.equal(whole["embedding"], before)
    finally:
        bmt.config["save_param_to_cpu"] = True


class Engine:
    """An inference engine of somebody else."""

    def __init__(self) -> None:
        self.pieces: list[dict[str, torch.Tensor]] = []

    def load_layer_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.pieces.append({n: v.clone() for n, v in state.items()})


@on_ranks(1, 2)
def test_save_to_infer_model() -> None:
    model, engine = Base(), Engine()
    store._save_to_infer_model(model, engine if context().topology.local_rank == 0 else None)
    assert bmt.config["save_param_to_cpu"] is True
    if context().topology.local_rank == 0:
        joined = {n: v for piece in engine.pieces for n, v in piece.items()}
        expected = expected_of(model)
        assert joined.keys() == expected.keys()
        assert all(torch.equal(joined[n], v) for n, v in expected.items())
        assert [{n.split(".")[0] for n in piece} for piece in engine.pieces[1:3]] == [{"layers"}, {"layers"}]
        assert not engine.pieces[1].keys() & engine.pieces[2].keys()  # block by block
    else:
        assert not engine.pieces
        expected_of(model)
    with pytest.raises(ConfigurationError, match="destination"):
        store._save_to_infer_model(model, engine, OrderedDict())


@on_ranks(1, 2)
def test_wrapped_tensors_and_states() -> None:
    rank = bmt.rank()
    wrapped = store.DistributedTensorWrapper(torch.arange(6.0) if rank == 0 else torch.empty(1), shape=(6,))
    assert wrapped.shape == (6,) and wrapped.numel() == 6 and wrapped.dtype == torch.float32
    assert torch.equal(wrapped.broadcast(), torch.arange(6.0))
    assert torch.equal(store.DistributedTensorWrapper(torch.tensor(True)).broadcast(), torch.tensor(True))
    half = store.DistributedTensorWrapper(torch.full((2, 0, 3), 1.0, dtype=torch.half)).broadcast()
    assert half.shape == (2, 0, 3) and half.dtype == torch.half
    model = Base()
    before = expected_of(model)["embedding"].clone()
    state = {n: v + 1 for n, v in model.state_dict().items()}
    mine = {n: store.DistributedTensorWrapper(v) for n, v in state.items()} if rank == 0 else {}
    model.load_state_dict(store.DistributedStateDictWrapper(mine))
    assert torch.equal(expected_of(model)["embedding"], before + 1)
    with pytest.raises(CheckpointError, match="DistributedTensorWrapper"):
        model.load_state_dict({n: store.DistributedTensorWrapper(v) for n, v in state.items()})


@on_ranks(1, 2)
def test_objects_of_all_ranks() -> None:
    for gather in (store.allgather_object, store.allgather_objects):
        assert gather({"rank": bmt.rank()}) == [{"rank": r} for r in range(bmt.world_size())]
        assert gather(bmt.rank(), bmt.config["comm"]) == list(range(bmt.world_size()))


@on_ranks(1, 2)
def test_written_in_the_background(tmp_path: Path) -> None:
    import threading

    model = Base()
    path, other = os.path.join(tmp_path, "a.pt"), os.path.join(tmp_path, "b.pt")
    state = store._save_to_rank0(model)
    if bmt.rank() == 0:
        thread = threading.Thread(target=store.async_save_to_file, args=(state, path))
        thread.start()
        thread.join()
        assert torch.equal(torch.load(path, weights_only=True)["embedding"], state["embedding"])
    bmt.save(model, other, non_blocking=True)
    if bmt.config["save_thread"] is not None:
        bmt.config["save_thread"].join()
    assert bmt.config["finish_save"] is True and bmt.config["save_thread"] is None
    bmt.synchronize()
    assert "embedding" in torch.load(other, weights_only=True)
