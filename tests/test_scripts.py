"""The scripts that users call: what they say from the first line on, without doing what they announce."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv has a Python that only notes how it was called."""
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "csrc", ".ci", "tests/run.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$BMTRAIN_EXTENSION: $*" >> {tmp_path}/calls\nexit ${{STATUS:-0}}\n')
    python.chmod(0o755)
    return tmp_path


def source(checkout: Path, extras: str, **environment: str) -> list[str]:
    given = {**os.environ, **environment, "PATH": "/usr/bin:/bin"}
    given.pop("BMTRAIN_EXTENSION", None) if "BMTRAIN_EXTENSION" not in environment else None
    done = subprocess.run(
        ["bash", "-euc", f". .ci/environment {extras}"], cwd=checkout, env=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="a GPU asks for more")
def test_the_environment_is_made_once_and_says_so(checkout: Path) -> None:
    first = source(checkout, "examples")
    assert first[0].startswith("environment: installing torch==2.13.0 with pip (one to three minutes)")
    assert first[1].startswith("environment: installing bmtrain and what examples needs, compiling nothing")
    assert source(checkout, "examples") == ["environment: .venv is there and fits"]
    (more,) = source(checkout, "test")
    assert "what test needs, compiling the C++ part" in more
    assert source(checkout, "test") == ["environment: .venv is there and fits"]
    (kernels,) = source(checkout, "test", BMTRAIN_EXTENSION="1")
    assert "compiling the CUDA kernels if nvcc is there" in kernels
    assert source(checkout, "test") == ["environment: .venv is there and fits"]
    installs = [line for line in (checkout / "calls").read_text().splitlines() if "pip install" in line]
    assert [line.partition(":")[0] for line in installs if "--editable" in line] == ["0", "cpp", "1"]
    assert sum("torch==2.13.0" in line for line in installs) == 1


@pytest.mark.parametrize("status", ["0", "1"])
def test_the_tests_end_with_a_line(checkout: Path, status: str) -> None:
    source(checkout, "test")
    done = subprocess.run(
        ["bash", "tests/run.sh"], cwd=checkout, env={**os.environ, "STATUS": status}, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert done.returncode == int(status) and lines[0].startswith("tests: about 15 minutes on two cores")
    assert lines[-1].startswith("tests: all that ran have passed" if status == "0" else "tests: NOT passed")


def test_a_running_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text("def test_a(): ...\n\n\ndef test_b(): ...\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "-c", "/dev/null"]
    for options, files in ((["--files"], 2), ([], 0), (["--files", "-n", "2"], 2)):
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert sum(" s  test_" in line for line in done.stdout.splitlines()) == files, done.stdout
