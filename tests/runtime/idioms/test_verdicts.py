"""The verdicts tell apart what they are to tell apart."""

from __future__ import annotations

from .table import render
from .verdicts import verdicts

EXPECTED = {
    "right": "right",
    "other_numbers": "silent",
    "other_numbers_with_a_warning": "said",
    "not_a_number": "silent",
    "other_names": "silent",
    "raises": "raw",
    "raises_as_torch_does": "right",
    "raises_on_one_rank": "raw",
    "refuses": "refused",
    "refuses_without_a_way_out": "raw",
    "refuses_too_late": "raw",
    "dies": "hang",
    "right_after_all": "right",
}


def test_each_verdict() -> None:
    found = verdicts("samples", 2, list(EXPECTED), again=False)
    assert {name: verdict.word for name, verdict in found.items()} == EXPECTED, found
    assert "head.bias was changed" in found["refuses_too_late"].detail
    assert "rank 1: number differs by 1.00e-02" in found["other_numbers"].detail


def test_a_rank_that_waits_for_ever() -> None:
    found = verdicts("samples", 2, ["waits_for_ever", "right_after_all"], again=False, limit=10.0)
    assert [found[name].word for name in ("waits_for_ever", "right_after_all")] == ["hang", "right"], found


def test_the_table_counts_every_verdict() -> None:
    words = ("right", "silent", "hang")
    page = render({"samples": {"right": words, "refuses": ("refused", "refused", "raw")}})
    assert "| 1 | 1 | 1 | 0 | 0 | 0 | 0 |\n| 2 | 0 | 1 | 0 | 1 | 0 | 0 |\n| 3 | 0 | 0 | 0 | 0 | 1 | 1 |\n" in page
    assert "| `refuses` | One of ours on all ranks (names `something else`) | refused | refused | raw |" in page
