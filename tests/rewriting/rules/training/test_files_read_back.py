# ruff: noqa: E501 - tables of code are easier to read on one line
"""A file that one rank writes and all ranks read: they wait for it, or are told that others may come too early."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import converted

HEAD = """import json
import os
import pickle
import numpy as np
import torch

{before}
model = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(model.parameters())
for x in batches:
    loss = model(x).mean()
    loss.backward()
    opt.step()
    {inside}
{behind}
"""
WAIT = "bmt.synchronize()\n"


def filled(before: str = "", inside: str = "pass", behind: str = "") -> str:
    return HEAD.format(before=before, inside=inside, behind=behind)


def told(**parts: str) -> list[str]:
    result = convert_text(filled(**parts))
    assert not result.error
    return [finding.message for finding in result.reported if "too early" in finding.message]


CACHE = """def data(path, again):
    if os.path.exists(path + "/cache") and not again:
        return pickle.load(open(path + "/cache", "rb"))
    else:
        made = read(path)
        pickle.dump(made, open(path + "/cache", "wb"))
    return made
"""
MADE = """def data(path):
    cache = path + "/cache"
    if not os.path.exists(cache):
        made = read(path)
        with open(cache, "wb") as file:
            pickle.dump(made, file)
        {end}
    with open(cache, "rb") as file:
        return pickle.load(file)


data("a")
"""
ITEM = """class Data(torch.utils.data.Dataset):
    def {method}(self, path):
        if not os.path.exists(path):
            np.save(path, np.ones(3))
        self.data = np.load(path)


Data("a.npy")
"""
TEXT = 'with open("a.txt", "w") as file:\n    file.write("a")\n'
READ = 'text = open("a.txt").read()\n'
TWO = 'def write(path):\n    with open(path, "w") as file:\n        file.write("a")\n\n\ndef read(path):\n    return open(path).read()\n\n\n'


def indented(text: str) -> str:
    return "    " + text.replace("\n", "\n    ").rstrip() + "\n"


# Reported ---------------------------------------------------------------------------------------------------------

REPORTED = {
    "a function that nothing calls": CACHE,
    "in a worker": ITEM.replace("{method}", "__getitem__"),
    "in a try": f"try:\n{indented(TEXT + READ)}except OSError:\n    pass\n",
    "in a while": f"while more:\n{indented(TEXT + READ)}",
    "a function that is handed on": f"def work(i):\n{indented(TEXT + READ)}\n\nlist(map(work, range(2)))\n",
    "a function that one rank calls": f"def work():\n{indented(TEXT + READ)}\n\nif rank == 0:\n    work()\n",
    "a rank leaves before": f"def work():\n    if rank > 0:\n        return\n{indented(TEXT + READ)}\n\nwork()\n",
    "the other branch of a guard": f"if rank == 0:\n{indented(TEXT)}else:\n{indented(READ)}",
    "files that a rank has": f'for name in os.listdir("a"):\n    if os.path.exists(name):\n{indented(indented(TEXT + READ))}',
    "a way out": f"def work(x):\n    for a in x:\n        if a:\n{indented(indented(indented(TEXT)))}            return\n{indented(READ)}\n\nwork([])\n",
}


@pytest.mark.parametrize("before", REPORTED.values(), ids=REPORTED.keys())
def test_where_not_all_ranks_are_known_to_come_it_is_reported(before: str) -> None:
    (message,) = told(before=before)
    assert ("bmt.agree(os.path.exists(" in message) is ('"/cache"' in before)
    assert WAIT not in converted(filled(before))


NOT_READ = {
    "another file": 'with open(root + "a.txt", "w") as file:\n    file.write("a")\ntext = open(root + "b.txt").read()\n',
    "read before": 'with open("a.txt") as file:\n    text = file.read()\nwith open("a.txt", "w") as file:\n    file.write(text)\n',
    "a log": 'with open("log.txt", "a") as file:\n    file.write("a")\ntext = open("log.txt").read()\n',
    "paths that are given": TWO,
    "other paths that are given": TWO + 'write("a.txt")\nread("b.txt")\n',
    "by an option": f"if args.make:\n{indented(TEXT)}else:\n{indented(READ)}",
    "one rank reads": f"{TEXT}if rank == 0:\n{indented(READ)}",
    "they wait already": f"if rank == 0:\n{indented(TEXT)}torch.distributed.barrier()\n{READ}",
}


@pytest.mark.parametrize("before", NOT_READ.values(), ids=NOT_READ.keys())
def test_what_is_not_read_after_it_is_written_is_not(before: str) -> None:
    assert not told(before=before)
    assert converted(filled(before)).count(WAIT) == before.count("barrier()")


def test_what_a_loop_that_trains_writes_is_for_another_run() -> None:
    inside = 'json.dump([1], open("state.json", "w"))\n'
    before = 'def load():\n    return json.load(open("state.json"))\n'
    assert not told(before=before, inside=inside) and WAIT not in converted(filled(before, inside))


def test_what_another_file_calls_is_reported(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(TWO)
    (tmp_path / "train.py").write_text("from data import write\n" + filled('write("a.txt")\n' + READ))
    results = convert_paths([tmp_path / "data.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert [r.path.name for r in results for finding in r.reported if "too early" in finding.message] == ["data.py"]


def test_what_another_program_reads_is_not(tmp_path: Path) -> None:
    reads = "\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"
    (tmp_path / "data.py").write_text(TWO + reads)
    (tmp_path / "predict.py").write_text('from data import read\n\nprint(read("a.txt"), open("a.txt").read())\n')
    (tmp_path / "train.py").write_text("from data import write\n" + filled('write("a.txt")\n'))
    files = [tmp_path / name for name in ("data.py", "predict.py", "train.py")]
    results = convert_paths(files, Options(), [tmp_path])
    said = [finding for result in results for finding in result.reported if "predict.py" in finding.message]
    assert results[2].changed and not said


# Mended -----------------------------------------------------------------------------------------------------------

GUARDED = f"if bmt.rank() == 0:\n{indented(TEXT)}bmt.synchronize()\n"
WAITED = {
    "a block": (TEXT + READ, GUARDED + READ),
    "one line": (
        'np.save("ids.npy", ids)\nids = np.load("ids.npy", mmap_mode="r")\n',
        'if bmt.rank() == 0:\n    np.save("ids.npy", ids)\nbmt.synchronize()\nids = np.load(',
    ),
    "a name for the path": (f'name = "a.txt"\n{TEXT.replace(chr(34) + "a.txt" + chr(34), "name")}{READ}', WAIT + READ),
    "a table": ('import pandas as pd\n\ndf.to_csv("a.csv")\ndf = pd.read_csv("a.csv")\n', 'df.to_csv("a.csv")\nbmt.synchronize()\n'),
    "a tokenizer": (
        'tokenizer.save_pretrained("a")\ntokenizer = AutoTokenizer.from_pretrained("a")\n',
        'tokenizer.save_pretrained("a")\nbmt.synchronize()\n',
    ),
    "data": (
        'dataset.save_to_disk("a")\ndataset = datasets.Dataset.load_from_disk("a")\n',
        'if bmt.rank() == 0:\n    dataset.save_to_disk("a")\nbmt.synchronize()\n',
    ),
    "a path's text": ('path.write_text("a")\ntext = path.read_text()\n', f"{WAIT}text = path.read_text()\n"),
    "a path that is opened": (
        'with path.open("w") as file:\n    file.write("a")\nwith path.open() as file:\n    file.read()\n',
        f"{WAIT}with path.open() as file:\n",
    ),
    "renamed": (
        f'{TEXT.replace("a.txt", "a.tmp")}os.replace("a.tmp", "a.txt")\n{READ}',
        f'    os.replace("a.tmp", "a.txt")\n{WAIT}{READ}',
    ),
    "an open file": (
        f'file = open("a.txt", "w")\nfile.write("a")\nfile.close()\n{READ}',
        f"file.close()\n{WAIT}{READ}",
    ),
    "under a test of what is there": (
        f'if not os.path.exists("a.txt"):\n{indented(TEXT)}{READ}',
        f'if not os.path.exists("a.txt"):\n{indented(GUARDED.removesuffix(WAIT))}{WAIT}{READ}',
    ),
    "in a loop": (f"for i in range(3):\n{indented(TEXT + READ)}", f"    {WAIT}    {READ}"),
    "behind a loop": (f"for i in range(3):\n{indented(TEXT)}{READ}", f"\n{WAIT}{READ}"),
    "in a function": (f"def work():\n{indented(TEXT + READ)}\n\nwork()\n", f"    {WAIT}    {READ}"),
    "two functions": (
        f"def write():\n{indented(TEXT)}\n\ndef read():\n{indented(READ)}\n\nwrite()\nread()\n",
        f"{indented(GUARDED)}\n\ndef read",
    ),
    "two functions with a path": (TWO + 'write("a.txt")\nread("a.txt")\n', f'write("a.txt")\n{WAIT}read("a.txt")\n'),
    "a function's and the script's": (
        f'{TWO}if not os.path.exists("a.txt"):\n    write("a.txt")\n{READ}',
        f'    write("a.txt")\n{WAIT}{READ}',
    ),
    "an object that all ranks make": (
        ITEM.replace("{method}", "__init__"),
        f"        {WAIT}        self.data = np.load(path)\n",
    ),
    "a guard of the script's": (f"if rank == 0:\n{indented(TEXT)}{READ}", f"if rank == 0:\n{indented(TEXT)}{WAIT}{READ}"),
    "a guarded save": ('if rank == 0:\n    torch.save(1, "a.pt")\ntorch.load("a.pt")\n', f'{WAIT}torch.load("a.pt")\n'),
}  # fmt: skip


@pytest.mark.parametrize(("before", "wanted"), WAITED.values(), ids=WAITED.keys())
def test_ranks_wait_for_what_one_writes(before: str, wanted: str) -> None:
    after = converted(filled(before))
    assert wanted in after and after.count(WAIT) == 1
    assert not told(before=before)


DECIDED = {
    "two branches": (CACHE + '\n\ndata("a", False)\n', 'if bmt.agree(os.path.exists(path + "/cache") and not again):'),
    "made, and given at once": (MADE.replace("{end}", "return made"), "if bmt.agree(not os.path.exists(cache)):"),
    "found, and given at once": (
        "def data(cache):\n    if os.path.exists(cache):\n        with open(cache) as file:\n            return json.load(file)\n"
        '    made = [1]\n    json.dump(made, open(cache, "w"))\n    return made\n\n\ndata("a")\n',
        "    if bmt.agree(os.path.exists(cache)):\n",
    ),
}


@pytest.mark.parametrize(("before", "wanted"), DECIDED.values(), ids=DECIDED.keys())
def test_rank_0_decides_whether_a_file_is_read_or_written(before: str, wanted: str) -> None:
    after = converted(filled(before))
    assert wanted in after and WAIT not in after
    assert not told(before=before)


def test_what_is_made_and_read_is_waited_for() -> None:
    after = converted(filled(MADE.replace("{end}", "made = None")))
    assert f'    {WAIT}    with open(cache, "rb") as file:\n' in after


SCRIPT = """import json
import os
import time
import torch


def words(path):
    if not os.path.exists(path):
        with open(path, "w") as file:
            time.sleep(0.5)
            file.write("a b c")
    with open(path) as file:
        return file.read().split()


def cached(path):
    if os.path.exists(path):
        return json.load(open(path))
    made = [1, 2]
    time.sleep(rank)
    json.dump(made, open(path, "w"))
    return made


done.append(words("words.txt"))
done.append(cached("cache.json"))
model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
loss = model(torch.ones(1, 4)).mean()
loss.backward()
opt.step()
"""


def play(text: str, folder: str) -> list[Any]:
    os.chdir(folder)
    done: list[Any] = []
    exec(compile(text, "program.py", "exec"), {"done": done, "rank": int(os.environ["RANK"]), "__name__": "__main__"})
    return done


def test_a_slow_writer_is_waited_for(tmp_path: Path) -> None:
    found = run_ranks(2, play, converted(SCRIPT), str(tmp_path), initialize=False, fresh=True, timeout=60)
    assert found == [[["a", "b", "c"], [1, 2]]] * 2


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ('env = lmdb.open("out", map_size=1)', 1),
        ('env = lmdb.open("in", readonly=True)', 0),
        ('out = h5py.File("a.h5", "w")', 1),
        ('out = h5py.File("a.h5")', 0),
        ('db = sqlite3.connect("a.db")', 1),
    ],
)
def test_a_database_that_all_ranks_write_is_reported(line: str, count: int) -> None:
    result = convert_text("import h5py\nimport lmdb\nimport sqlite3\n" + filled(line))
    assert sum("opens this database" in finding.message for finding in result.reported) == count


HOLDS_PATHS = """import os
import pickle
import torch
from torch.utils.data import DataLoader, Dataset


class Cached(Dataset):
    def __init__(self, names):
        self.files = []
        self.table = {{}}
        for number, name in enumerate(names):
            path = name + ".pkl"
            if not os.path.exists(path):
                with open(path, "wb") as file:
                    pickle.dump(read(name), file)
            {kept}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        {read}


net = torch.nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in DataLoader(Cached(names), batch_size=4):
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
PATHS_HELD = {
    "a list": (
        "self.files.append(path)",
        "with open(self.files[index], 'rb') as file:\n            return pickle.load(file)",
    ),
    "by a name": (
        "self.files.append(path)",
        "one = self.files[index % 9]\n        return pickle.load(open(one, 'rb'))",
    ),
    "a table": ("self.table[number] = path", "return torch.load(self.table[index])"),
    "by number": ("self.table[number] = path", "one = self.table[index]\n        return torch.load(one)"),
    "each": (
        "self.files.append(path)",
        "return [torch.load(one) for one in self.files]\n\n    def all(self):\n        for one in self.files:\n            torch.load(one)",
    ),
}
PATHS_APART = {
    "another list": ("self.files.append(path)", "return torch.load(self.others[index])"),
    "not kept": ("pass", "return torch.load(self.files[index])"),
    "another path": ("self.files.append(number)", "return torch.load(self.files[index])"),
}


def waits(kept: str, read: str) -> bool:
    result = convert_text(HOLDS_PATHS.format(kept=kept, read=read))
    said = any("may read it too early" in finding.message for finding in result.reported)
    return said or b"synchronize" in result.after


@pytest.mark.parametrize("name", PATHS_HELD)
def test_files_whose_paths_an_object_keeps(name: str) -> None:
    assert waits(*PATHS_HELD[name])


@pytest.mark.parametrize("name", PATHS_APART)
def test_files_whose_paths_an_object_keeps_elsewhere(name: str) -> None:
    assert not waits(*PATHS_APART[name])


SAVED = """def save(folder, names):
    path = os.path.join(folder, "config.json")
    with open(path, "w") as file:
        json.dump(names, file)
def settings(folder="runs"):
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        return json.load(file)
"""
SETTINGS = SAVED[SAVED.index("def settings") :]
ASKED_FOR = {
    "called": "settings()",
    "with a folder": "names = settings('runs')",
    "handed on": "run(settings)",
    "by its name": "globals()['settings']()",
    "in a table": "READERS = {'json': settings}",
    "told of in a list": "__all__ = ['settings']",
    "of a module": "import utils\nutils.settings()",
}


def seen_to(**parts: str) -> bool:
    """Whether ranks wait, or are told to."""
    return bool(told(**parts)) or b"synchronize" in convert_text(filled(**parts)).after


@pytest.mark.parametrize("name", ASKED_FOR)
def test_what_a_function_reads_that_somebody_asks_for(name: str) -> None:
    assert seen_to(before=SAVED, behind=f"save('runs', {{}})\n{ASKED_FOR[name]}")


def test_what_somebody_unseen_may_ask_for() -> None:
    assert seen_to(before=SAVED.replace(SETTINGS, "@command\n" + SETTINGS), behind="save('runs', {})")


@pytest.mark.parametrize("reader", [SETTINGS, SETTINGS.replace("(file)\n", "(file) or settings(folder + '/..')\n")])
@pytest.mark.parametrize("behind", ["", "settings_of = 3", "# settings()"])
def test_what_nobody_in_the_project_reads(reader: str, behind: str) -> None:
    assert not seen_to(before=SAVED.replace(SETTINGS, reader), behind=f"save('runs', {{}})\n{behind}")
