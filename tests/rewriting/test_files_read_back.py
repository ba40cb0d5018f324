"""A file that one rank writes and all ranks read at once is reported: others may come too early."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

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
CACHE = """def data(path, again):
    if os.path.exists(path + "/cache") and not again:
        return pickle.load(open(path + "/cache", "rb"))
    else:
        made = read(path)
        pickle.dump(made, open(path + "/cache", "wb"))
    return made
"""
READ_BACK = [
    CACHE,
    CACHE.replace("pickle.dump(made, open(", "with open(").replace('"wb"))', '"wb") as f:\n            f.write(made)'),
    'with open(root + "a.txt", "w") as file:\n    file.write("a")\ntext = open(root + "a.txt").read()\n',
    'np.save("ids.npy", ids)\nids = np.load("ids.npy", mmap_mode="r")\n',
    'def write():\n    with open("a{}.txt".format(1), "w") as file:\n        file.write("a")\n\n\n'
    'def read():\n    return open("a{}.txt".format(1)).read()\n\n\nwrite()\nread()\n',
]  # fmt: skip
NOT_READ = [
    'with open(root + "a.txt", "w") as file:\n    file.write("a")\ntext = open(root + "b.txt").read()\n',
    'with open("a.txt") as file:\n    text = file.read()\nwith open("a.txt", "w") as file:\n    file.write(text)\n',
    'with open("log.txt", "a") as file:\n    file.write("a")\ntext = open("log.txt").read()\n',
    'def write(path):\n    with open(path, "w") as file:\n        file.write("a")\n\n\n'
    "def read(path):\n    return open(path).read()\n",
]


def told(**parts: str) -> list[str]:
    result = convert_text(HEAD.format(**({"before": "", "inside": "pass", "behind": ""} | parts)))
    assert not result.error
    return [finding.message for finding in result.reported if "too early" in finding.message]


@pytest.mark.parametrize("before", READ_BACK)
def test_what_is_read_at_once_is_reported(before: str) -> None:
    (message,) = told(before=before)
    assert ("bmt.agree(os.path.exists(" in message) is ("exists" in before)


@pytest.mark.parametrize("before", NOT_READ)
def test_what_is_not_read_after_it_is_written_is_not(before: str) -> None:
    assert not told(before=before)


def test_what_a_loop_that_trains_writes_is_for_another_run() -> None:
    inside = 'json.dump([1], open("state.json", "w"))\n'
    assert not told(before='def load():\n    return json.load(open("state.json"))\n', inside=inside)


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
    result = convert_text(
        "import h5py\nimport lmdb\nimport sqlite3\n" + HEAD.format(before=line, inside="pass", behind="")
    )
    assert sum("opens this database" in finding.message for finding in result.reported) == count
