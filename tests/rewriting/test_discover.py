"""Which files of a folder are its project's own, beside what git says of the same folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rewriter.cli import main
from rewriter.discover import sources, walk

FILES = [
    "#h.py", "a.py", "b/a.py", "b/c/a.py", "data/x.py", "foo/a.py", "foo/bar/a.py", "foo/bar/baz/a.py", "keep/gen/a.py",
    "keep/gen/b.py", "logs/a.py", "out/deep/er/a.py", "sp.py", "sub/data/x.py", "sub/logs/a.py", "x1.py", "xa.py",
]  # fmt: skip
IGNORED = [
    "", "*.py\n!b/a.py", "foo/*\n", "foo/*\n!foo/bar/", "/data", "data/", "/*\n!/foo", "foo/**/a.py", "**/bar",
    "foo/**", "\\#h.py", "sp.py ", "x[0-9].py", "x[!0-9].py", "foo/*/a.py", "b/*.py", "keep/gen/*\n!keep/gen/a.py",
    "keep/gen\n!keep/gen/a.py", "a.py/", "out/**/er", "*/a.py", "# c\n\n  \n", "foo\\bar", "\ta.py", "!", "/", "[",
    "a\\", "***", "[a", "\\", "!!a.py", "**/", "/**", "a.py\r\nb/c/\r\n",
]  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


def git_files(folder: Path) -> set[str]:
    command = ["git", "-C", str(folder), "ls-files", "-z", "-o", "--exclude-standard"]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in named if name.endswith(".py")}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in walk(folder) if path.suffix == ".py"}


@pytest.mark.parametrize("patterns", IGNORED)
def test_what_git_ignores(repository: Path, patterns: str) -> None:
    (repository / ".gitignore").write_text(patterns)
    assert files(repository) == git_files(repository)


@pytest.mark.parametrize(
    ("above", "inside", "below"),
    [
        ("gen/", "", ""), ("sub/data", "", ""), ("/data", "", ""), ("logs", "!logs", ""), ("", "/data", ""),
        ("*.py", "!x.py", ""), ("", "*.py", "!x.py"), ("", "!x.py", "*.py"), ("data/*\n", "", "!x.py"),
    ],
)  # fmt: skip
def test_folders_above_and_below_have_their_say(repository: Path, above: str, inside: str, below: str) -> None:
    for folder, patterns in ((".", above), ("sub", inside), ("sub/data", below)):
        (repository / folder / ".gitignore").write_text(patterns)
    assert files(repository / "sub") == git_files(repository / "sub")


@pytest.mark.parametrize("patterns", ["out/", "/out/deep", "*", "out/*"])
def test_a_folder_that_is_asked_for_is_looked_at(repository: Path, patterns: str) -> None:
    (repository / ".gitignore").write_text(patterns)
    assert files(repository / "out" / "deep") == {"er/a.py"}


def test_relative_paths(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / ".gitignore").write_text("sub/data\n")
    monkeypatch.chdir(repository / "sub")
    assert {path.as_posix() for path in walk(Path(".")) if path.suffix == ".py"} == {"logs/a.py"}
    assert {path.as_posix() for path in walk(Path("../sub")) if path.suffix == ".py"} == {"../sub/logs/a.py"}


def test_without_a_repository_what_is_above_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.py\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("")
    assert files(tmp_path / "sub") == {"a.py"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[tool.bmt-convert]\nselect = [\n  "BMT001",  # on lines of its own\n]\n', ""),
        ('tool = "bmt-convert"\n', ""),
        ('[tool]\nbmt-convert = "x"\n', "must be a table"),
        ("[tool.bmt-convert]\nselect = [\n", "pyproject.toml: "),
        ("[[tool.bmt-convert]]\nunsafe = true\n", "must be a table"),
    ],
)
def test_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert main([str(tmp_path / "a.py"), "--check"]) == (2 if said else 0)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("first", ["#!/usr/bin/env python3", "#!/usr/bin/python", "#! /opt/python3.11 -u"])
def test_a_script_without_a_suffix(tmp_path: Path, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import torch\n\nnet = torch.nn.Linear(2, 1)\nopt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
    (tmp_path / "train").write_text(f"{first}\n{script}net(torch.ones(1, 2)).sum().backward()\nopt.step()\n")
    (tmp_path / "README").write_text("python\n")
    (tmp_path / "run").write_text("#!/bin/sh\npython train\n")
    (tmp_path / "weights").write_bytes(b"\x80\x02python")
    assert sources(tmp_path) == [tmp_path / "train"]
    assert main([str(tmp_path), "--write"]) == 0
    assert f"torchrun --nproc_per_node=N {tmp_path / 'train'}\n" in capsys.readouterr().out
    assert "init_distributed" in (tmp_path / "train").read_text()


IMPORTED = {
    "a folder": ("models/", {"train.py": "from models import net", "models/net.py": "", "models/__init__.py": ""}),
    "a folder without an init": ("models/", {"train.py": "import models.net", "models/net.py": ""}),
    "one of its names": ("models/", {"train.py": "from models.net import Net as N", "models/net.py": ""}),
    "by a file of it": (
        "models/",
        {"train.py": "import models.net", "models/net.py": "from . import b", "models/b.py": ""},
    ),
    "a file": ("net.py", {"train.py": "import net", "net.py": ""}),
    "a file in a folder": ("lib/net.py", {"lib/train.py": "from .net import Net", "lib/net.py": ""}),
    "relative to a folder above": ("nets/", {"a/train.py": "from ..nets import b", "nets/b.py": ""}),
    "on the path": (
        "lib/",
        {"tools/train.py": "import sys\nsys.path.insert(0, '../lib')\nimport core.b", "lib/core/b.py": ""},
    ),
    "by a name": (
        "models",
        {"train.py": "import importlib as i\ni.import_module('models.{}'.format(name))", "models/b.py": ""},
    ),
    "what is built": ("", {"train.py": "from build import net", "build/net.py": ""}),
    "in turn": ("/a\n/b\n", {"train.py": "import a.x", "a/x.py": "import b.y", "b/y.py": "import a.z", "a/z.py": ""}),
    "under the folder above it": (
        "/pkg/gen/",
        {"train.py": "import pkg.gen.b", "pkg/__init__.py": "", "pkg/gen/b.py": ""},
    ),
}
NOT_IMPORTED = {
    "data": ("data/", {"train.py": "from torch.utils.data import DataLoader", "data/get.py": ""}),
    "data of a package's name": ("datasets/", {"train.py": "from datasets import load", "datasets/raw/get.py": ""}),
    "copies of the code": ("runs/", {"train.py": "import net", "net.py": "", "runs/net.py": "", "runs/1/train.py": ""}),
    "a copy on the path of another": (
        "runs/", {"train.py": "import sys, net\nsys.path.append('x')", "net.py": "", "runs/net.py": ""}
    ),
    "a file that is no Python": ("models/", {"train.py": "from models import net\nprint 1", "models/net.py": ""}),
    "an environment": ("env/", {"train.py": "import env.b", "env/pyvenv.cfg": "", "env/b.py": ""}),
    "a package that is built": ("", {"train.py": "import pkg", "pkg/__init__.py": "", "build/lib/pkg/__init__.py": ""}),
    "a text": ("models/", {"train.py": "print('models.net')", "models/net.py": ""}),
}  # fmt: skip


def laid(folder: Path, patterns: str, texts: dict[str, str]) -> set[str]:
    for name, text in {".gitignore": patterns, **texts}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {path.relative_to(folder).as_posix() for path in sources(folder)}


@pytest.mark.parametrize(("patterns", "texts"), IMPORTED.values(), ids=IMPORTED.keys())
def test_what_is_imported_is_the_projects_own(patterns: str, texts: dict[str, str], tmp_path: Path) -> None:
    assert laid(tmp_path, patterns, texts) == {*texts}


@pytest.mark.parametrize(("patterns", "texts"), NOT_IMPORTED.values(), ids=NOT_IMPORTED.keys())
def test_what_is_not_imported_stays_out(patterns: str, texts: dict[str, str], tmp_path: Path) -> None:
    assert laid(tmp_path, patterns, texts) == {name for name in texts if "/" not in name or name == "pkg/__init__.py"}


def test_what_is_excluded_stays_out_though_it_is_imported(tmp_path: Path) -> None:
    laid(tmp_path, "models/", {"train.py": "import models.net", "models/net.py": ""})
    assert sources(tmp_path, exclude=("models",)) == [tmp_path / "train.py"]
