"""Files are written by one rank, however they are opened; what is read stays."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import csv
import gzip
import json
import os
import torch


def main():
    net = torch.nn.Linear(4, 1)
    opt = torch.optim.Adam(net.parameters())
    for x in loader:
        loss = net(x).mean()
        loss.backward()
        opt.step()
        value = loss.item()
"""
TAIL = "\n\nmain()\n"
NOWHERE = "if bmt.rank() == 0 else os.devnull"


def body(text: str) -> str:
    lines = "".join(f"        {line}\n" for line in text.splitlines())
    return converted(HEAD + lines + TAIL)


ROWS = 'with open("{}", "a") as out:\n    table = csv.writer(out)\n    table.writerow([1, value])'


def test_two_blocks_that_bind_the_same_names() -> None:
    after = body(ROWS.format("one") + "\n" + ROWS.format("two"))
    assert after.count("        if bmt.rank() == 0:\n            with open(") == 2 and NOWHERE not in after


def test_a_block_before_the_loop_and_one_in_it() -> None:
    first = "    " + ROWS.format("one").replace("\n", "\n    ") + "\n"
    text = HEAD.replace("    for x", first + "    for x")
    after = converted(text + "        " + ROWS.format("one").replace("\n", "\n        ") + "\n" + TAIL)
    assert after.count("if bmt.rank() == 0:\n") == 2 and NOWHERE not in after


NOT_GUARDED = {
    "no with": 'log = open("four.txt", "a")\nlog.write(f"{value}")\nlog.close()',
    "a row": 'table = csv.writer(open("one.csv", "w"))',
    "an attribute": 'net.log = open("one.txt", "w")',
    "a mode by name": 'log = open("one.txt", mode="a", buffering=1)',
    "a mode of two": 'log = open("one.txt", "a" if x else "w")',
    "in one go": 'open("one.txt", "w").write("x")',
    "zipped": 'log = gzip.open("one.gz", "wt")',
    "a model inside": 'with open("one.txt", "w") as out:\n    for y in loader:\n        out.write(str(net(y)))',
    "a value that is used later": 'with open("x", "w") as f:\n    count = f.write("a")\nprint(count)',
}


@pytest.mark.parametrize("text", NOT_GUARDED.values(), ids=NOT_GUARDED.keys())
def test_the_other_ranks_write_to_nowhere(text: str) -> None:
    after = body(text)
    assert NOWHERE in after and "with open" not in after.partition("bmt.rank() == 0:")[2]


GUARDED = {
    "two files": 'with open("a", "w") as a, open("b", "w") as b:\n    a.write("1")\n    b.write("2")',
    "copied": 'with open("a") as a, open("b", "w") as b:\n    b.write(a.read())',
    "dumped": 'json.dump([1], open("a.json", "w"))',
    "keyword": 'with open("a", mode="w") as a:\n    a.write("1")',
}


@pytest.mark.parametrize("text", GUARDED.values(), ids=GUARDED.keys())
def test_one_rank_opens(text: str) -> None:
    after = body(text)
    assert f"        if bmt.rank() == 0:\n            {text.splitlines()[0]}\n" in after and NOWHERE not in after


KEPT = [
    'with open("a") as a:\n    text = a.read()',
    'log = open("a", "rb")',
    'log = open("a")',
    'if rank == 0:\n    log = open("a", "w")',
    'with archive.open("member") as a:\n    text = a.read()',
]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_read_stays(text: str) -> None:
    assert "        " + text.replace("\n", "\n        ") + "\n" in body(text)


@pytest.mark.parametrize("text", ['log = path.open("w")', 'log = open("a", "x")', 'log = open("a", "w+")'])
def test_what_cannot_be_left_to_one_rank_is_reported(text: str) -> None:
    result = convert_text(f"{HEAD}        {text}\n{TAIL}")
    line = (HEAD + text).count("\n") + 1
    assert [finding.line for finding in result.reported if finding.code == "BMT033"] == [line]


def test_a_file_opened_in_a_guard_that_goes() -> None:
    after = body('if rank == 0:\n    log = open("a", "w")\n    state = net.state_dict()')
    assert f'        log = open("a" {NOWHERE}, "w")\n        state' in after


def test_the_ranks_are_there_before_a_file_is_opened() -> None:
    after = converted(HEAD.replace("def main():\n", 'def main():\n    log = open("a", "w")\n') + TAIL)
    assert after.index("init_distributed") < after.index("open(")


RENAMED = {
    "a named one": 'with tempfile.NamedTemporaryFile(dir=".", delete=False) as f:\n    t = f.name\n'
    '{}os.replace(t, "m.pt")',
    "a number": 't = tempfile.mkstemp()[1]\n{}os.rename(t, "m.pt")',
    "a folder": 't = tempfile.mkdtemp() + "/a"\n{}shutil.move(t, "m.pt")',
    "a path": 't = Path(tempfile.mkstemp()[1])\n{}t.replace("m.pt")',
}  # fmt: skip
SCRATCH = {
    "deleted": 'with tempfile.NamedTemporaryFile() as f:\n    t = f.name\n{}os.replace("a", "b")',
    "kept": "t = tempfile.mkstemp()[1]\n{}",
    "a folder for a while": 'with tempfile.TemporaryDirectory() as d:\n    t = d + "/a"\n{}os.replace("a", "b")',
    "by its path": 't = "m.pt" + ".tmp"\n{}os.replace(t, "m.pt")',
}


def left_of(body: str) -> str:
    lines = "".join(f"        {line}\n" for line in body.format("torch.save(net.state_dict(), t)\n").splitlines())
    head = HEAD.replace("import os\n", "import os\nimport shutil\nimport tempfile\nfrom pathlib import Path\n")
    return "\n".join(finding.message for finding in convert_text(head + lines + TAIL).reported)


@pytest.mark.parametrize("body", RENAMED.values(), ids=RENAMED.keys())
def test_temporary_files_that_other_ranks_leave_are_reported(body: str) -> None:
    assert "the others' stay" in left_of(body)


@pytest.mark.parametrize("body", SCRATCH.values(), ids=SCRATCH.keys())
def test_other_temporary_files_are_not(body: str) -> None:
    assert "the others' stay" not in left_of(body)
