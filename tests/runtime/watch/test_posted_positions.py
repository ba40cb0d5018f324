"""Where ranks are, in words, and in what they differ."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bmtrain.watch import Diary, Entry
from bmtrain.watch.position import Position, difference, everyone, ranks, what_of

ENTRY = Entry(7, "gather", "all_gather", 64, "GPT.h.7", "forward", "training", 2, 3, 0.5)


def position(rank: int = 0, **changes: Any) -> Position:
    given = {"count": 8, "entry": ENTRY, "waits": 0.0, "pair": "", "peer": 0, "saves": False}
    return Position(rank=rank, **({**given, "line": "train.py:88", "call": ""} | changes))


@pytest.mark.parametrize("field", ["phase", "kind", "time"])
def test_what_ranks_may_differ_in(field: str) -> None:
    assert difference(ENTRY, ENTRY._replace(**{field: 9.0 if field == "time" else "other"})) is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"group": "reduce"}, "different collectives"),
        ({"operation": "all_reduce"}, "different collectives"),
        ({"size": 65}, "different collectives"),
        ({"unit": "GPT.h.6"}, "different collectives"),
        ({"step": 3}, "one has made 2 optimizer steps, the other 3"),
        ({"batch": 1}, "one has taken 3 batches"),
    ],
)
def test_what_they_may_not_differ_in(change: dict[str, Any], said: str) -> None:
    found = difference(ENTRY, ENTRY._replace(**change))
    assert found is not None and said in found


@pytest.mark.parametrize(
    "numbers, said",
    [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([5, 0, 1], "ranks 0-1, 5"), ([1, 3, 5], "ranks 1, 3, 5")],
)
def test_ranks(numbers: list[int], said: str) -> None:
    assert ranks(numbers) == said


@pytest.mark.parametrize(
    "entry, said",
    [
        (ENTRY, "the forward of GPT.h.7"),
        (ENTRY._replace(kind="evaluation"), "the forward of GPT.h.7 in evaluation"),
        (ENTRY._replace(group="reduce", operation="reduce_scatter"), "the reduction of GPT.h.7"),
        (ENTRY._replace(group="order", unit="state_dict of GPT"), "state_dict of GPT (asking the others)"),
        (ENTRY._replace(group="world", operation="all_reduce", unit=""), "all_reduce of 64 bytes (world)"),
    ],
)
def test_what_a_collective_is_for(entry: Entry, said: str) -> None:
    assert what_of(entry) == said


def test_those_that_do_the_same_are_named_together() -> None:
    saving = ENTRY._replace(group="control", operation="broadcast", unit="")
    waiting = [position(rank, waits=6.0, entry=saving, line="train.py:121", call="bmt.save") for rank in (0, 1, 2)]
    said = everyone([*waiting, position(3, waits=0.1)])
    assert said == (
        "rank 3 is in the forward of GPT.h.7, called at train.py:88; ranks 0-2 wait in bmt.save, called at train.py:121"
    )


def test_one_that_computes_and_one_that_receives() -> None:
    assert position().doing() == "is at train.py:88 (the last collective: the forward of GPT.h.7)"
    assert position(pair="a receive from", peer=2, waits=3.0).doing() == "waits in a receive from rank 2 at train.py:88"
    assert position(line="", entry=None).doing() == "is in no code of the script"


def test_a_position_comes_through_as_it_was() -> None:
    diary = Diary(8)
    diary.enter("world", "all_reduce", 3)
    for one in (position(), position(entry=None), position(entry=diary.entry(0))):
        assert Position.of(json.loads(json.dumps(one.message()))) == one
