"""``bmt.agree``: rank 0's answer is everybody's; ``bmt.rank_0_first``: rank 0 is through before others begin."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from ranks import on_ranks, run_ranks

import bmtrain as bmt


def answer() -> list[bool]:
    return [bmt.agree("yes"), bmt.agree([]), bmt.agree(torch.tensor(2.0))]


def test_before_the_ranks_are_there_an_answer_is_ones_own() -> None:
    assert run_ranks(2, answer, initialize=False, fresh=True) == [[True, False, True]] * 2


@on_ranks(1, 2)
def test_rank_0_decides() -> None:
    mine = bmt.rank() == 0
    assert bmt.agree(mine) is True and bmt.agree(not mine) is False
    assert bmt.agree(torch.tensor(float(mine)) > 0.5) is True
    assert bmt.agree("" if mine else "a path") is False
    assert bmt.agree(None if mine else 1) is False


def in_turn(folder: str) -> list[str]:
    place = Path(folder) / "cache"
    with bmt.rank_0_first():
        if not place.exists():
            time.sleep(0.2)
            place.touch(exist_ok=False)
            return ["made"]
    return ["found"]


def test_rank_0_first(tmp_path: Path) -> None:
    with bmt.rank_0_first():
        pass  # before the ranks are there
    assert run_ranks(3, in_turn, str(tmp_path)) == [["made"], ["found"], ["found"]]
