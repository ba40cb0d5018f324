"""Errors that are caught around training: who meets one alone does not go on alone, and what is said is heard."""

from __future__ import annotations

import os
from textwrap import indent
from typing import Any

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import RanksFailed, run_ranks

from ...helpers import converted

HEAD = """import contextlib
import sys
import torch
from torch.utils.data import DataLoader

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=4)
"""
STEP = """loss = model(x).mean()
loss.backward()
optimizer.step()
optimizer.zero_grad()
"""
LOOP = "for x in loader:\n" + indent(STEP, "    ")
SAVE = "torch.save(model.state_dict(), 'm.pt')\n"
RAISE = "    if bmt.world_size() > 1:\n        raise\n"
MEMORY = "if 'memory' in str(error):\n    {goes}\nelse:\n    raise error\n"


def tried(body: str, *handlers: str) -> str:
    return "try:\n" + indent(body, "    ") + "\n".join(handlers)


def skipping(handler: str) -> str:
    return "for x in loader:\n" + indent(tried(STEP, handler), "    ")


GOES_ON = {
    "all of training": tried(LOOP, "except Exception as error:\n    print(error)\n"),
    "a name for all": tried(LOOP, "except:\n    pass\n"),
    "saved": tried(LOOP, "except Exception as error:\n" + indent(SAVE, "    ") + "    raise error\n"),
    "a batch that is skipped": skipping("except RuntimeError:\n    optimizer.zero_grad()\n"),
    "a branch that goes on": skipping("except RuntimeError as error:\n" + indent(MEMORY.format(goes="pass"), "    ")),
    "a jump before it raises": skipping(
        "except RuntimeError as error:\n    if 'memory' in str(error):\n        continue\n    raise\n"
    ),
    "one of many": skipping("except (torch.cuda.OutOfMemoryError, OSError):\n    continue\n"),
    "smaller batches": "while True:\n"
    + indent(tried(LOOP + "break\n", "except RuntimeError:\n    size //= 2\n"), "    "),
    "a function": "def train():\n" + indent(LOOP, "    ") + tried("train()\n", "except ValueError:\n    pass\n"),
    "a method": "class Trainer:\n    def fit(self):\n"
    + indent(LOOP, "        ")
    + tried("Trainer().fit()\n", "except Exception as error:\n    print(error)\n"),
}


@pytest.mark.parametrize("text", GOES_ON.values(), ids=GOES_ON.keys())
def test_a_rank_that_would_go_on_alone_raises(text: str) -> None:
    assert (
        converted(HEAD + text)
        .replace("        if", "    if")
        .replace("            raise", "        raise")
        .count(RAISE)
    )


LEAVES = {
    "an error that is raised": "except Exception as error:\n    print(error)\n    raise\n",
    "an exit": "except RuntimeError as error:\n    print(error)\n    sys.exit(1)\n",
    "either": "except RuntimeError as error:\n    if 'memory' in str(error):\n        sys.exit('memory')\n    raise\n",
    "in both branches": "except RuntimeError as error:\n" + indent(MEMORY.format(goes="sys.exit(2)"), "    "),
    "Ctrl-C": "except KeyboardInterrupt:\n    pass\n",
    "the end of the data": "except StopIteration:\n    pass\n",
    "what closes": "finally:\n    file.close()\n",
}


@pytest.mark.parametrize("handler", LEAVES.values(), ids=LEAVES.keys())
def test_what_raises_or_ends_stays(handler: str) -> None:
    result = convert_text(HEAD + tried(LOOP, handler))
    assert b"optim_manager.backward(loss)" in result.after and b"world_size" not in result.after
    assert not result.reported


def test_what_is_said_of_an_error_is_not_left_to_one_rank() -> None:
    text = "print('starts')\n" + tried(LOOP, "except Exception as error:\n    print('failed', error)\n    raise\n")
    after = converted(HEAD + text)
    assert "bmt.print_rank('starts')" in after and "    print('failed', error)" in after
    assert "bmt.print_rank('stopped')" in converted(
        HEAD + tried(LOOP, "except KeyboardInterrupt:\n    print('stopped')\n")
    )


SAVES = "except KeyboardInterrupt:\n" + indent(SAVE, "    ")
STOPPED = {
    "saved": tried(LOOP, SAVES),
    "saved behind": tried(LOOP, "except KeyboardInterrupt:\n    pass\n") + SAVE,
    "tested behind": tried(LOOP, "except KeyboardInterrupt:\n    pass\n") + "print(model(kept))\n",
    "saved at last": tried(LOOP, "except KeyboardInterrupt:\n    print('stopped')\nfinally:\n" + indent(SAVE, "    ")),
    "an end that saves": tried(
        LOOP, "except (KeyboardInterrupt, SystemExit):\n" + indent(SAVE, "    ") + "    raise\n"
    ),
    "an epoch": "for epoch in range(2):\n" + indent(tried(LOOP, SAVES + "    break\n"), "    "),
    "a function": "def fit():\n" + indent(LOOP, "    ") + "\n\n" + tried("fit()\n", SAVES),
    "a trainer": "class Trainer:\n    def fit(self):\n"
    + indent(tried(LOOP, SAVES), "        ")
    + "\n\nTrainer().fit()\n",
}


@pytest.mark.parametrize("text", STOPPED.values(), ids=STOPPED.keys())
def test_ranks_take_an_interruption_that_needs_them_after_the_same_step(text: str) -> None:
    result = convert_text(HEAD + text)
    after = result.after.decode()
    assert after.count("with bmt.interrupted_together():") == 1 and converted(after) == after
    assert not [finding for finding in result.reported if "Ctrl-C" in finding.message]
    first = text[: text.index("try:")].count("\n") + HEAD.count("\n") + 1
    assert any(found.line == first and "Ctrl-C" in found.message for found in result.applied)


def test_an_end_of_any_error_that_needs_all_ranks_is_said() -> None:
    result = convert_text(HEAD + tried(LOOP, "finally:\n" + indent(SAVE, "    ")))
    (said,) = [finding for finding in result.reported if "Ctrl-C" in finding.message]
    assert result.changed and "and line 17 needs all of them" in said.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"def keep():\n{indent(SAVE, '    ')}\n\natexit.register(keep)\n{LOOP}", 1),
        (f"atexit.register(lambda: torch.save(model.state_dict(), 'm.pt'))\n{LOOP}", 1),
        (f"def keep():\n    print('end')\n\n\natexit.register(keep)\n{LOOP}", 0),
    ],
)
def test_what_saves_at_exit_is_said(text: str, said: int) -> None:
    result = convert_text(f"import atexit\n{HEAD}{text}")
    assert result.changed and sum("at the end" in finding.message for finding in result.reported) == said


@pytest.mark.parametrize(
    "block", [LOOP, "for x in loader:\n    with contextlib.suppress(RuntimeError):\n" + indent(STEP, " " * 8)]
)
def test_errors_that_are_suppressed(block: str) -> None:
    if block is LOOP:
        block = "with contextlib.suppress(Exception):\n" + indent(LOOP, "    ")
    result = convert_text(HEAD + block)
    assert not result.changed and "a rank that passes over an error goes on alone" in result.reported[0].message
    interrupted = block.replace("RuntimeError", "KeyboardInterrupt").replace("Exception", "KeyboardInterrupt")
    assert convert_text(HEAD + interrupted).changed


# On two ranks, of which one meets an error ------------------------------------------------------------------------

FAILS = "if fails(x):\n    raise RuntimeError('a bad sample')\n"


def play(text: str) -> float:
    """A converted program whose last sample is a rank's that cannot take it; the sum of the weights."""
    import torch

    def fails(x: torch.Tensor) -> bool:
        return bool((x > 100).any())

    data = torch.arange(64.0, device="cpu").reshape(16, 4)
    if os.environ.get("BAD") == "1":
        data[7] = 1000.0  # of the second batch, and so of the second rank
    given: dict[str, Any] = {"data": data, "fails": fails, "__name__": "__main__"}
    exec(compile(text, "program.py", "exec"), given)
    return float(given["model"].state_dict()["weight"].sum())


@pytest.mark.parametrize(
    "handler", ["except RuntimeError:\n    optimizer.zero_grad()\n", "except Exception:\n    continue\n"]
)
def test_the_error_of_one_rank_ends_the_job(handler: str) -> None:
    text = converted(
        HEAD + skipping(handler).replace("loss = ", FAILS.replace("\n", "\n        ").rstrip(" ") + "        loss = ")
    )
    one, other = run_ranks(2, play, text, initialize=False, fresh=True, timeout=60)
    assert one == other
    with pytest.raises(RanksFailed, match="a bad sample"):
        run_ranks(2, play, text, initialize=False, fresh=True, timeout=60, env={"BAD": "1"})
    run_ranks(1, play, text, initialize=False, fresh=True, timeout=60, env={"BAD": "1"})  # as before on one
