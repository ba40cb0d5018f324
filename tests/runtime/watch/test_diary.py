"""The diary: a ring of what this rank did last."""

from __future__ import annotations

import threading

import pytest

from bmtrain.watch import Diary


def numbers(diary: Diary, count: int = 100) -> list[int]:
    return [entry.number for entry in diary.last(count)]


def test_nothing_is_in_a_new_one() -> None:
    diary = Diary(8)
    assert diary.entry(0) is None and diary.entry(-1) is None and diary.last(5) == []


def test_entries_keep_what_they_began_with() -> None:
    diary = Diary(8)
    diary.unit, diary.phase, diary.kind, diary.step, diary.batch = "h.0", "forward", "training", 3, 4
    diary.enter("gather", "all_gather", 128)
    assert diary.is_inside
    diary.leave()
    diary.unit, diary.phase, diary.kind, diary.step, diary.batch = "", "backward", "evaluation", 5, 6
    entry = diary.entry(0)
    assert not diary.is_inside and entry is not None
    assert entry[:9] == (0, "gather", "all_gather", 128, "h.0", "forward", "training", 3, 4)


@pytest.mark.parametrize("count", [7, 8, 9, 21])
def test_the_last_ones_stay(count: int) -> None:
    diary = Diary(8)
    for size in range(count):
        diary.enter("world", "all_reduce", size)
    assert numbers(diary) == list(range(max(0, count - 7), count))
    assert all(entry.size == entry.number for entry in diary.last(8))
    assert numbers(diary, 2) == [count - 2, count - 1]


def test_what_was_refused_is_not_counted() -> None:
    diary = Diary(8)
    diary.enter("world", "all_reduce", 1)
    diary.enter("world", "broadcast", 2)
    diary.refused()
    diary.enter("world", "barrier", 3)
    assert [(entry.number, entry.operation) for entry in diary.last(8)] == [(0, "all_reduce"), (1, "barrier")]


def test_a_send_has_no_number() -> None:
    diary = Diary(8)
    diary.enter_pair("a send to", 3)
    assert (diary.count, diary.is_inside, diary.pair, diary.peer) == (0, True, "a send to", 3)
    diary.leave()
    assert not diary.is_inside and not diary.pair


def test_batches_that_a_thread_fetches_ahead_do_not_count() -> None:
    diary = Diary(8)
    diary.takes_batch()
    ahead = threading.Thread(target=diary.takes_batch)
    ahead.start()
    ahead.join()
    assert diary.batch == 1


def test_a_save_is_known_until_it_ends_however_it_ends() -> None:
    diary = Diary(8)
    diary.kind = "evaluation"
    with pytest.raises(OSError), diary.saving():
        assert (diary.saves, diary.kind) == (1, "save")
        raise OSError
    assert (diary.saves, diary.kind) == (0, "evaluation")
