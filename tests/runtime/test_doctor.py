"""The doctor: what it looks at, and what it says where something is wrong."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch

import bmtrain
from bmtrain import __main__ as program
from bmtrain import doctor
from bmtrain.device import Gpu

TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-47
GPU1\tNV18\t X \tNV18\tSYS\t0-47
GPU2\tSYS\tNV18\t X \tSYS\t0-47
NIC0\tPXB\tSYS\tSYS\t X

Legend:
  X    = Self
"""
H100 = Gpu("NVIDIA H100", 80 << 30, 79 << 30, (9, 0))


def look(topic: str) -> list[doctor.Finding]:
    return [finding for finding in doctor.examine(bandwidth=False) if finding.topic == topic]


def states(topic: str) -> list[str]:
    return [finding.state for finding in look(topic)]


def test_what_is_wrong_is_said_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: "570.86")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert states("torch") == ["bad"]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (states("torch"), states("driver")) == (["ok"], ["bad"])
    monkeypatch.setattr(doctor, "visible_gpus", lambda: [H100, Gpu("Tesla V100", 32 << 30, 9 << 30, (7, 0))])
    monkeypatch.setattr(doctor, "_output", lambda *command: TOPOLOGY)
    assert states("GPU") == ["ok", "note"] and states("GPUs") == ["note"]
    assert [finding.text for finding in look("links")] == ["2 NV18, 1 SYS"]
    monkeypatch.setattr(doctor.nccl_library, "built", False)
    (found,) = look("compiled")
    assert found.state == "bad" and "BMTRAIN_EXTENSION=1 pip install" in found.advice
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("BMTRAIN_WATCH", "0")
    monkeypatch.setenv("BMTRAIN_DIARY_DIR", str(tmp_path / "nowhere"))
    assert [finding.text.partition("=")[0] for finding in look("environment")][:2] == [
        "NCCL_P2P_DISABLE",
        "BMTRAIN_WATCH",
    ]
    assert len(look("environment")) == 3
    assert all(finding.advice for finding in doctor.examine(bandwidth=False) if finding.state != "ok")


def test_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not look("launch")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
        (launch,), (host,), (port, _) = look("launch"), look("host"), look("port")
    assert (launch.state, host.state, port.state) == ("note", "note", "note")
    assert launch.text == "MASTER_ADDR, MASTER_PORT set, RANK, WORLD_SIZE not"
    monkeypatch.setenv("MASTER_PORT", "99999")
    assert "is taken" in look("port")[0].text


def test_links() -> None:
    assert doctor.links_of(TOPOLOGY) == {"NV18": 2, "SYS": 1}
    assert doctor.links_of("") == doctor.links_of("no devices were found\n") == {}


def test_ranks_that_cannot_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_failure", lambda *command: "RuntimeError: no route")
    (found,) = doctor._bandwidth()
    assert found.state == "bad" and "2 ranks: RuntimeError: no route" in found.text
    assert doctor.main([]) == 1


def test_as_json_with_an_all_gather(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] and shown["version"] == bmtrain.__version__
    topics = [finding["topic"] for finding in shown["findings"]]
    assert topics[:2] == ["python", "torch"] and topics[-1] == "all-gather"
    assert "GB/s" in shown["findings"][-1]["text"]


def test_the_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 2
    assert "usage: bmt [-h]" in capsys.readouterr().err
    for arguments, code in ((["docter"], 2), (["--version"], 0), (["--help"], 0), (["plot", "--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            program.main(arguments)
        assert ended.value.code == code
    shown = capsys.readouterr()
    assert "invalid choice: 'docter'" in shown.err and shown.out.startswith(f"bmtrain {bmtrain.__version__}\nusage")
    for command in ("doctor", "estimate", "plot", "checkpoint"):
        assert f"\n    {command} " in shown.out
    assert program.main(["checkpoint", "inspect", "/nowhere"]) == 2


def test_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert program.main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == "bmt: --print-completion needs shtab: pip install shtab\n"
    monkeypatch.delitem(sys.modules, "shtab")
    pytest.importorskip("shtab")
    assert program.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "-F _shtab_bmt bmt" in script and "--no-bandwidth" in script and "--gpus" in script
