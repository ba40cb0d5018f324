"""The libcst codemod: rules' examples as libcst's own codemod tests, and whole projects through libcst.tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from libcst.codemod import CodemodContext, CodemodTest

from rewriter.cli import main
from rewriter.command import Convert
from rewriter.rules import RULES

ROOT = Path(__file__).parents[2]
PLAIN = ROOT / "examples" / "plain_gpt"
EXAMPLES = [(rule.code, number, example) for rule in RULES for number, example in enumerate(rule.examples)]


class Examples(CodemodTest):
    TRANSFORM = Convert

    def runTest(self) -> None:
        for code, number, example in EXAMPLES:
            with self.subTest(rule=code, example=number):
                self.assertCodemod(
                    example.before,
                    example.after or example.before,
                    unsafe=example.unsafe,
                    tensor_parallel=example.tensor_parallel,
                )


def test_examples_of_the_rules() -> None:
    result = Examples().run()
    assert result is not None and result.testsRun == 1
    assert not result.failures and not result.errors, [text for _, text in (*result.failures, *result.errors)][:3]


def tool(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "libcst.tool", "codemod", "-x", "--no-format", "rewriter.command.Convert"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def texts(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


def test_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("x = 1\n")
    done = tool(str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain.py").read_text() == "x = 1\n"


def test_what_cannot_be_read_is_skipped_with_the_reason(tmp_path: Path) -> None:
    text = b"import torch\n\n\nclass A(torch.nn.Module):\n    a = 1\n    b = 'caf\xc3\xa9'\n"
    (tmp_path / "good.py").write_bytes(text)
    (tmp_path / "odd.py").write_bytes(text.replace(b"\n", b"\r"))
    done = tool(str(tmp_path))
    assert "libcst would not print this file as it is written" in done.stderr
    assert (tmp_path / "odd.py").read_bytes() == text.replace(b"\n", b"\r")
    assert b"bmt.DistributedModule" in (tmp_path / "good.py").read_bytes()


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_the_quick_start_comes_out_as_bmt_convert_makes_it(tmp_path: Path, jobs: str) -> None:
    """Also where several processes convert, each of which sees files that another has written already."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        shutil.copytree(PLAIN, folder)
        for number in range(4):  # enough files that every process has some
            (folder / f"part_{number}.py").write_text((PLAIN / "model.py").read_text().replace("GPT", f"GPT{number}"))
    assert main([str(one), "--write", "--quiet"]) == 0
    done = tool("-j", jobs, str(other))
    assert done.returncode == 0, done.stderr
    assert texts(other) == texts(one)
    assert "BMT020" in done.stderr  # what bmt-convert would say


def test_the_project_decides(tmp_path: Path) -> None:
    """A package's file is seen with its package; one folder is seen as part of another only if that is said."""
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("")
    (package / "base.py").write_text("from torch import nn\n\n\nclass Base(nn.Module):\n    pass\n")
    (package / "inner" / "net.py").write_text(
        "import torch\nfrom ..base import Base\n\n\nclass Net(Base):\n    def __init__(self):\n"
        "        super().__init__()\n        self.scale = torch.nn.Parameter(torch.ones(2))\n"
    )
    assert tool(str(package / "inner")).returncode == 0
    assert "bmt.DistributedParameter" in (package / "inner" / "net.py").read_text()
    assert "bmt" not in (package / "base.py").read_text()


def test_code_that_is_no_file() -> None:
    import libcst

    command = Convert(CodemodContext())
    tree = libcst.parse_module("import torch\n\n\nclass A(torch.nn.Module):\n    pass\n")
    assert "class A(bmt.DistributedModule):" in command.transform_module(tree).code
    assert command.context.warnings == ["4: BMT001 class A inherits bmt.DistributedModule"]
