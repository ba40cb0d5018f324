# ruff: noqa: E501 - tables of code are easier to read on one line
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


PROFILED = {
    "a trace": ('prof.export_chrome_trace("trace.json")', 'if bmt.rank() == 0:\n            prof.export_chrome_trace("trace.json")'),
    "stacks": ('prof.export_stacks("stacks.txt", "self_cuda_time_total")', "if bmt.rank() == 0:\n            prof.export_stacks("),
    "a timeline": ('prof.export_memory_timeline("memory.html")', "if bmt.rank() == 0:\n            prof.export_memory_timeline("),
    "memory": ('torch.cuda.memory._dump_snapshot("memory.pickle")', "if bmt.rank() == 0:\n            torch.cuda.memory._dump_snapshot("),
    "of Python": ('prof.dump_stats("calls.prof")', "if bmt.rank() == 0:\n            prof.dump_stats("),
    "when it is ready": (
        'with torch.profiler.profile(on_trace_ready=lambda p: p.export_chrome_trace(f"{p.step_num}.json")) as prof:\n    prof.step()',
        'on_trace_ready=lambda p: bmt.on_rank_0(p.export_chrome_trace)(f"{p.step_num}.json")',
    ),
    "a table, later": ("done = lambda table: table.to_csv('a.csv')", "lambda table: bmt.on_rank_0(table.to_csv)('a.csv')"),
    "a function": (
        'def ready(p):\n    p.export_chrome_trace("trace.json")\nprof = torch.profiler.profile(on_trace_ready=ready)',
        'def ready(p):\n            if bmt.rank() == 0:\n                p.export_chrome_trace("trace.json")',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROFILED)
def test_what_profilers_write_is_one_ranks(name: str) -> None:
    before, after = PROFILED[name]
    assert after in body(before)
    assert body(before).count("bmt.rank() == 0") + body(before).count("on_rank_0") == 1


@pytest.mark.parametrize(
    "text",
    [
        'prof = torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler("log"))',
        "top = lambda p: p.key_averages().table()",
    ],
)
def test_what_each_rank_writes_by_itself_stays(text: str) -> None:
    assert text in body(text)


def test_a_function_inside_has_names_of_its_own() -> None:
    """What a block binds is not read by a nested function, or by a list, that binds the name itself."""
    inner = "    def scores(found):\n        for key in found:\n            print(key)\n        return [key for key in found]\n\n"
    text = HEAD.replace("    for x", inner + "    for x") + "    if rank == 0:\n        value = loss.item()\n"
    text += '        with open("one.txt", "w") as out:\n            for key in [value]:\n                out.write(str(key))\n'
    head = "import torch.distributed as dist\ndist.init_process_group('gloo')\nrank = dist.get_rank()\n"
    after = converted(head + text + TAIL)
    assert "    value = bmt.sum_loss(loss).item()\n    if bmt.rank() == 0:\n        with open(" in after
    read = text.replace("return [key for key in found]", "return key").replace("for key in found:", "if found:")
    result = convert_text(
        head + read.replace("            print(key)\n        return", "            pass\n        return") + TAIL
    )
    assert any("has a file open to write" in finding.message for finding in result.reported)
