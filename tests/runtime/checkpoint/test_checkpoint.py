"""Checkpoints: the original's keys and values, loaded all or not at all, written all or not at all."""

from __future__ import annotations

import json
import os
import struct
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block import in_turn
from bmtrain.errors import CheckpointError, CommunicationError, RankDivergenceError

WORLDS = [1, 2, 3]


@on_ranks(*WORLDS)
def test_checkpoints_are_the_originals(tmp_path: Path) -> None:
    for name in models.BUILDERS:
        reference = models.build(name, models.plain())
        model = models.build(name, models.sharded())
        state = model.state_dict()
        assert list(state) == list(reference.state_dict())
        for key, value in reference.state_dict().items():
            assert torch.equal(state[key], value) and state[key].device.type == "cpu" and not state[key].requires_grad
        path = os.path.join(tmp_path, f"{name}.pt")
        bmt.save(model, path)
        other = models.build(name, models.plain(), seed=8)
        assert other.load_state_dict(torch.load(path, weights_only=True))
        oracle.assert_same_weights(other, reference, exact=True)
        again = models.build(name, models.sharded(), seed=9)
        bmt.load(again, path)
        oracle.assert_same_weights(again, reference, exact=True)
        again = models.build(name, models.sharded(), seed=9)
        assert not again.load_state_dict(reference.state_dict()).missing_keys
        oracle.assert_same_weights(again, reference, exact=True)
        tokens, targets = models.batch(name, 0)
        oracle.assert_close(again(tokens, targets).detach(), reference(tokens, targets).detach(), "loss")
    if bmt.rank() == 0:
        assert sorted(os.listdir(tmp_path)) == ["awkward.pt", "gpt.pt"], "no temporary files are left"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2)])
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)  # type: ignore[no-any-return]


def make(seed: int = 0) -> tuple[Net, Net]:
    torch.manual_seed(seed)
    plain = Net()
    torch.manual_seed(seed)
    return plain, bmt.BMTrainModelWrapper(Net())


@on_ranks(*WORLDS)
def test_a_state_that_does_not_fit_is_named_and_not_loaded() -> None:
    plain, model = make()
    good = model.state_dict()
    missing = {k: v for k, v in good.items() if k not in ("norm.running_mean", "layers.1.0.bias")}
    extra = {**good, "layers.2.weight": torch.ones(2), "unknown": torch.ones(1)}
    shape = {**good, "layers.0.0.weight": torch.ones(3, 6), "norm.bias": torch.ones(5)}
    for wrong, named in (
        (missing, ["norm.running_mean", "layers.1.0.bias"]),
        (extra, ["layers.2.weight", "unknown"]),
        (shape, ["layers.0.0.weight", "norm.bias", "(3, 6)", "(6, 6)"]),
        ({**missing, **{k: v for k, v in shape.items() if k in missing}, "unknown": torch.ones(1)},
         ["norm.running_mean", "layers.0.0.weight", "unknown"]),
    ):  # fmt: skip
        wrong = {k: v * 3 if v.is_floating_point() else v for k, v in wrong.items()}
        with pytest.raises(CheckpointError, match="nothing was loaded") as caught:
            model.load_state_dict(wrong)
        assert all(name in str(caught.value) for name in named), str(caught.value)
        oracle.assert_same_weights(model, plain, exact=True)
    result = model.load_state_dict({**extra, "steps": torch.tensor(7)}, strict=False)
    assert sorted(result.unexpected_keys) == ["layers.2.weight", "unknown"] and int(model.steps) == 7
    result = model.load_state_dict(missing, strict=False)
    assert sorted(result.missing_keys) == ["layers.1.0.bias", "norm.running_mean"]
    with pytest.raises(CheckpointError):
        model.load_state_dict(shape, strict=False)


@pytest.mark.parametrize("kind", ["one bit", "empty", "shape", "buffer"])
@on_ranks(2, 3)
def test_other_values_on_other_ranks_are_not_loaded(kind: str) -> None:
    plain, model = make()
    state = {k: v * 3 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    key = "norm.running_mean" if kind == "buffer" else "layers.1.0.bias"
    if bmt.rank() == bmt.world_size() - 1:
        if kind == "empty":
            state = {}
        elif kind == "shape":
            state[key] = torch.ones(4)
        else:
            state[key].view(torch.int32)[2] ^= 1
    with pytest.raises(CheckpointError, match=r"(?i)nothing was loaded") as caught:
        model.load_state_dict(state, strict=False)
    assert kind == "empty" or key in str(caught.value)
    oracle.assert_same_weights(model, plain, exact=True)


def load_on(loading: int, then: str) -> str:
    plain, model = make()
    start = time.monotonic()
    try:
        if bmt.rank() == loading:
            model.load_state_dict({k: torch.zeros_like(v) for k, v in plain.state_dict().items()})
        if then == "forward":
            model(torch.ones(2, 6))
    except (RankDivergenceError, CommunicationError) as error:  # who is first, its own limit or the watchdog's
        assert time.monotonic() - start < 20
        return str(error)
    return "no error"


@pytest.mark.parametrize("then", ["forward", "nothing"])
def test_a_load_on_one_rank_is_named(then: str) -> None:
    said = run_ranks(2, load_on, 0, then, timeout=60, fresh=True, init={"timeout": timedelta(seconds=5)})
    assert "load_state_dict of" in said[0], said
    if then == "forward":
        assert "load_state_dict of" in said[1], said


@on_ranks(1, 2)
def test_parts_of_a_model_have_states() -> None:
    plain, model = make()
    assert list(model.layers.state_dict()) == list(plain.layers.state_dict())
    for key, value in plain.layers[1].state_dict().items():
        assert torch.equal(model.layers[1].state_dict()[key], value)
    for key, value in plain.layers.state_dict().items():
        assert torch.equal(model.layers.state_dict()[key], value), key
    model.layers[0].load_state_dict(plain.layers[1].state_dict())
    plain.layers[0].load_state_dict(plain.layers[1].state_dict())
    oracle.assert_same_weights(model, plain, exact=True)
    with bmt.gathered(model.layers[0][1]):  # not a block of its own
        assert torch.equal(model.layers[0][1].state_dict()["weight"], plain.layers[0][1].weight)
    model.layers[0][1].load_state_dict(plain.layers[1][0].state_dict())
    plain.layers[0][1].load_state_dict(plain.layers[1][0].state_dict())
    oracle.assert_same_weights(model, plain, exact=True)
    assert torch.equal(model.state_dict(prefix="x.")["x.norm.weight"], plain.norm.weight)


@on_ranks(1, 2)
def test_models_that_rename_keys_keep_doing_so() -> None:
    def old_names(state: dict[str, Any], *_: Any) -> None:
        if "old" in state:
            state["norm.weight"] = state.pop("old")

    plain, model = make()
    for m in (plain, model):
        m.register_load_state_dict_pre_hook(lambda module, state, *rest: old_names(state))
        m.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update(extra=torch.ones(1)))
    state = plain.state_dict()
    assert set(model.state_dict()) == set(state)
    state["old"] = state.pop("norm.weight") * 2
    del state["extra"]
    plain.load_state_dict(dict(state))
    model.load_state_dict(dict(state))
    oracle.assert_same_weights(model, plain, exact=True)


@on_ranks(1, 2)
def test_a_failed_write_is_told_everywhere_and_leaves_the_old_file(tmp_path: Path) -> None:
    _, model = make()
    path = os.path.join(tmp_path, "model.pt")
    bmt.save(model, path)
    before = Path(path).read_bytes()
    bmt.synchronize()
    with pytest.raises(CheckpointError, match="Rank 0 could not write"):
        bmt.save(model, os.path.join(tmp_path, "missing", "model.pt"))
    unpicklable = {"model": model.state_dict(), "bad": (lambda: None) if bmt.rank() == 0 else None}
    with pytest.raises(CheckpointError, match="Rank 0 could not write"):
        bmt.save_checkpoint(unpicklable, path)
    assert Path(path).read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]
    bmt.synchronize()
    old = os.path.join(tmp_path, "old.pt")
    bmt.save_checkpoint({"step": 1}, old, _use_new_zipfile_serialization=False)
    assert torch.load(old) == {"step": 1} and not zipfile.is_zipfile(old)
    for broken, said in (("nothing.pt", "nothing.pt"), ("model.txt", "model.txt")):
        if broken == "model.txt" and bmt.rank() == 0:
            Path(tmp_path, broken).write_bytes(b"not a checkpoint")
        bmt.synchronize()
        with pytest.raises(CheckpointError, match=said):
            bmt.load(model, os.path.join(tmp_path, broken))


@on_ranks(3)
def test_ranks_without_the_file_get_it_from_rank_0(tmp_path: Path) -> None:
    """Only rank 0 has the file."""
    _, model = make(0)
    here = os.path.join(tmp_path, f"rank{bmt.rank()}.pt")
    state = {k: v + 1 for k, v in model.state_dict().items()}
    if bmt.rank() == 0:
        torch.save(state, here)
    bmt.load(model, here)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def non_blocking(folder: str) -> str:
    _, model = make()
    path = os.path.join(folder, "late.pt")
    bmt.save(model, path, non_blocking=True)
    return path


def test_a_file_may_be_written_in_the_background(tmp_path: Path) -> None:
    import time

    path = run_ranks(2, non_blocking, str(tmp_path))[0]
    deadline = time.monotonic() + 20
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "norm.weight" in torch.load(path, weights_only=True)


@on_ranks(1, 2)
def test_writes_in_the_background_keep_their_order_and_tell_their_errors(tmp_path: Path) -> None:
    from bmtrain.checkpoint import files

    _, model = make()
    path = os.path.join(tmp_path, "late.pt")
    write, slow = files.write, [0.3, 0.0, 0.0]
    files.write = lambda *args, **options: (time.sleep(slow.pop(0)), write(*args, **options))  # type: ignore[assignment]
    try:
        for value in (1.0, 2.0):
            with bmt.gathered(model, write=True), torch.no_grad():
                model.norm.bias.fill_(value)
            bmt.save(model, path, non_blocking=True)
        bmt.save(model, os.path.join(tmp_path, "another.pt"))
    finally:
        files.write = write
    assert (torch.load(path)["norm.bias"] == 2).all()
    bmt.save(model, os.path.join(tmp_path, "missing", "late.pt"), non_blocking=True)
    with pytest.raises(CheckpointError, match=r"in the background.*missing.*FileNotFoundError"):
        bmt.save(model, path)
    bmt.save(model, path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2)])
        self.first, self.last = nn.Embedding(4, 6), nn.Linear(6, 4, bias=False)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.half, self.empty = nn.Linear(3, 2).half(), nn.Parameter(torch.empty(0, 3))
        self.register_buffer("flags", torch.tensor([True, False]))


@on_ranks(*WORLDS)
def test_a_file_is_what_torch_writes(tmp_path: Path) -> None:
    plain = Tied()
    bmt.save(bmt.BMTrainModelWrapper(Tied()), tmp_path / "model.pt")
    expected = plain.state_dict()
    for options in ({"mmap": True}, {"mmap": False}, {"weights_only": False}):
        state = torch.load(tmp_path / "model.pt", **options)
        assert type(state) is type(expected) and list(state) == list(expected)
        assert state._metadata == expected._metadata
        assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in expected.items())
        assert state["first.weight"].data_ptr() == state["last.weight"].data_ptr()
        assert all(type(value) is torch.Tensor for value in state.values())


@on_ranks(2)
def test_whole_values_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turn, "_AT_ONCE", 64)
    model, plain = bmt.BMTrainModelWrapper(Tied()), Tied()
    for name, value in in_turn.named_state(model).items():
        pieces = [(start, piece.clone()) for start, piece in in_turn.whole_in_pieces(value)]
        assert [start for start, _ in pieces] == [sum(p.numel() for _, p in pieces[:i]) for i in range(len(pieces))]
        whole = torch.cat([piece for _, piece in pieces]) if pieces else torch.empty(0)
        assert torch.equal(whole, plain.state_dict()[name].reshape(-1).to(whole.dtype))
        if isinstance(value, nn.Parameter):
            assert all(piece.nbytes <= 64 for _, piece in pieces)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], **wrong: object) -> None:
    """By hand, as the format is documented."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bool: "BOOL", torch.int64: "I64"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes], **wrong}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    parts = (tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors.values())
    data = b"".join(part.numpy().tobytes() for part in parts)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@on_ranks(1, 2)
def test_what_is_no_file_of_safetensors_is_refused(tmp_path: Path) -> None:
    model, before = bmt.BMTrainModelWrapper(Tied()), Tied()
    state = {name: value + 1 if value.is_floating_point() else value for name, value in before.state_dict().items()}
    if bmt.rank() == 0:
        (tmp_path / "empty.safetensors").write_bytes(b"")
        (tmp_path / "text.safetensors").write_bytes(b"words " * 9)
        write_safetensors(tmp_path / "short.safetensors", state)
        cut = (tmp_path / "short.safetensors").read_bytes()[:-9]
        (tmp_path / "short.safetensors").write_bytes(cut)
        write_safetensors(tmp_path / "dtype.safetensors", state, dtype="F4")
        write_safetensors(tmp_path / "shape.safetensors", state, shape=[3])
        write_safetensors(tmp_path / "few.safetensors", {"norm.weight": state["norm.weight"]})
        (tmp_path / "folder").mkdir()
    bmt.synchronize()
    for name in ("empty", "text", "short", "dtype", "shape", "few"):
        with pytest.raises(CheckpointError):
            bmt.load(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="none of model"):
        bmt.load(model, tmp_path / "folder")
    oracle.assert_same_weights(model, before, exact=True)


@on_ranks(1, 2)
def test_files_of_safetensors_and_folders_are_loaded(tmp_path: Path) -> None:
    state = {n: v + 1 if v.is_floating_point() else v for n, v in Tied().state_dict().items() if n != "last.weight"}
    names = list(state)
    if bmt.rank() == 0:
        write_safetensors(tmp_path / "any.safetensors", state)
        for folder in ("one", "several", "old"):
            (tmp_path / folder).mkdir()
        write_safetensors(tmp_path / "one" / "model.safetensors", state)
        torch.save(state, tmp_path / "old" / "pytorch_model.bin")
        for number in range(2):
            part = {name: state[name] for name in names[number::2]}
            write_safetensors(tmp_path / "several" / f"model-{number}.safetensors", part)
        index = {"weight_map": {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}}
        (tmp_path / "several" / "model.safetensors.index.json").write_text(json.dumps(index))
    bmt.synchronize()
    for name in ("any.safetensors", "one", "several", "old"):
        model = bmt.BMTrainModelWrapper(Tied())
        bmt.load(model, tmp_path / name)
        loaded = model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
        assert torch.equal(loaded["last.weight"], state["first.weight"])
