# ruff: noqa: E501 - tables of code are easier to read on one line
"""Tests of what a model makes of a rank's share hold for the batch if they do on any rank, or on all."""

from __future__ import annotations

import os
from typing import Any

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted

HEAD = """import math
import numpy as np
import torch
from torch.utils.data import DataLoader


def bad(values):
    return torch.isnan(values).any() or torch.isinf(values).any()


torch.manual_seed(0)
net = torch.nn.Linear(4, 3)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=4)
for x, y in loader:
    out = net(x)
    loss = torch.nn.functional.cross_entropy(out, y)
"""
STEP = """    opt.zero_grad()
    loss.backward()
    opt.step()
"""
CASES = {
    "a part of the output": ("torch.isnan(out).any()", "bmt.total(torch.isnan(out).any())"),
    "one or the other": (
        "out.isnan().any() or out.isinf().any()",
        "bmt.total(out.isnan().any()) or bmt.total(out.isinf().any())",
    ),
    "not all of it": ("not torch.isfinite(out).all()", "bmt.total(not torch.isfinite(out).all())"),
    "all": ("(out.argmax(1) == y).all()", "not bmt.total(not (out.argmax(1) == y).all())"),
    "equal": ("torch.equal(out.argmax(1), y)", "not bmt.total(not torch.equal(out.argmax(1), y))"),
    "close": ("torch.allclose(out, y, atol=0.1)", "not bmt.total(not torch.allclose(out, y, atol=0.1))"),
    "numpy": ("np.isnan(out.detach().numpy()).any()", "bmt.total(np.isnan(out.detach().numpy()).any())"),
    "a function": ("bad(out)", "bmt.total(bad(out))"),
    "a function of the loss": ("bad(loss)", "bmt.total(bad(loss))"),
    "a bool": ("bool(out.isnan().any())", "bmt.total(bool(out.isnan().any()))"),
    "a model in it": ("(net(x) > 0).all()", "not bmt.total(not (net(x) > 0).all())"),
    "a loss compared": ("torch.equal(loss, loss * 0)", "not bmt.total(not torch.equal(loss, loss * 0))"),
}


@pytest.mark.parametrize(("test", "wanted"), CASES.values(), ids=CASES.keys())
def test_it_is_asked_of_all_ranks(test: str, wanted: str) -> None:
    result = convert_text(f"{HEAD}    if {test}:\n        continue\n{STEP}")
    assert f"    if {wanted}:\n" in result.after.decode() and not result.reported
    assert converted(result.after.decode())


NAMED = {
    "a name": ("ok = torch.isfinite(out).all()", "not ok", "bmt.total(not ok)"),
    "a number": ("ok = torch.isfinite(loss).all().item()", "not ok", "bmt.total(not ok)"),
    "a mean": ("hits = (out.argmax(1) == y).float().mean()", "hits > 0.9", "bmt.sum_loss(hits) > 0.9"),
    "a count": ("hits = (out.argmax(1) == y).sum()", "hits > 3", "bmt.total(hits) > 3"),
}


@pytest.mark.parametrize(("made", "test", "wanted"), NAMED.values(), ids=NAMED.keys())
def test_a_name_for_it(made: str, test: str, wanted: str) -> None:
    result = convert_text(f"{HEAD}    {made}\n    if {test}:\n        continue\n{STEP}")
    assert f"    if {wanted}:\n" in result.after.decode() and not result.reported


def test_what_the_last_batch_has_left() -> None:
    text = HEAD.replace("for x, y in loader:\n", "for epoch in range(3):\n  for x, y in loader:\n")
    text = text.replace("    out =", "      out =").replace("    loss =", "      loss =") + STEP.replace(
        "    ", "      "
    )
    assert "if bmt.total(torch.isnan(out).any()):" in converted(text + "  if torch.isnan(out).any():\n    break\n")
    anew = text + "  out = net(kept)\n  if torch.isnan(out).any():\n    break\n"
    assert "if bmt.agree(torch.isnan(out).any()):" in converted(anew)


@pytest.mark.parametrize("test", ["out.max() > 9", "loss.abs() > 9", "out.any(1)[0]"])
def test_what_is_left_to_rank_0_is_said(test: str) -> None:
    result = convert_text(f"{HEAD}    if {test}:\n        continue\n{STEP}")
    assert f"if bmt.agree({test}):" in result.after.decode()
    assert [found.message.partition(" is of")[0] for found in result.reported] == [test]


@pytest.mark.parametrize(
    "test", ["isinstance(out, tuple)", "out is None", "out.dim() == 2", "torch.isnan(loss).item()"]
)
def test_what_is_alike_is_not_reported(test: str) -> None:
    result = convert_text(f"{HEAD}    if {test}:\n        continue\n{STEP}")
    assert "total" not in result.after.decode() and not result.reported


# On two ranks, of which one has the odd sample --------------------------------------------------------------------


def play(text: str) -> tuple[float, int]:
    import torch

    rows = torch.randn(16, 4, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    rows[int(os.environ["ODD"])] = float("nan")
    data = [(row, 1) for row in rows]
    steps: list[int] = []
    given: dict[str, Any] = {"data": data, "steps": steps, "__name__": "__main__"}
    exec(compile(text, "program.py", "exec"), given)
    return float(given["net"].state_dict()["weight"].sum()), len(steps)


@pytest.mark.parametrize("odd", ["4", "7"], ids=["rank 0", "rank 1"])
def test_a_step_is_skipped_by_all(odd: str) -> None:
    text = f"{HEAD}    if torch.isnan(out).any() or not torch.isfinite(out).all():\n        continue\n{STEP}    steps.append(1)\n"
    env = {"ODD": odd}
    wanted = run_ranks(1, play, text, initialize=False, fresh=True, timeout=60, env=env)[0]
    one, other = run_ranks(2, play, converted(text), initialize=False, fresh=True, timeout=60, env=env)
    assert one == other == (pytest.approx(wanted[0], rel=1e-4), wanted[1]) and wanted[1] == 3
