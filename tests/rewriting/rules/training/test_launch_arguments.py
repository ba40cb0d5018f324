"""The launcher's argument is added to parsers that do not know it, wherever they learn it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

from ...helpers import converted

SCRIPT = """import argparse
import torch
{imported}

parser = argparse.ArgumentParser({given})
{added}
args = parser.parse_args()
model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for x in batches:
    model(x).mean().backward()
    opt.step()
"""
ADDS = 'parser.add_argument("--local_rank", default=0, type=int)'
KNOWN = {
    "a function of another file": (
        f"def add_arguments(parser):\n    {ADDS}\n", "from options import add_arguments", "", "add_arguments(parser)",
    ),
    "a class's method": (
        f"class Launch:\n    @staticmethod\n    def add(parser):\n        {ADDS}\n", "import options", "",
        "options.Launch.add(parser)",
    ),
    "a parent": (
        f"import argparse\n\nparser = argparse.ArgumentParser(add_help=False)\n{ADDS}\n", "import options",
        "parents=[options.parser]", "",
    ),
    "a table": (
        'NAMES = ["--lr", "--local-rank"]\n', "import options", "",
        "for name in options.NAMES:\n    parser.add_argument(name)",
    ),
}  # fmt: skip
UNKNOWN = {
    "other arguments": (
        'def add(parser):\n    parser.add_argument("--rank")\n', "from options import add", "", "add(parser)",
    ),
    "a file that is not imported": (f"def add(parser):\n    {ADDS}\n", "", "", ""),
}  # fmt: skip


def added(folder: Path, options: str, imported: str, given: str, more: str) -> bool:
    (folder / "options.py").write_text(options)
    (folder / "train.py").write_text(SCRIPT.format(imported=imported, given=given, added=more))
    results = convert_paths([folder / "options.py", folder / "train.py"], Options(), [folder])
    assert results[1].changed
    return b"argparse.SUPPRESS" in results[1].after


@pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN.keys())
def test_a_parser_that_learns_it_elsewhere(case: tuple[str, str, str, str], tmp_path: Path) -> None:
    assert not added(tmp_path, *case)


@pytest.mark.parametrize("case", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_parser_that_does_not_know_it(case: tuple[str, str, str, str], tmp_path: Path) -> None:
    assert added(tmp_path, *case)


@pytest.mark.parametrize(
    ("given", "local"), [([], None), (["--local-rank=1"], 1), (["--local_rank", "1"], 1)], ids=["torchrun", "-", "_"]
)
def test_options_that_are_read_are_the_scripts(tmp_path: Path, given: list[str], local: int | None) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.format(imported="", given="", added=""))
    after = convert_paths([tmp_path / "train.py"], Options(), [tmp_path])[0].after.decode()
    added = next(line.strip() for line in after.splitlines() if "local_rank" in line)
    parser = argparse.ArgumentParser()
    exec(added, {"parser": parser, "argparse": argparse})
    assert vars(parser.parse_args(given)) == ({} if local is None else {"local_rank": local})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("type=int, default=-1", 'type=int, default=int(os.environ.get("LOCAL_RANK", -1))'),
        ("default=0, type=int", 'default=int(os.environ.get("LOCAL_RANK", 0)), type=int'),
        ("type=int", 'type=int, default=int(os.environ.get("LOCAL_RANK", 0))'),
        ("default=int(os.environ['LOCAL_RANK'])", "default=int(os.environ['LOCAL_RANK'])"),
    ],
)
def test_torchrun_says_what_the_script_s_own_argument_is(given: str, wanted: str) -> None:
    argument = 'parser.add_argument("--local_rank", {})\n'
    text = SCRIPT.format(imported="import os", given="", added=argument.format(given))
    after = converted(text + "if args.local_rank in [-1, 0]:\n    print(1)\n")
    assert argument.format(wanted) in after and converted(after) == after
    assert argument.format(given) in converted(text)
