"""Every idiom comes out as its line in the table says; what is wrong and known is counted there, not hidden.

At 2 ranks, with --long also at one; BMTRAIN_TEST_IDIOMS_RANKS=1,2,3 takes all, as `bash tests/idioms.sh` does.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .registry import RANKS, THEMES, idioms
from .table import render
from .verdicts import verdicts

CHOSEN = os.environ.get("BMTRAIN_TEST_IDIOMS_RANKS")
SECONDS = 300 if os.environ.get("BMTRAIN_TEST_DEVICE", "cpu") == "cpu" else 1200
"""For a theme; an idiom has a limit of its own. On GPUs all ranks together take memory for each model and give it back,
which takes long where many tests share them.
"""


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    "ranks", list(map(int, CHOSEN.split(","))) if CHOSEN else [pytest.param(1, marks=pytest.mark.long), 2]
)
@pytest.mark.parametrize("theme", THEMES)
def test_idioms(theme: str, ranks: int) -> None:
    only = os.environ.get("BMTRAIN_TEST_IDIOMS")
    found = verdicts(theme, ranks, only.split(",") if only else None)
    wrong = {
        name: (idioms(theme)[name].expected[RANKS.index(ranks)], verdict)
        for name, verdict in found.items()
        if verdict.word not in _allowed(idioms(theme)[name].expected[RANKS.index(ranks)])
    }
    report = [f"{n}: expected {e}, was {v.word}\n    {v.detail.strip()[-3000:]}" for n, (e, v) in wrong.items()]
    assert not wrong, f"{len(wrong)} of {len(found)} idioms\n" + "\n".join(report)


def _allowed(word: str) -> tuple[str, ...]:
    """The table is of CPUs; on GPUs, where layers draw from a generator of their own, some more is right."""
    return (word, "right") if word == "said" and os.environ.get("BMTRAIN_TEST_DEVICE") == "cuda" else (word,)


def test_there_are_two_hundred() -> None:
    assert sum(len(idioms(theme)) for theme in THEMES) >= 200


def test_the_table_in_the_docs_is_this_one() -> None:
    table = Path(__file__).parents[3] / "docs" / "idioms.md"
    expected = {theme: {name: it.expected for name, it in idioms(theme).items()} for theme in THEMES}
    assert table.read_text() == render(expected), "run `bash tests/idioms.sh`"
