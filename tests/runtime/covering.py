"""Covering arrays: few rows in which every combination of values of any two (or three) factors occurs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def covering_rows(factors: Mapping[str, Sequence[Any]], strength: int = 2, seed: int = 0) -> list[Row]:
    """Rows that together hold every combination of values of any ``strength`` factors.

    Greedy: each row is begun with a combination that is still missing and filled up, one factor at a time, with the
    value that covers most of the others.  The same arguments give the same rows.
    """
    draw = random.Random(seed)
    names = list(factors)
    missing = {
        tuple(zip(chosen, values, strict=True))
        for chosen in combinations(names, strength)
        for values in product(*(factors[name] for name in chosen))
    }
    order = sorted(missing, key=repr)
    rows = []
    while missing:
        row: Row = dict(next(pairs for pairs in order if pairs in missing))
        free = [name for name in names if name not in row]
        draw.shuffle(free)
        for name in free:
            values = list(factors[name])
            draw.shuffle(values)
            row[name] = max(values, key=lambda value: _covered(missing, row, name, value, strength, names))
        missing -= {tuple((n, row[n]) for n in chosen) for chosen in combinations(names, strength)}
        rows.append({name: row[name] for name in names})
    return rows


def _covered(missing: set[Any], row: Row, name: str, value: Any, strength: int, names: list[str]) -> int:
    """How many missing combinations ``row`` holds with this value in addition."""
    known = {**row, name: value}
    others = [n for n in known if n != name]
    count = 0
    for chosen in combinations(others, strength - 1):
        ordered = sorted((*chosen, name), key=names.index)
        count += tuple((n, known[n]) for n in ordered) in missing
    return count
