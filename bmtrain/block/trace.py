"""The order in which units are used: observed, predicted from the last time, and the same on all ranks."""

from __future__ import annotations

import threading
import time
import zlib
from datetime import timedelta
from typing import Literal

from ..context import Context
from ..errors import CommunicationError, RankDivergenceError
from ..watch.place import place_of_thread
from ..watch.watchdog import VALUES

Phase = Literal["forward", "backward", "operation"]
Step = tuple[int, Phase]
"""A unit, and what it is used in: "operation" is one outside of any forward."""

Kind = tuple[Phase, int, bool]
"""Of a run: what begins it, with which unit, and whether under autograd."""

Event = Step | Kind | str | None
"""A use of a unit, the beginning of a run, or what concerns no unit."""


class Trace:
    """Records one run (an outermost forward and what follows it) and predicts from the last run of its kind.

    While every rank does what its last run predicts, nothing is exchanged: equal histories predict equally.  A rank
    that leaves the prediction asks the others, through the store, whether they did the same; if not, it raises
    instead of starting a gather that nobody joins.
    """

    def __init__(self, ctx: Context, patience: timedelta) -> None:
        self._ctx, self._patience = ctx, patience
        self._past: dict[Kind | None, tuple[list[Step], set[int]]] = {}
        self._kind: Kind | None = None
        self._run: list[Step] = []
        self._used: set[Step] = set()  # those of the run
        self._loose: set[int] = set()  # where in the run a unit was used again for which nothing was exchanged
        self._after: dict[Step, int] = {}  # which unit followed each step when it last occurred
        self._expected: list[Step] = []
        self._expected_loose: set[int] = set()
        self._position = 0
        self._count = 0
        self._asked = 0  # how often all ranks have agreed
        self._said: list[tuple[int, str]] = []  # at which of them this rank has said where it is, and under which key
        self._event: Event = None  # the last thing done, and what came after each when it was done before
        self._then: dict[Event, Event] = {}

    def begin(self, kind: Kind, what: str) -> None:
        """An outermost forward starts, or operations outside of any; ``kind`` says which earlier runs it resembles."""
        self._ctx.diary.kind = "training" if kind[2] else "evaluation"
        early = self._past_loose() < len(self._expected) and bool(self._run)
        if self._run:
            self._past[self._kind] = self._run, self._loose
        self._kind, self._run, self._used, self._loose, self._position = kind, [], set(), set(), 0
        self._expected, self._expected_loose = self._past.get(kind, ([], set()))
        self._count += 1
        if self._departs(kind) or early:
            self._agree(what)

    def meet(self, what: str) -> None:
        """Return once every rank has come to ``what``, some step outside of a run.

        Raises RankDivergenceError when another rank comes elsewhere.
        """
        self._count += 1
        # Until they first meet, ranks may be minutes apart: one of them has read the data that all will use.
        self._agree(what, self._ctx.timeout)

    def comes_to(self, what: str) -> None:
        """Every rank does ``what`` next, which concerns no unit: changes its parts of some values, or sums them up.

        Raises RankDivergenceError when another rank is found to do something else.  What follows as it did before is
        not asked for.
        """
        self._count += 1
        if self._departs(what):
            self._agree(what)

    def _departs(self, event: Event) -> bool:
        """Whether ``event`` is not what followed the last one before, and one of the two is outside of forwards.

        There one rank may do what all have done before: without asking, it would join the others' next collective.
        """
        before, self._event = self._event, event
        expected = self._then.get(before)
        self._then[before] = event
        return expected != event and (_is_outside(event) or _is_outside(expected))

    def has(self, index: int, phase: Phase) -> bool:
        """Whether unit ``index`` was used so in the present run, a forward or the backward of it."""
        return phase != "operation" and (index, phase) in self._used

    def opening(self, count: int = 2) -> list[int]:
        """The units that the next training run needs first, as far as known."""
        last = self._run or self._past.get(self._kind, ([], set()))[0]
        return list(dict.fromkeys(index for index, _ in last[:count]))

    def note(self, index: int, phase: Phase, name: str) -> int | None:
        """Unit ``index`` is used now.  Returns the unit to be gathered next, if that is known.

        ``name`` is the unit's, or says what is done with it outside of forwards.
        Raises RankDivergenceError when another rank needs a different one.
        """
        step = (index, phase)
        if self._run:
            self._after[self._run[-1]] = index
        self._run.append(step)
        self._used.add(step)
        self._count += 1
        at = self._past_loose(step)
        departs = self._departs(step)
        if departs or at >= len(self._expected) or self._expected[at] != step:
            self._agree(name if _is_outside(step) else f"the {phase} of {name or 'the root'}")
            try:
                at = self._expected.index(step, min(at, len(self._expected)))
            except ValueError:
                # Not in the last run: go by runs before, and follow the prediction again as soon as it fits.
                return self._after.get(step)
        return self._follow(at)

    def note_again(self, index: int, phase: Phase) -> int | None:
        """Unit ``index`` is used once more and is whole since the last time, so that nothing is exchanged for it.

        Another rank may do so another number of times: whose sequences are longer runs a decoder more often.
        """
        step = (index, phase)
        if self._run:
            self._after[self._run[-1]] = index
        self._loose.add(len(self._run))
        self._run.append(step)
        at = self._position
        fits = at < len(self._expected) and self._expected[at] == step and at in self._expected_loose
        return self._follow(at) if fits else None

    def _past_loose(self, step: Step | None = None) -> int:
        """The position in the last run, past uses that need not be there, as far as one of ``step``."""
        at = self._position
        while at in self._expected_loose and (step is None or self._expected[at] != step):
            at += 1
        return at

    def _follow(self, at: int) -> int | None:
        self._position = at + 1
        if self._position < len(self._expected):
            return self._expected[self._position][0]
        return None

    def _agree(self, what: str, patience: timedelta | None = None) -> None:
        if self._ctx.world_size == 1:
            return
        diary = self._ctx.diary
        diary.unit = what
        diary.enter("order", "agreement", 0)
        try:
            self._ask(what, patience or self._patience)
        except CommunicationError as error:
            raise error if self._ctx.watchdog is None else self._ctx.watchdog.explained(error) from error
        finally:
            diary.unit = ""
            diary.leave()

    def _ask(self, what: str, patience: timedelta) -> None:
        try:
            self._compare_all(what, patience)
        except (RankDivergenceError, CommunicationError):
            self._ctx.abort()  # ends the waiting of ranks that followed the prediction into what never comes
            raise
        except RuntimeError as error:  # of the store, which may have ended with the rank that has it
            raise CommunicationError(f"The ranks could not agree on {what}: {error}") from error

    def _compare_all(self, what: str, patience: timedelta) -> None:
        # Asked by all ranks at the same step or not at all; at another one, its number tells.  The last to come goes on
        # at once, and who waits says nothing more as long as the others are nearly there.
        store, key, said = self._ctx.store, f"order/{self._asked}", f"{self._count} {what}"
        done = f"{key}/done"
        if store.add(f"{key}/{zlib.crc32(said.encode())}", 1) == self._ctx.world_size:
            store.set(done, "1")
        else:
            self._wait_for(done, key, said, patience)
        self._asked += 1
        while self._said and self._said[0][0] < self._asked - 2:  # every rank is past the one before the last
            store.delete_key(self._said.pop(0)[1])

    def _wait_for(self, done: str, key: str, said: str, patience: timedelta) -> None:
        store, watchdog, own = self._ctx.store, self._ctx.watchdog, f"{key}/{self._ctx.rank}"
        deadline = time.monotonic() + patience.total_seconds()
        pause = 0.0
        while not store.check([done]):
            if watchdog is not None:
                watchdog.raise_verdict()
            if pause > 0.003:  # two questions a rank
                if not self._said or self._said[-1][1] != own:
                    store.set(own, f"{said}\n{place_of_thread(threading.get_ident()).line}")
                    self._said.append((self._asked, own))
                self._compare(key, said, patience if time.monotonic() > deadline else None)
            time.sleep(pause)
            pause = min(pause + 0.001, 0.5)

    def _compare(self, key: str, said: str, passed: timedelta | None) -> None:
        """Raise RankDivergenceError if a rank has not ``said`` the same, or nothing when the time has ``passed``."""
        store, here = self._ctx.store, self._ctx.rank
        for rank in range(self._ctx.world_size):
            other = store.get(f"{key}/{rank}").decode() if store.check([f"{key}/{rank}"]) else None
            if other is not None and other.split("\n")[0] != said:
                self._leave(_difference(here, store.get(f"{key}/{here}").decode(), rank, other))
            if other is None and passed is not None:
                own = _came_to(store.get(f"{key}/{here}").decode())
                self._leave(f"Rank {here} came to {own}, but rank {rank} did not within {passed}. {_ADVICE}")

    def _leave(self, message: str) -> None:
        if self._ctx.watchdog is not None:
            self._ctx.watchdog.tell(message)
        raise RankDivergenceError(message)


def _is_outside(event: Event) -> bool:
    if not isinstance(event, tuple):
        return event is not None
    return "operation" in event


_ADVICE = (
    "All ranks must build the same modules and run the same blocks in the same order: decide skips and early exits "
    "from a generator seeded alike on all ranks, or run the block and drop its result."
)


def _came_to(said: str) -> str:
    """In words, where a rank is that ``said`` so."""
    event, place = said.split("\n")
    what = event.split(" ", 1)[1]
    return f"{what}, called at {place}" if place else what


def _difference(here: int, said: str, rank: int, other: str) -> str:
    own, theirs = _came_to(said), _came_to(other)
    text = f"Rank {here} came to {own}, but rank {rank} came to {theirs}"
    if own == theirs:
        more = int(said.split(" ", 1)[0]) - int(other.split(" ", 1)[0])
        steps = f"{abs(more)} {'step' if abs(more) == 1 else 'steps'} {'fewer' if more > 0 else 'more'}"
        text += f" after {steps} (a step: one use of a block, or one thing that all ranks do together)"
    return f"{text}. {_ADVICE}{VALUES}"
