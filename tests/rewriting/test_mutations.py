"""The survey of composed scripts: a seed is a script, every script parses, and two are run on two ranks."""

from __future__ import annotations

import ast
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.survey.mutations import idioms
from tests.survey.mutations.scripts import compose

SAME = (101, 103)


def test_a_seed_is_a_script() -> None:
    assert compose(5).files == compose(5).files
    assert compose(5).files != compose(6).files


def test_every_script_parses() -> None:
    for seed in range(200):
        for text in compose(seed).files.values():
            ast.parse(text)
            assert "$" not in text, seed


def test_every_shape_is_drawn() -> None:
    assert {compose(seed).drawn["shape"] for seed in range(100)} == set(idioms.SHAPES)


@pytest.mark.parametrize("seed", SAME)
def test_a_script_is_the_same_on_two_ranks(seed: int, tmp_path: Path) -> None:
    from tests.survey.mutations import run
    from tests.survey.mutations.check import check

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=run.load) as pool:
        found = pool.submit(check, seed, 2, tmp_path).result()
    assert (found.word, found.differs) == ("same", [])
