# ruff: noqa: E501 - tables of code are easier to read on one line
"""A command of the system that is run for what it leaves behind is one rank's, and the others wait for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted, printed

HEAD = """import os
import subprocess
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(1)
net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4)


{function}def train():
    for (x,) in loader:
        loss = net(x).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    {command}


train()
"""
SCORE = "import time\ntime.sleep(0.2)\nprint(len(open('answers.txt').read()), file=open('score.txt', 'w'))\n"
READ = "print(open('score.txt').read().strip())"
WRITE = "with open('answers.txt', 'w') as f:\n        f.write('12345')\n    "
COMMANDS = {
    "a shell": ("", f"{WRITE}os.system(f'{{sys.executable}} score.py')\n    {READ}"),
    "arguments": ("", f"{WRITE}subprocess.run([sys.executable, 'score.py'], check=True)\n    {READ}"),
    "a call": ("", f"{WRITE}subprocess.call([sys.executable, 'score.py'])\n    {READ}"),
    "a checked call": ("", f"{WRITE}subprocess.check_call('python score.py', shell=True)\n    {READ}"),
    "in a function": (
        f"def score(name):\n    os.system(sys.executable + ' ' + name)\n    {READ}\n\n\n", f"{WRITE}score('score.py')",
    ),
    "in a try": (
        f"def score():\n    try:\n        os.system(sys.executable + ' score.py')\n    except:\n        raise Exception('no perl')\n    {READ}\n\n\n",
        f"{WRITE}score()",
    ),
}  # fmt: skip
USED = {
    "what it prints": "print(subprocess.check_output([sys.executable, '-c', 'print(1)']).decode())",
    "whether it failed": "if os.system('true') != 0:\n        raise RuntimeError('no')",
}
APART = {
    "of a rank": "os.system(f'mkdir -p out{os.environ[\"RANK\"]}')",
    "of a time": "import time\n    os.system(f'mkdir -p out{time.time()}')",
    "by some": "import random\n    if random.random() < 0.5:\n        os.system('true')",
}


@pytest.mark.parametrize("name", USED)
def test_what_gives_something_is_run_by_all(name: str) -> None:
    after = converted(HEAD.format(function="", command=USED[name]))
    assert USED[name].split("\n")[0].removeprefix("print(") in after and "synchronize" not in after


@pytest.mark.parametrize("name", APART)
def test_what_ranks_may_run_apart_is_reported(name: str) -> None:
    result = convert_text(HEAD.format(function="", command=APART[name]))
    assert any("every rank runs this command" in finding.message for finding in result.reported)
    assert APART[name].split("\n")[-1].strip() in result.after.decode()


def test_a_command_of_a_dataset_is_reported() -> None:
    dataset = "class Sounds(torch.utils.data.Dataset):\n    def __getitem__(self, i):\n        os.system(f'ffmpeg -i {i}.mp3 {i}.wav')\n        return i\n\n\n"
    result = convert_text(HEAD.format(function=dataset, command=""))
    assert "    os.system(f'ffmpeg -i {i}.mp3 {i}.wav')\n        return i" in result.after.decode()
    assert any("every rank runs this command" in finding.message for finding in result.reported)


def test_a_command_with_a_result_waits_for_its_file() -> None:
    command = f"path = 'answers.txt'\n    {WRITE.replace(chr(39) + 'answers.txt' + chr(39), 'path')}print(subprocess.check_output(['wc', path]))"
    after = converted(HEAD.format(function="", command=command))
    assert "f.write('12345')\n    bmt.synchronize()\n" in after


def test_the_ranks_are_started_before_it() -> None:
    text = HEAD.format(function="def start():\n    os.system('cp train.py backup.py')\n\n\n", command="pass")
    after = converted(text.replace("torch.manual_seed(1)\n", "").replace("\ntrain()", "\nstart()\ntrain()"))
    assert after.index("bmt.init_distributed()") < after.index("\nstart()")
    assert "    if bmt.rank() == 0:\n        os.system('cp train.py backup.py')\n    bmt.synchronize()\n" in after


@pytest.mark.parametrize("name", COMMANDS)
def test_one_rank_runs_it_and_all_read_what_it_wrote(name: str, tmp_path: Path) -> None:
    function, command = COMMANDS[name]
    after = converted(HEAD.format(function=function, command=command))
    assert after.count("bmt.synchronize()") == 1
    (tmp_path / "score.py").write_text(SCORE)
    assert run_ranks(2, _play, after, str(tmp_path)) == [["5"], []]


def _play(text: str, folder: str) -> list[str]:
    os.chdir(folder)
    return printed(re.sub(r"bmt\.init_distributed\(.*\)", "torch.manual_seed(1)", text))
