"""Where a rank is, in words, and what tells two ranks apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .diary import Entry


@dataclass(frozen=True)
class Position:
    """What a rank says of itself every half second."""

    rank: int
    count: int
    """Collectives begun so far."""
    entry: Entry | None
    """The last of them."""
    waits: float
    """Seconds since it is in a call that waits for other ranks; 0 if it is in none."""
    pair: str
    """The send or receive in which it waits, if it is one; ``peer`` is the other rank."""
    peer: int
    saves: bool
    line: str
    """Of user code."""
    call: str
    """What that line has called of ours."""

    def message(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "entry": self.entry}

    @classmethod
    def of(cls, message: dict[str, Any]) -> Position:
        """From ``message()`` of another rank."""
        entry = message["entry"]
        return cls(**{**message, "entry": None if entry is None else Entry(*entry)})

    def doing(self, many: bool = False) -> str:
        """As in "waits in bmt.save, called at train.py:121"; of ``many`` ranks, "wait in"."""
        at = f" at {self.line}" if self.line else ""
        be, verb = ("are", "wait") if many else ("is", "waits")
        verb = verb if self.waits >= 1 else be
        if self.pair:
            return f"{verb} in {self.pair} rank {self.peer}{at}"
        if self.waits:
            return f"{verb} in {self.what()}{', called' if at else ''}{at}"
        after = f" (the last collective: {self.what()})" if self.entry is not None else ""
        return f"{be}{at or ' in no code of the script'}{after}"

    def what(self) -> str:
        """What its last collective is for."""
        if self.entry is None:
            return "nothing"
        said = what_of(self.entry)
        if not self.call or not self.waits or self.call in said:
            return said
        return f"{self.call} ({said})" if self.entry.unit else self.call


def what_of(entry: Entry) -> str:
    """What a collective is for, as far as the diary tells."""
    during = f" in {entry.kind}" if entry.kind in ("evaluation", "save") else ""
    if not entry.unit:
        return f"{entry.operation} of {entry.size} bytes ({entry.group}){during}"
    if entry.group == "order":
        return f"{entry.unit} (asking the others)"
    if entry.group.startswith("reduce"):
        return f"the reduction of {entry.unit}"
    return f"the {entry.phase} of {entry.unit}{during}" if entry.phase else f"{entry.operation} of {entry.unit}"


def difference(one: Entry, other: Entry) -> str | None:
    """In what two ranks' entries of one number differ; None if in nothing that all ranks must have alike."""
    if one[1:5] != other[1:5]:
        return "they came to different collectives"
    if one.step != other.step:
        return f"one has made {_count(one.step, 'optimizer step')}, the other {other.step}"
    if one.batch != other.batch:
        taken = _count(one.batch, "batch", "batches")
        return f"one has taken {taken} from bmt.shard_loader or bmt.shard_batch, the other {other.batch}"
    return None


def everyone(positions: Iterable[Position]) -> str:
    """Where all of them are, as in "rank 3 is at train.py:88; ranks 0-2 wait in bmt.save, called at train.py:121"."""
    together: dict[str, list[Position]] = {}
    for position in positions:
        together.setdefault(position.doing(), []).append(position)
    by_size = sorted(together.values(), key=lambda group: (len(group), group[0].rank))
    return "; ".join(f"{ranks(p.rank for p in group)} {group[0].doing(len(group) > 1)}" for group in by_size)


def ranks(numbers: Iterable[int]) -> str:
    """As in "rank 3" or "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    names = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {names}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
