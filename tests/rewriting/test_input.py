# ruff: noqa: E501 - tables of code are easier to read on one line
"""Input that is hard to read: bytes that must survive, files that must not be touched."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path

import pytest

from rewriter import cli
from rewriter.cli import main

from .helpers import converted

BEFORE = "import torch\n\n\nclass A(torch.nn.Module):\n    name = 'é'\n"
AFTER = "import torch\nimport bmtrain as bmt\n\n\nclass A(bmt.DistributedModule):\n    name = 'é'\n"

SURVIVE = {
    "byte order mark": (b"\xef\xbb\xbf" + BEFORE.encode(), b"\xef\xbb\xbf" + AFTER.encode()),
    "windows lines": (BEFORE.replace("\n", "\r\n").encode(), AFTER.replace("\n", "\r\n").encode()),
    "latin 1": (("# -*- coding: latin-1 -*-\n" + BEFORE).encode("latin-1"), ("# -*- coding: latin-1 -*-\n" + AFTER).encode("latin-1")),
    "form feed": (BEFORE.replace("\n\n\n", "\n\x0c\n\n").encode(), AFTER.replace("\n\n\n", "\n\x0c\n\n").encode()),
    "no newline at the end": (BEFORE.rstrip().encode(), AFTER.rstrip().encode()),
    "tabs": (BEFORE.replace("    ", "\t").encode(), AFTER.replace("    ", "\t").encode()),
    "odd spaces": (BEFORE.replace("class A(torch", "class   A ( torch").encode(), AFTER.replace("class A(bmt", "class   A ( bmt").encode()),
    "continued line": (
        BEFORE.replace("torch.nn.Module", "torch\\\n  .nn.Module").encode(),
        AFTER.encode(),
    ),
    "decorator in brackets": (
        b"@(\n    wrap\n)\ndef f():\n    pass\n\n\nclass A(nn.Module):\n    pass\n",
        b"import bmtrain as bmt\n@(\n    wrap\n)\ndef f():\n    pass\n\n\nclass A(bmt.DistributedModule):\n    pass\n",
    ),
    "bmt means something else, too": (
        b"import torch\nimport bmtrain as bmt\n\nbmt = bmt.x\n\n\nclass A(torch.nn.Module):\n    pass\n",
        b"import torch\nimport bmtrain as bmt\nimport bmtrain\n\nbmt = bmt.x\n\n\n"
        b"class A(bmtrain.DistributedModule):\n    pass\n",
    ),
    "two statements on a line": (
        BEFORE.replace("import torch\n", "import torch; import os\n").encode(),
        AFTER.replace("import torch\nimport bmtrain as bmt\n", "import torch; import os; import bmtrain as bmt\n").encode(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after"), SURVIVE.values(), ids=SURVIVE.keys())
def test_bytes_survive(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "model.py"
    path.write_bytes(before)
    assert main([str(path), "--write", "--quiet"]) == 0
    assert path.read_bytes() == after
    assert main([str(path), "--check", "--quiet"]) == 0


ODD_BUT_KEPT = {
    "form feeds": ("class B:\n    a = 1\n\x0c    b = 2\n\x0c\n\x0cclass C:\n    pass\n"),
    "a form feed behind spaces": ("class B:\n    a = 1\n  \x0c    b = 2\n"),
    "tabs of eight": (
        "class B(torch.nn.Module):\n    def f(self):\n\t\t    pass\n\n    def g(self):\n\t    return 1\n"
    ),
    "a string with tabs": ("class B:\n    def f(self):\n\t    '''one\n\t  two\n    '''\n"),
}


@pytest.mark.parametrize("text", ODD_BUT_KEPT.values(), ids=ODD_BUT_KEPT.keys())
def test_odd_indentation_stays_as_it_is_beside_what_changes(text: str) -> None:
    ast.parse(text)
    after = converted(f"{BEFORE}\n\n{text}")
    assert after == f"{AFTER}\n\n{text}".replace("B(torch.nn.Module)", "B(bmt.DistributedModule)")


ODD = {
    "old mac lines": (BEFORE.replace("\n", "\r"), "lines end with a carriage return alone"),
    "form feed before what changes": (BEFORE.replace("class A", "\x0cclass A"), "line 4 is indented in a way that"),
}


@pytest.mark.parametrize(("text", "reason"), ODD.values(), ids=ODD.keys())
def test_what_libcst_does_not_read_stays_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, reason: str
) -> None:
    path = tmp_path / "model.py"
    path.write_bytes(text.encode())
    assert main([str(path), "--write", "--quiet"]) == 2
    assert reason in capsys.readouterr().err
    assert path.read_bytes() == text.encode()


DEEP = {
    "operands": " + ".join(["x"] * 900),
    "calls": "f(" * 90 + ")" * 90,
    "attributes": "x" + ".y" * 800,
    "calls in a chain": "x" + ".y()" * 800,
}


@pytest.mark.parametrize("code", DEEP.values(), ids=DEEP.keys())
def test_deeply_nested_code(code: str) -> None:
    before = f"{BEFORE}\n\nclass B(torch.nn.Module):\n    value = {code}\n"
    after = f"{AFTER}\n\nclass B(bmt.DistributedModule):\n    value = {code}\n"
    assert converted(before) == after


BROKEN = {
    "syntax": b"class A(torch.nn.Module:\n",
    "another python": b"print 'x'\n",
    "not utf-8": b"x = '\xff\xfe'\n",
    "null": b"import torch\n\0\n",
    "unknown encoding": b"# coding: klingon\n",
    "wrong encoding": b"# coding: utf-8\nx = '\xe9'\n",
    "binary": bytes(range(256)) * 4,
    "deep": b"x = " + b"(" * 5000 + b")" * 5000 + b"\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(content)
    assert main([str(path), "--write", "--quiet"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith(f"bmt-convert: {path}:")
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["broken.py"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(BEFORE)
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "missing.py")
    assert main([str(tmp_path), "--write", "--quiet"]) == 0
    assert (tmp_path / "model.py").read_text() == AFTER


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(BEFORE)
    (tmp_path / "model.py").chmod(0)
    assert main([str(tmp_path), "--quiet"]) == 2


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.py"
    path.write_text(BEFORE)
    convert = cli.convert_project

    def slow(*arguments: object, **options: object) -> object:
        results = convert(*arguments, **options)  # type: ignore[arg-type]
        path.write_text("edited = 1\n")
        return results

    monkeypatch.setattr(cli, "convert_project", slow)
    assert main([str(path), "--write"]) == 2
    assert path.read_text() == "edited = 1\n"


def test_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    lines = "x = 1\n" * 25_000  # a microsecond for each pair of lines would be ten minutes
    path.write_text(BEFORE + lines)
    start = time.perf_counter()
    assert main([str(path), "--write", "--quiet"]) == 0
    assert path.read_text() == AFTER + lines
    assert time.perf_counter() - start < 60


def test_ignored_and_foreign_folders(tmp_path: Path) -> None:
    for name in ("model.py", "skipped/model.py", "env/model.py", "kept/model.py", "kept/generated.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(BEFORE)
    (tmp_path / "env" / "pyvenv.cfg").write_text("")
    (tmp_path / ".gitignore").write_text("skipped/\n# no\nkept/gen*.py\n")
    assert main([str(tmp_path), "--write", "--quiet"]) == 0
    changed = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py") if path.read_text() == AFTER}
    assert changed == {"model.py", "kept/model.py"}
