"""``save_pretrained`` of whatever package: its own files, by one rank, all or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_models import Around, Averages, Given, Hooked, Listed, Own, Pipeline, Pretrained, Prompted, Tokenizer
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block import pretrained
from bmtrain.errors import CheckpointError, ConfigurationError, RankDivergenceError


def _files(folder: Path) -> dict[str, Any]:
    return {
        path.name: torch.load(path) if path.suffix == ".bin" else path.read_text() for path in sorted(folder.iterdir())
    }


def _assert_same(one: Path, other: Path) -> None:
    ours, theirs = _files(one), _files(other)
    assert list(ours) == list(theirs)
    for name, content in ours.items():
        if isinstance(content, str):
            assert content == theirs[name]
            continue
        assert list(content) == list(theirs[name])
        for key, value in content.items():
            assert torch.equal(value, theirs[name][key]) and value.dtype == theirs[name][key].dtype, key


@on_ranks(1, 2)
def test_nothing_is_written_when_it_fails(tmp_path: Path) -> None:
    model = bmt.BMTrainModelWrapper(Pretrained())
    model.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(CheckpointError, match="of its own"):
        model.save_pretrained(tmp_path / "out", only="first", fails=True)
    with pytest.raises(CheckpointError, match="unexpected keyword"):
        bmt.save_pretrained(model, tmp_path / "new", nonsense=1)
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "out" / "config.json")
    bmt.synchronize()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@on_ranks(1, 2)
def test_a_device_map_is_refused() -> None:
    for places in ({"first": 0, "last": "cpu"}, {"": "disk"}):
        model = Pretrained()
        model.hf_device_map = places  # type: ignore[assignment]
        with pytest.raises(ConfigurationError, match="without device_map"):
            bmt.BMTrainModelWrapper(model)
    model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    bmt.BMTrainModelWrapper(model)


@on_ranks(1, 2, 3)
def test_files_are_the_packages_own(tmp_path: Path) -> None:
    for kind in (Pretrained, Hooked, Own, Prompted):
        plain = kind()
        if bmt.rank() == 0:
            plain.save_pretrained(str(tmp_path / "plain"))
        model = bmt.BMTrainModelWrapper(kind())
        model.save_pretrained(tmp_path / "method")
        bmt.save_pretrained(model, str(tmp_path / "function"), files=2)
        bmt.synchronize()
        if bmt.rank() == 0:
            _assert_same(tmp_path / "method", tmp_path / "plain")
            _assert_same(tmp_path / "function", tmp_path / "plain")
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@on_ranks(1, 2)
def test_models_around_a_sharded_one_and_inside_it(tmp_path: Path) -> None:
    inner = Pretrained()
    outer = bmt.BMTrainModelWrapper(nn.Sequential(Pretrained()))
    if bmt.rank() == 0:
        inner.save_pretrained(str(tmp_path / "plain inner"))
        Around(inner).save_pretrained(str(tmp_path / "plain around"))
    bmt.save_pretrained(outer[0], tmp_path / "inner")
    bmt.save_pretrained(Around(bmt.BMTrainModelWrapper(inner)), tmp_path / "around")
    if bmt.rank() == 0:
        _assert_same(tmp_path / "inner", tmp_path / "plain inner")
        _assert_same(tmp_path / "around", tmp_path / "plain around")


@on_ranks(2)
def test_only_what_is_asked_for_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = bmt.BMTrainModelWrapper(Pretrained()), list[tuple[int, ...]]()
    whole = pretrained.whole_in_pieces
    monkeypatch.setattr(pretrained, "whole_in_pieces", lambda value: made.append(tuple(value.shape)) or whole(value))
    model.save_pretrained(tmp_path / "out", only="inner.bias")
    assert made == [(5,), (5,)]
    made.clear()
    model.save_pretrained(tmp_path / "out", only="weight")  # tied weights once
    assert sorted(made) == [(5,), (5, 5), (5, 5), (5, 5)]


@on_ranks(1, 2)
def test_an_older_series_goes(tmp_path: Path) -> None:
    model = bmt.BMTrainModelWrapper(Pretrained())
    model.save_pretrained(tmp_path, files=3)
    if bmt.rank() == 0:
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "other-00001-of-00002.bin").write_text("mine")
    bmt.synchronize()
    model.save_pretrained(tmp_path, files=2)
    series = [f"model-{number:05}-of-00002.bin" for number in (1, 2)]
    assert sorted(os.listdir(tmp_path)) == ["config.json", *series, "notes.txt", "other-00001-of-00002.bin"]


@on_ranks(1, 2)
def test_who_gives_the_values_writes_alone(tmp_path: Path) -> None:
    model = bmt.BMTrainModelWrapper(Given())
    state = model.state_dict()
    if bmt.rank() == 0:
        model.save_pretrained(str(tmp_path / "given"), state_dict=state)
        assert list(torch.load(tmp_path / "given")) == list(state)


def alone(folder: str) -> str:
    model = bmt.BMTrainModelWrapper(Pretrained())
    try:
        if bmt.rank() == 0:
            model.save_pretrained(folder)
        else:
            bmt.BMTrainModelWrapper(nn.Linear(2, 2))
    except RankDivergenceError as error:
        return str(error)
    return ""


def test_one_rank_alone_is_told(tmp_path: Path) -> None:
    for said in run_ranks(2, alone, str(tmp_path / "out"), fresh=True):
        assert "save_pretrained of Pretrained" in said
    assert not list(tmp_path.iterdir())


@on_ranks(1, 2)
def test_a_tokenizer_comes_beside_a_model(tmp_path: Path) -> None:
    bmt.BMTrainModelWrapper(Pretrained()).save_pretrained(tmp_path)
    bmt.save_pretrained(Tokenizer(), tmp_path)
    assert (tmp_path / "words.txt").read_text() == "once" and (tmp_path / "config.json").exists()


class Converted(Pretrained):
    """Written for all ranks."""

    def save_pretrained(self, save_directory: str) -> None:  # type: ignore[override]
        bmt.save(self, save_directory)


@on_ranks(1, 2)
def test_a_method_of_converted_code_is_of_all_ranks(tmp_path: Path) -> None:
    model = bmt.BMTrainModelWrapper(Converted())
    model.save_pretrained(str(tmp_path / "method"))
    bmt.save_pretrained(model, str(tmp_path / "function"))
    assert list(torch.load(tmp_path / "function")) == list(torch.load(tmp_path / "method"))


def _all_files(folder: Path) -> dict[str, Any]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".bin"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@on_ranks(1, 2, 3)
def test_what_holds_models_is_written_with_them(tmp_path: Path) -> None:
    for kind in (Pipeline, Listed):
        made = [{"net": Pretrained(), "other": Hooked(), "plain": Own(), "words": Tokenizer()} for _ in range(2)]
        for name in ("net", "other"):
            made[1][name] = bmt.BMTrainModelWrapper(made[1][name])  # type: ignore[type-var]
        if bmt.rank() == 0:
            kind(**made[0]).save_pretrained(str(tmp_path / kind.__name__ / "plain"))
        bmt.save_pretrained(kind(**made[1]), tmp_path / kind.__name__ / "ours")
        if bmt.rank() == 0:
            ours, theirs = tmp_path / kind.__name__ / "ours", tmp_path / kind.__name__ / "plain"
            assert _all_files(ours) == _all_files(theirs)
            for name in ("net", "other", "plain"):
                _assert_same(ours / name, theirs / name)
        with pytest.raises(CheckpointError, match="of its own"):
            bmt.save_pretrained(kind(**made[1]), tmp_path / "failed", fails=True)
        bmt.synchronize()
        assert not (tmp_path / "failed").exists()
        made[1]["net"].save_pretrained(tmp_path / kind.__name__ / "again")  # its own method is all ranks' once more


@on_ranks(1, 2)
def test_averages_of_parameters_are_whole_where_they_are_written(tmp_path: Path) -> None:
    plain, model = Pretrained(), bmt.BMTrainModelWrapper(Pretrained())
    theirs, ours = Averages(plain.parameters()), Averages(model.parameters())
    with torch.no_grad():
        for net, averages in ((plain, theirs), (model, ours)):
            for p in net.parameters():
                p.mul_(3)
            averages.step(net.parameters())
    kept = list(ours.kept)
    if bmt.rank() == 0:
        theirs.save_pretrained(str(tmp_path / "plain"))
    bmt.save_pretrained(ours, tmp_path / "ours")
    if bmt.rank() == 0:
        _assert_same(tmp_path / "ours", tmp_path / "plain")
    assert all(a is b for a, b in zip(ours.kept, kept, strict=True))
