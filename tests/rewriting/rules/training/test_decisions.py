# ruff: noqa: E501 - tables of code are easier to read on one line
"""Tests that decide about calls of all ranks have one answer, whatever they test; others stay as they are."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import converted

HEAD = """import glob
import math
import os
import random
import time
from pathlib import Path
import numpy as np
import torch


def evaluate(model):
    right = 0
    for x in kept:
        right += (model(x) > 0).sum().item()
    return right / 8


"""
MAKE = """net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.01)
best, start, patience, done = 0.0, time.time(), 0, False
"""
LOOP = """for step, x in enumerate(batches):
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
SAVE = "torch.save(net.state_dict(), 'x.pt')"


def body(text: str) -> str:
    """What becomes of statements behind a step of the loop."""
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    return converted(HEAD + MAKE + LOOP + lines).partition("optim_manager.step()\n")[2]


DECIDED = {
    "a file": (f"if not os.path.exists('x.pt'):\n    {SAVE}", "if not bmt.agree(os.path.exists('x.pt')):"),
    "a path": (f"if Path('x.pt').is_file():\n    {SAVE}", "if bmt.agree(Path('x.pt').is_file()):"),
    "the clock": (f"if time.time() - start > 600:\n    {SAVE}", "if bmt.agree(time.time() - start > 600):"),
    "a draw": (f"if step % 2 == 0 and random.random() < 0.5:\n    {SAVE}", "if step % 2 == 0 and bmt.agree(random.random() < 0.5):"),
    "a draw of numpy": (f"if np.random.rand() < 0.5:\n    {SAVE}", "if bmt.agree(np.random.rand() < 0.5):"),
    "the environment": (f"if os.environ.get('FAST'):\n    {SAVE}", "if bmt.agree(os.environ.get('FAST')):"),
    "a variable of it": (f"if 'FAST' in os.environ:\n    {SAVE}", "if bmt.agree('FAST' in os.environ):"),
    "how many files": (f"if len(os.listdir('.')) > 2:\n    {SAVE}", "if bmt.agree(len(os.listdir('.')) > 2):"),
    "a metric": (f"acc = evaluate(net)\nif acc > best:\n    best = acc\n    {SAVE}", "if bmt.agree(acc > best):"),
    "a call in the test": (f"if evaluate(net) > best:\n    {SAVE}", "if bmt.agree(evaluate(net) > best):"),
    "a break": ("if time.time() - start > 600:\n    break", "if bmt.agree(time.time() - start > 600):"),
    "a flag": (
        f"if time.time() - start > 600:\n    done = True\nif done:\n    {SAVE}",
        "if time.time() - start > 600:\n        done = True\n    if bmt.agree(done):",
    ),
    "a count": (
        "acc = evaluate(net)\nif acc < best:\n    patience += 1\nif patience > 3:\n    break",
        "if acc < best:\n        patience += 1\n    if bmt.agree(patience > 3):",
    ),
    "a conditional expression": (
        "score = evaluate(net) if os.path.exists('x') else 0", "score = evaluate(net) if bmt.agree(os.path.exists('x')) else 0",
    ),
    "a short circuit": ("os.path.exists('x') or evaluate(net)", "bmt.agree(os.path.exists('x')) or evaluate(net)"),
    "an exit that is raised": ("if os.path.exists('x'):\n    raise SystemExit(0)", "if bmt.agree(os.path.exists('x')):"),
    "an end of the project's": (
        "class Stop(Exception):\n    pass\nif os.path.exists('x'):\n    raise Stop('enough')", "if bmt.agree(os.path.exists('x')):",
    ),
    "a while": ("while time.time() - start < 1:\n    evaluate(net)", "while bmt.agree(time.time() - start < 1):"),
    "an elif": (f"if step > 9:\n    pass\nelif os.path.exists('x'):\n    {SAVE}", "elif bmt.agree(os.path.exists('x')):"),
    "a list of files": (
        "for path in sorted(glob.glob('*.pt')):\n    net.load_state_dict(torch.load(path))",
        "for path in bmt.store.broadcast_object(list(sorted(glob.glob('*.pt')))):",
    ),
    "a guard": (
        f"if rank == 0 and evaluate(net) > best:\n    {SAVE}", "    if bmt.agree(evaluate(net) > best):\n        bmt.save(net, 'x.pt')",
    ),
    "a loss": (f"if loss < best:\n    {SAVE}", "if bmt.sum_loss(loss) < best:"),
    "a loss's finiteness": ("if not math.isfinite(loss):\n    break", "if not math.isfinite(bmt.sum_loss(loss)):"),
    "a loss that is no number": ("if torch.isnan(loss):\n    continue\nevaluate(net)", "if torch.isnan(bmt.sum_loss(loss)):"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), DECIDED.values(), ids=DECIDED.keys())
def test_rank_0_decides(text: str, wanted: str) -> None:
    assert wanted in body(text)


ALIKE = {
    "an epoch": f"if step % 10 == 0:\n    {SAVE}",
    "an argument": f"if args.save:\n    {SAVE}",
    "a mistake": "if os.path.exists('x'):\n    raise ValueError('x')",
    "a setting": f"if config['save']:\n    {SAVE}",
    "a loss as a number": f"value = loss.item()\nif value < best:\n    best = value\n    {SAVE}",
    "no call of all": "if os.path.exists('x'):\n    count = 1",
    "a rank's own": "if rank == 0:\n    if time.time() - start > 60:\n        print(1)",
    "a number of ranks": f"if os.environ.get('WORLD_SIZE'):\n    {SAVE}",
    "what is there": f"acc = evaluate(net)\nif acc is not None:\n    {SAVE}",
    "how long a list is": f"history.append(evaluate(net))\nif len(history) > 3:\n    {SAVE}",
}


@pytest.mark.parametrize("text", ALIKE.values(), ids=ALIKE.keys())
def test_what_is_the_same_on_all_ranks_stays(text: str) -> None:
    assert "agree" not in body(text)


REFUSED = {
    "its rank among items": "for i, y in enumerate(kept):\n    if i % world_size != rank:\n        continue\n    evaluate(net)",
    "a share of the items": "for i in range(rank, 9, world_size):\n    evaluate(net)",
    "every nth item": "for y in kept[rank::world_size]:\n    net(y)",
    "the size of a batch": "if x.size(0) < 8:\n    break",
    "no file of many": "try:\n    net.load_state_dict(torch.load(newest()))\nexcept FileNotFoundError:\n    pass",
    "no file to write": "try:\n    with open('x', 'w') as f:\n        f.write(str(evaluate(net)))\nexcept OSError:\n    pass",
    "a value that is used": "score = os.path.getsize('x') or evaluate(net)",
    "one rank that leaves": "if rank == 0:\n    if step > 3:\n        break",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_refused(text: str) -> None:
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    result = convert_text(HEAD + MAKE + LOOP + lines)
    assert not result.changed and [f.code for f in result.reported] == ["BMT039"]


FOUND = {
    "at once": ("net.load_state_dict(torch.load('x'))", "'x'"),
    "a path that is made": ("kept = torch.load(os.path.join(args.out, f'{name}.pt'))\nnet.load_state_dict(kept)", "os.path.join(args.out, f'{name}.pt')"),
    "an open file": ("with open(path, 'rb') as f:\n    kept = torch.load(f)\nnet.load_state_dict(kept)", "path"),
    "under a test": ("if resume:\n    net.load_state_dict(torch.load(folder / 'a.pt'))", "folder / 'a.pt'"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "path"), FOUND.values(), ids=FOUND.keys())
@pytest.mark.parametrize("caught", ["FileNotFoundError", "(OSError, KeyError)", "IOError as error"])
def test_a_file_that_may_not_be_there_is_there_for_all_ranks(text: str, path: str, caught: str) -> None:
    tried = "".join(f"    {line}\n" for line in text.splitlines())
    after = converted(f"{HEAD}{MAKE}try:\n{tried}except {caught}:\n    print('none')\n{LOOP}")
    agreed = f"if not bmt.agree(os.path.exists({path})):"
    indent = after.split(agreed)[0].rpartition("\n")[2]
    assert f"{indent}{agreed}\n{indent}    raise FileNotFoundError({path})\n{indent}" in after
    assert after.count("bmt.agree") == 1 and converted(after) == after


def test_a_stopper_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "stopper.py").write_text(STOPPER)
    (tmp_path / "train.py").write_text(
        f"from stopper import Stopper\n{HEAD}{MAKE}stop = Stopper(3)\n{LOOP}    stop(evaluate(net), net)\n"
        "    if stop.stopped:\n        break\n"
    )
    results = convert_paths([tmp_path / "stopper.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert b"elif bmt.agree(value < self.best):" in results[0].after
    assert b"if self.best is None:" in results[0].after and b"if stop.stopped:" in results[1].after


TRAINER = """

class Trainer:
    def __init__(self, model, opt, calls):
        self.model, self.opt, self.calls = model, opt, calls
        self.best, self.stop, self.started = 0.0, False, time.time()

    def fit(self, batches):
        for epoch in range(5):
            for x in batches:
                loss = self.model(x).mean()
                self.opt.zero_grad()
                loss.backward()
                self.opt.step()
            right = self.validate(batches)
            for call in self.calls:
                call.at_end(self, right["acc"])
            if self.stop:
                break
            best = right["acc"] > self.best
            self.save(best)
            if self.late():
                return
        while not self.finished():
            self.validate(batches)

    def late(self):
        return time.time() - self.started > 3600

    def finished(self):
        return os.path.exists("stop")

    def validate(self, batches):
        right = 0
        for x in batches:
            right += (self.model(x) > 0).sum().item()
        return {"acc": right, "n": len(batches)}

    def save(self, best):
        if best:
            torch.save(self.model.state_dict(), "best.pt")


class Late:
    def at_end(self, trainer, acc):
        trainer.stop = acc < 0.1


net = torch.nn.Linear(4, 1)
Trainer(net, torch.optim.SGD(net.parameters(), lr=0.1), [Late()]).fit(batches)
"""


def test_a_trainer_with_calls_of_others() -> None:
    after = converted(HEAD + TRAINER)
    for test in ("if bmt.agree(self.stop):", "if bmt.agree(self.late()):", "if bmt.agree(best):"):
        assert test in after
    assert "while not bmt.agree(self.finished()):" in after and after.count("agree") == 4


STOPPER = """import torch


class Stopper:
    def __init__(self, patience):
        self.patience, self.count, self.best, self.stopped = patience, 0, None, False

    def __call__(self, value, model):
        if self.best is None:
            self.best = value
            self.keep(model)
        elif value < self.best:
            self.count += 1
            self.stopped = self.count >= self.patience
        else:
            self.best = value
            self.keep(model)

    def keep(self, model):
        torch.save(model.state_dict(), "best.pt")
"""

# On two ranks whose clocks, files, variables, random numbers and data differ -----------------------------------

PROGRAM = """import glob
import math
import os
import random
import time
import torch


def evaluate(model):
    noise = 1e-9 * time.time()  # ranks round differently
    with torch.no_grad():
        return model(torch.ones(2, 4)).mean().item() + noise


def main():
    torch.manual_seed(1)
    net = torch.nn.Linear(4, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.01)
    start, best = time.time(), -1e9
    if not os.path.exists("first.pt"):
        torch.save(net.state_dict(), "first.pt")
        done.append("first")
    for step in range(8):
        loss = (net(torch.ones(2, 4)) - 30.0 * mine * (step == 3)).pow(2).mean()
        if loss > 60.0:
            done.append(f"skipped {step}")
            continue
        opt.zero_grad()
        loss.backward()
        opt.step()
        if time.time() - start > 500:
            torch.save(net.state_dict(), "time.pt")
            done.append("time")
            start = time.time()
        if random.random() < 0.5:
            done.append("drawn")
            evaluate(net)
        if os.environ.get("FAST"):
            evaluate(net)
            done.append("fast")
        if evaluate(net) > best:
            best = evaluate(net)
            torch.save(net.state_dict(), "best.pt")
            done.append("best")
        if len(os.listdir(".")) > 3:
            torch.save(net.state_dict(), "many.pt")
            done.append("many")
        os.path.exists("mine.txt") or evaluate(net)
        score = evaluate(net) if os.path.isfile("mine.txt") else 0
        done.append(score != 0)
    tries = 0
    while random.random() < 0.8 and tries < 5:
        tries += 1
        evaluate(net)
    done.append(tries)
    for path in sorted(glob.glob("*.pt")):
        evaluate(net)
        done.append(path)
    if time.time() % 2000 < 1000:
        return
    done.append("end")
    torch.save(net.state_dict(), "end.pt")


main()
"""


def play(text: str, folder: str) -> list[Any]:
    """A converted program on a rank that sees another world than the other does."""
    rank = int(os.environ["RANK"])
    own = Path(folder) / str(rank)
    own.mkdir()
    os.chdir(own)
    clock, done = time.time, []
    random.seed(rank)
    if rank == 1:
        os.environ["FAST"] = "1"
        (own / "mine.txt").write_text("mine")
        (own / "other.pt").write_text("")
        time.time = lambda: clock() * 1.001 + 400 * len(done)  # type: ignore[assignment]
    exec(compile(text, "program.py", "exec"), {"done": done, "mine": 2 * rank, "__name__": "__main__"})
    return done


def test_ranks_that_see_another_world_do_the_same(tmp_path: Path) -> None:
    one, other = run_ranks(2, play, converted(PROGRAM), str(tmp_path), initialize=False, fresh=True, timeout=60)
    assert one == other and {"first", "best", "drawn"} <= set(one) and any("skipped" in str(item) for item in one)
