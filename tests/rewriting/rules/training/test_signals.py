"""Signals that ranks get between different steps: a flag decides for all alike, and a handler that saves is told of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted

SCRIPT = """import os
import signal
import sys
import threading

import torch
from torch.utils.data import DataLoader

torch.manual_seed(0)
net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
data = torch.randn(24, 4)
{made}
for step, x in enumerate(DataLoader(data, batch_size=4)):
    loss = net(x).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    told(step)
    if {test}:
        torch.save(net.state_dict(), "kept.pt")
        break
"""
CLASS = """class Stop:
    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, number, frame):
        self.asked = True


stop = Stop()
"""


def handler(body: str, first: str = "") -> str:
    return f"{first}\n\n\ndef handler(number, frame):\n{body}\n\n\nsignal.signal(signal.SIGTERM, handler)\n"


FLAGS = {
    "a name": (handler("    global stop\n    stop = True", "stop = False"), "stop"),
    "an event": (handler("    stop.set()", "stop = threading.Event()"), "stop.is_set()"),
    "a key": (handler("    state['stop'] = True", "state = {'stop': False}"), "state['stop']"),
    "an attribute": (CLASS, "stop.asked"),
}


@pytest.mark.parametrize(("made", "test"), FLAGS.values(), ids=FLAGS.keys())
def test_a_flag_of_a_handler_is_agreed_on(made: str, test: str) -> None:
    after = converted(SCRIPT.format(made=made, test=test))
    assert f"if bmt.agree({test}):" in after


def test_other_flags_are_not() -> None:
    made = handler("    print(number)", "stop = False")
    assert "bmt.agree" not in converted(SCRIPT.format(made=made, test="stop"))


SAVE = "    torch.save(net.state_dict(), 'kept.pt')\n    sys.exit(0)"
SAVING = {
    "a function": handler(SAVE),
    "a lambda": f"def kept():\n{SAVE}\n\n\nsignal.signal(signal.SIGINT, lambda number, frame: kept())\n",
    "a method": CLASS.replace("self.asked = True", "torch.save(net.state_dict(), 'kept.pt')"),
}


@pytest.mark.parametrize("made", SAVING.values(), ids=SAVING.keys())
def test_a_handler_that_saves_is_told(made: str) -> None:
    text = SCRIPT.format(made=made, test="False")
    lines = [text.splitlines()[f.line - 1] for f in convert_text(text).reported if "a signal meets" in f.message]
    assert len(lines) == 1 and "signal.signal(" in lines[0]


# On two ranks -----------------------------------------------------------------------------------------------------


def play(text: str, folder: str, when: dict[int, int]) -> int:
    """The step at which this rank stops; it gets SIGTERM behind step ``when`` of its rank."""
    import signal

    os.chdir(folder)
    rank = int(os.environ.get("RANK", "0"))

    def told(step: int) -> None:
        if step == when[rank]:
            os.kill(os.getpid(), signal.SIGTERM)

    given = {"__name__": "__main__", "told": told}
    exec(compile(text, "program.py", "exec"), given)
    return int(given["step"])  # type: ignore[call-overload]


def test_ranks_that_get_it_at_different_steps_save_together(tmp_path: Path) -> None:
    import torch

    text = SCRIPT.format(made=FLAGS["a name"][0], test="stop")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert run_ranks(1, play, text, str(tmp_path / "one"), {0: 2}, initialize=False, fresh=True) == [2]
    after, when = converted(text), {0: 2, 1: 1}
    assert run_ranks(2, play, after, str(tmp_path / "two"), when, initialize=False, fresh=True) == [2, 2]
    one, two = (torch.load(tmp_path / name / "kept.pt") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key]) for key in one)
