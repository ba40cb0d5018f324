"""What a statement changes beside what it writes is changed on all ranks: lists, iterators, counters, generators."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

from ...helpers import converted

HEAD = """import heapq
import json
import os
import random
from pathlib import Path
import torch


class Meter:
    def __init__(self):
        self.total = 0.0
        self.files = []

    def add(self, amount):
        self.total += amount

    def flush(self):
        total = self.total
        self.total = 0.0
        return total

    def mean(self):
        return self.total / 3


def main():
    net = torch.nn.Linear(4, 1)
    opt = torch.optim.Adam(net.parameters())
    meter, files, names = Meter(), [], iter("abc")
    for x in loader:
        loss = net(x).mean()
        loss.backward()
        opt.step()
        meter.add(1.0)
"""
ONE_RANK = "        if bmt.rank() == 0:\n            "


def body(text: str) -> str:
    return converted(HEAD + "".join(f"        {line}\n" for line in text.splitlines()) + "\n\nmain()\n")


@pytest.mark.parametrize(
    ("before", "shared", "written"),
    [
        ("os.remove(files.pop(0))", "files.pop(0)", "os.remove(value)"),
        ("os.remove(meter.files.pop()[0])", "meter.files.pop()[0]", "os.remove(value)"),
        ("os.remove(heapq.heappop(files))", "heapq.heappop(files)", "os.remove(value)"),
        ("Path(files.pop()).unlink()", "Path(files.pop())", "value.unlink()"),
        ('writer.add_scalar("a", meter.flush(), 1)', "meter.flush()", 'writer.add_scalar("a", value, 1)'),
        ("writer.add_text('a', next(names))", "next(names)", "writer.add_text('a', value)"),
        ("table.writerow([1, random.random()])", "[1, random.random()]", "table.writerow(value)"),
        ("table.writerow(*files.pop())", "files.pop()", "table.writerow(*value)"),
        ("writer.add_scalar('a', (n := 3), 1)", "(n := 3)", "writer.add_scalar('a', value, 1)"),
    ],
)
def test_values_that_change_something_are_taken_by_all(before: str, shared: str, written: str) -> None:
    assert f"        value = {shared}\n{ONE_RANK}{written}\n" in body(before)


@pytest.mark.parametrize("path", ["path.unlink()", "path.replace('b')", "path.rename('b')", "path.symlink_to('b')"])
def test_paths_are_moved_by_one_rank(path: str) -> None:
    """The second to do so would find nothing there."""
    assert ONE_RANK + path in body("path = Path('a')\n" + path)


@pytest.mark.parametrize("text", ['text.replace("a", "b")', "table.rename(columns=names)"])
def test_texts_and_tables_are_no_paths(text: str) -> None:
    assert text in body(text) and "bmt.rank() == 0" not in body(text)


@pytest.mark.parametrize(
    "statement",
    [
        "meter.total += 1",
        "meter.files.append(1)",
        "f.write(files.pop())",
        "f.write(str(meter.flush()))",
        "del files[0]",
    ],
)
def test_blocks_that_change_more_than_their_file_run_everywhere(statement: str) -> None:
    after = body(f'with open("a.txt", "a") as f:\n    {statement}')
    assert f'        with open("a.txt" if bmt.rank() == 0 else os.devnull, "a") as f:\n            {statement}' in after


@pytest.mark.parametrize(
    "statement", ["f.write(str(meter.mean()))", "rows = []\n    rows.append(1)\n    json.dump(rows, f)"]
)
def test_blocks_that_change_what_is_their_own_are_one_ranks(statement: str) -> None:
    after = body(f'with open("a.txt", "a") as f:\n    {statement}')
    assert ONE_RANK + 'with open("a.txt", "a") as f:' in after


def test_values_that_change_nothing_stay_in_place() -> None:
    assert ONE_RANK + 'writer.add_scalar("a", meter.mean(), 1)' in body('writer.add_scalar("a", meter.mean(), 1)')


WRITER = """class Writer:
    def __init__(self, path):
        self.file = open(path, "w")
        self.last = {{}}

    def add_scalar(self, tag, value, step):
        {keeps}
        self.file.write(f"{{tag}} {{value}} {{step}}")


"""
USE = '        log.add_scalar("loss", loss, 1)\n'


def test_an_object_that_notes_what_it_is_told_is_told_by_all() -> None:
    text = HEAD.replace("def main():\n", WRITER.format(keeps="self.last[tag] = value") + "def main():\n")
    for made in ("    log = Writer('a.txt')\n", "    log, n = Writer('a.txt'), 0\n"):
        after = converted(text.replace("    for x", made + "    for x") + USE + "\n\nmain()\n")
        assert '        log.add_scalar("loss", bmt.sum_loss(loss), 1)\n' in after
        assert 'self.file = open(path if bmt.rank() == 0 else os.devnull, "w")' in after


def test_an_object_that_only_writes_is_one_ranks() -> None:
    text = HEAD.replace("def main():\n", WRITER.format(keeps="pass") + "def main():\n")
    after = converted(text.replace("    for x", "    log = Writer('a.txt')\n    for x") + USE + "\n\nmain()\n")
    assert f'{ONE_RANK}log.add_scalar("loss", value_, 1)\n' in after


def test_what_is_averaged_where_it_is_handed_on_is_not_reported() -> None:
    text = HEAD.replace("def main():\n", WRITER.format(keeps="self.last[tag] = value.item()") + "def main():\n")
    whole = text.replace("    for x", "    log = Writer('a.txt')\n    for x") + USE + "\n\nmain()\n"
    assert not [found for found in convert_text(whole).reported if found.code == "BMT025"]


def test_a_file_that_a_helper_keeps_open(tmp_path: Path) -> None:
    (tmp_path / "log.py").write_text("import os\n\n\n" + WRITER.format(keeps="self.last[tag] = value"))
    main = HEAD.replace("import torch\n", "import torch\nfrom log import Writer\n")
    main = main.replace("    for x", "    log = Writer('a')\n    for x") + USE + "\n\nmain()\n"
    (tmp_path / "train.py").write_text(main)
    log, _ = convert_paths([tmp_path / "log.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert b"open(path if bmt.rank() == 0 else os.devnull" in log.after


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("json.dump(x, f); print('a')", "bmt.on_rank_0(json.dump)(x, f); bmt.print_rank('a')"),
        ("os.replace('a', 'b'); step = 1", "bmt.on_rank_0(os.replace)('a', 'b'); step = 1"),
        ("if x: os.remove(files.pop())", "if x: bmt.on_rank_0(os.remove)(files.pop())"),
        ("if x: table.writerow([1]); step = 1", "if x: bmt.on_rank_0(table.writerow)([1]); step = 1"),
        ("torch.save(x, 'a.tmp'); os.replace('a.tmp', 'a')", "; bmt.on_rank_0(os.replace)('a.tmp', 'a')"),
        (
            "writer.add_scalar('a', loss, 1); n = 1",
            "bmt.on_rank_0(writer.add_scalar)('a', bmt.sum_loss(loss), 1); n = 1",
        ),
    ],
)
def test_statements_that_share_their_line(line: str, wanted: str) -> None:
    """What they are given is computed by all, so that nothing has to stand in front of the line."""
    assert wanted in body(line)
