"""What goes between ranks is read without running code."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ranks import on_ranks

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import CommunicationError, UnsupportedError
from bmtrain.rng import Draws
from bmtrain.wire import from_bytes, to_bytes


class Stranger:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


class Own:
    pass


def test_plain_values_come_back() -> None:
    for value in (
        None, 3, 2.5, "text", b"bytes", 1 + 2j, [1, (2, {"a": {3}})], OrderedDict(a=1), frozenset({1}), range(3),
        slice(1, 2), torch.Size([2]), torch.bfloat16, Path("a") / "b", numpy.float32(2), numpy.dtype("int16"),
    ):  # fmt: skip
        found = from_bytes(to_bytes(value))
        assert type(found) is type(value) and found == value
    state = numpy.random.get_state()
    assert numpy.array_equal(from_bytes(to_bytes(state))[1], state[1])
    assert torch.equal(from_bytes(to_bytes({"a": torch.arange(4)}))["a"], torch.arange(4))


@pytest.mark.parametrize("value", [Own(), {"deep": [Own]}, Stranger("x"), len, os.system])
def test_other_classes_are_refused_by_who_sends(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="add_safe_globals"):
        to_bytes(value)


def test_a_class_may_be_allowed() -> None:
    with torch.serialization.safe_globals([Own]):
        assert isinstance(from_bytes(to_bytes(Own())), Own)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "old torch.save", "noise", "nothing", "cut"])
def test_nothing_of_a_strangers_runs(how: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    file = tmp_path / "file"
    if how in ("torch.save", "old torch.save"):
        torch.save(Stranger(str(mark)), file, _use_new_zipfile_serialization=how == "torch.save")
        data = file.read_bytes()
    else:
        whole = pickle.dumps(Stranger(str(mark)))
        data = {"pickle": whole, "noise": os.urandom(64), "nothing": b"", "cut": to_bytes([1] * 99)[:-40]}[how]
    with pytest.raises(CommunicationError, match="refused"):
        from_bytes(data)
    assert not mark.exists()


@on_ranks(2)
def test_a_pickle_in_the_store_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    if bmt.rank() == 1:
        context().store.set("draws/poisoned", pickle.dumps(Stranger(str(mark))).hex())
        with pytest.raises(CommunicationError):
            Draws(context(), "poisoned")
    assert not mark.exists()


@on_ranks(1, 2, 3)
def test_a_refusal_reaches_every_rank() -> None:
    last = bmt.rank() == bmt.world_size() - 1
    with pytest.raises(UnsupportedError, match="Own" if last else "Rank|Own"):
        bmt.store.allgather_objects(Own() if last else 3)
    if bmt.world_size() > 1:
        with pytest.raises(UnsupportedError):
            bmt.store.broadcast_object(Own(), src=0)
    assert bmt.store.allgather_objects(bmt.rank()) == list(range(bmt.world_size()))
    assert bmt.store.broadcast_object([bmt.rank(), "a"], src=0) == [0, "a"]
