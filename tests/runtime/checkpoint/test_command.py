"""``bmt-checkpoint``: without ranks, one tensor at a time."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_checkpointer import Job, assert_same

import bmtrain as bmt
from bmtrain.checkpoint import Checkpointer
from bmtrain.checkpoint.command import main


def written(folder: str) -> dict[str, Any]:
    job = Job(folder)
    for step in (1, 2):
        job.train(step, step)
        job.ckpt.save(step)
    job.ckpt.close()
    return job.facts()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(2, written, str(folder))[0]


def test_inspect(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, facts = saved
    assert main(["inspect", str(folder), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert "steps 1, 2" in said and "step 2, written by 2 ranks" in said and torch.__version__ in said
    for name, value in facts["model"].items():
        assert (
            name == "head.weight" or f"model.{name}  {tuple(value.shape)}  {value.dtype}".replace("torch.", "") in said
        )


def test_verify_names_what_is_damaged(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    assert main(["verify", str(folder)]) == 0
    file = folder / "step-0000000002" / "__1_0.distcp"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b"0", whole[:99] + bytes([whole[99] ^ 4]) + whole[100:]):
        file.write_bytes(damaged)
        assert main(["verify", str(folder)]) == 1
        assert "__1_0.distcp" in capsys.readouterr().out
    file.unlink()
    assert main(["verify", str(folder)]) == 1
    (folder / "step-0000000002" / ".metadata").unlink()  # then it is none, and the older one is taken
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", str(tmp_path)]) == 2 and "no whole checkpoint" in capsys.readouterr().err


def test_convert_to_a_plain_file(saved: Any, tmp_path: Path) -> None:
    folder, facts = saved
    assert main(["convert", str(folder), str(tmp_path / "model.pt")]) == 0
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert_same(found, facts["model"])
    assert found["head.weight"] is found["last.weight"], "what was tied is"
    assert main(["convert", str(folder), str(tmp_path / "all.pt"), "--part", "all"]) == 0
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert_same(found["optimizer"]["optimizers"][0]["state"], facts["optimizer"])
    assert_same(found["optimizer"]["optimizers"][0]["param_groups"], facts["groups"])
    assert_same(found["seen"], facts["seen"])
    assert main(["convert", str(folder), str(tmp_path / "x.pt"), "--part", "nothing"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.pt", "model.pt"]


def test_convert_to_safetensors(saved: Any, tmp_path: Path) -> None:
    folder, facts = saved
    path = tmp_path / "model.safetensors"
    assert main(["convert", str(folder), str(path)]) == 0
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"]
    expected = {k: v for k, v in facts["model"].items() if k != "last.weight" or "head.weight" not in header}
    assert header.keys() <= expected.keys()
    for name, known in header.items():
        start, end = known["data_offsets"]
        found = torch.frombuffer(bytearray(data[8 + size + start : 8 + size + end]), dtype=expected[name].dtype)
        assert torch.equal(found.view(known["shape"]), expected[name]), name


def test_diff(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved
    assert main(["diff", str(folder), str(folder / "step-0000000002")]) == 0
    assert main(["diff", str(folder / "step-0000000001"), str(folder)]) == 1
    assert "model.cube: differs by up to" in capsys.readouterr().out
    main(["convert", str(folder), str(tmp_path / "model.pt")])
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    state["cube"] = state["cube"][:2]
    state["more"] = torch.ones(2)
    torch.save(state, tmp_path / "other.pt")
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "model.pt"), str(tmp_path / "other.pt")]) == 1
    said = capsys.readouterr().out
    assert "cube: (3, 5, 7)" in said and "more: only in the second" in said and "2 of" in said


def resumed(folder: str) -> dict[str, Any]:
    job = Job(folder, seed=9)
    ckpt = Checkpointer(folder, model=job.model)
    assert ckpt.resume() == 0 and bmt.world_size() == 2
    return {k: v.clone() for k, v in job.model.state_dict().items()}


def test_convert_from_a_plain_file(saved: Any, tmp_path: Path) -> None:
    _, facts = saved
    torch.save(facts["model"], tmp_path / "plain.pt")
    assert main(["convert", str(tmp_path / "plain.pt"), str(tmp_path / "folder")]) == 0
    for found in run_ranks(2, resumed, str(tmp_path / "folder")):
        assert_same(found, facts["model"])
