"""What an idiom is, and the table of all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RANKS = (1, 2, 3)
VERDICTS = ("right", "refused", "said", "silent", "raw", "hang")
"""
right    the same numbers as plain torch's on every rank
refused  one of bmtrain's errors on every rank, which says what to do, before weights change
said     other numbers, and a warning that says which and what to do
silent   other numbers, or NaN, and neither
raw      another error, or one on some ranks only
hang     some rank did not come to an end, or died
"""
FINE = VERDICTS[:3]

THEMES = (
    "gradients", "penalties", "averages", "optimizers", "schedules", "states", "outside", "initial", "structure",
    "hooks", "unused", "adapters", "losses", "comparisons", "precision", "loops", "randomness",
)  # fmt: skip


@dataclass(frozen=True)
class Idiom:
    """A short function of a ``User``; it returns what is compared: a dict, or a model for its weights."""

    theme: str
    name: str
    text: str
    run: Callable[[Any], Any]
    expected: tuple[str, ...]  # one for each of RANKS
    says: str  # what the error of a refused one names
    why: str  # of what is wrong and known
    tolerance: float


_found: dict[str, dict[str, Idiom]] = {}


def idiom(
    run: Callable[[Any], Any] | None = None,
    *,
    verdicts: str = "right",
    says: str = "",
    why: str = "",
    tolerance: float = 1e-4,
) -> Any:
    """Decorator that enters a function, whose docstring is its line in the table.

    Args:
        verdicts: what comes out at 1, 2 and 3 ranks; a single word stands for all.
        says: for refusals and warnings, what the message must hold.
        why: for defects that are known, what is wrong.
        tolerance: of a tensor's largest entry, on CPUs.
    """

    def enter(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        words = tuple(verdicts.split())
        expected = words * len(RANKS) if len(words) == 1 else words
        assert len(expected) == len(RANKS) and all(word in VERDICTS for word in expected), verdicts
        assert bool(why) == any(word not in FINE for word in expected), f"{function.__name__}: why?"
        assert bool(says) == bool({"refused", "said"} & set(expected)), (
            f"{function.__name__}: what does the message say?"
        )
        theme, text = function.__module__.rpartition(".")[2], " ".join((function.__doc__ or "").split())
        assert text, f"{function.__name__} has no docstring"
        table = _found.setdefault(theme, {})
        assert function.__name__ not in table, f"{theme}.{function.__name__} is there already"
        table[function.__name__] = Idiom(
            theme, function.__name__, text.removesuffix("."), function, expected, says, why, tolerance
        )
        return function

    return enter if run is None else enter(run)


def idioms(theme: str) -> dict[str, Idiom]:
    """All of one theme, by name, in the order of the file."""
    importlib.import_module(f"{__package__}.{theme}")
    return _found[theme]
