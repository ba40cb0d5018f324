"""A thread on every rank that tells the others where it is, and ends the job when it cannot go on."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import multiprocessing.util
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

from ..errors import BMTrainError, CommunicationError, RankDivergenceError
from .diary import Diary, Entry
from .mesh import Mesh, Message, Store
from .place import Place, RunningThreads, place_of_error, place_of_thread
from .position import Position, difference, everyone, ranks, what_of
from .timeouts import Timeouts

EXIT_CODE = 70
"""Of a process that the watchdog ends."""

_PULSE = 0.5  # seconds between two messages
_SLOW = 5.0  # seconds of waiting that are worth a word
_SILENT = 3.0  # seconds without a message
_AGAIN = 60.0  # seconds until the same is said again, at first
_SURE = 0.4  # seconds that a difference must last: a message may be older than what it is compared with
_FAILED = 0.03  # seconds in one collective after another process is gone: the last one of a job may just be returning
_CAUSE = 1.0  # seconds from a communicator's failure in which the rank that caused it may turn out to be gone
_QUIET = 1.0  # seconds that a job may go on in which somebody is missing whom nobody waits for
_ENDING = 1.0  # seconds in which others say, as this rank ends, how far they have come
_GRACE = 2.0  # seconds in which the thread that waits may raise an error itself
_PATIENCE = 3.0  # seconds for a failed collective's cause to become known
_END = "the end of the script"
_TOLD = 200  # entries of the diary that are written


@dataclass(frozen=True)
class Verdict:
    """Why the job cannot go on."""

    text: str
    diverged: bool


@dataclass
class _Peer:
    """Another rank, as far as known."""

    position: Position | None = None
    heard: float = 0.0
    gone: float = 0.0
    """When its connection ended."""
    has_left: bool = False
    error: str = ""
    """What it has left with."""


@dataclass(frozen=True)
class Hooks:
    """What the watchdog asks of the communicators."""

    abort: Callable[[], None]
    """Free whoever waits in one, as far as the transport can."""
    check: Callable[[], None]
    """Raise CommunicationError if one has failed since."""
    is_busy: Callable[[], bool]
    """Whether the device still works at what was queued."""


class Watchdog:
    """Compares this rank's diary with the others'.

    What one rank finds out all are told.  Then the thread that waits is freed where the transport can do so, and raises
    the verdict; where it cannot, the process ends with EXIT_CODE, after the stacks of all threads.
    """

    def __init__(self, mesh: Mesh, diary: Diary, timeouts: Timeouts, folder: str, hooks: Hooks) -> None:
        self._mesh, self._diary, self._hooks, self._timeouts = mesh, diary, hooks, timeouts
        self._folder = Path(folder or tempfile.gettempdir())
        self.rank = mesh.rank
        self._peers = {rank: _Peer() for rank in range(mesh.world_size) if rank != mesh.rank}
        self.verdict: Verdict | None = None
        self._known = threading.Event()
        self._delivered = self._asked = self._stops = False
        self._suspects: dict[int, tuple[float, Entry, Entry]] = {}
        self._moved = (0, monotonic())  # the diary's count, and when it came to that
        self._ticked = self._resumed = monotonic()
        self._said: dict[str, tuple[float, float]] = {}
        self._missed: set[int] = set()
        self._failure: tuple[float, str] | None = None  # of a communicator: since when, and what it says
        self._process = os.getpid()
        self._running, self._running_at = RunningThreads(), (0.0, "")  # when that was asked, and the answer
        self._aborting = threading.Thread(target=hooks.abort, name="bmtrain abort", daemon=True)
        self._thread = threading.Thread(target=self._run, name="bmtrain watchdog", daemon=True)

    # -- for the thread that runs the script ------------------------------------------------------------------------

    def explained(self, error: CommunicationError) -> BMTrainError:
        """What to raise for a collective that failed: says who is the cause, once that is known."""
        if self.verdict is None and error.__cause__ is None:  # refused before anything was sent
            return error
        self._asked = True
        self._mesh.wake()
        self._known.wait(_PATIENCE)
        self._asked = False
        return error if self.verdict is None else self._given(self.verdict)

    def raise_verdict(self) -> None:
        """Raise CommunicationError or RankDivergenceError if the job cannot go on."""
        if self.verdict is not None:
            raise self._given(self.verdict)

    def tell(self, text: str) -> None:
        """This rank leaves the others since they differ."""
        self._delivered = True
        if self.verdict is None:
            self.verdict = Verdict(text, diverged=True)
            self._mesh.send({"verdict": text, "diverged": True}, must=True)
            self._write(text)

    def _given(self, verdict: Verdict) -> BMTrainError:
        self._delivered = True
        return (RankDivergenceError if verdict.diverged else CommunicationError)(verdict.text)

    def leave(self, exits: bool = False) -> None:
        """Tell the others that this rank ends in good order; ``exits``: with its process.

        Raises the verdict if nobody has heard of it; when the process exits, its code becomes EXIT_CODE instead.
        """
        if self._stops or os.getpid() != self._process:
            return
        self._stops = True
        self._mesh.wake()
        self._thread.join(_PATIENCE)
        error = _uncaught()
        if self.verdict is None and error is None:
            self._ask_for_ends()
            self._compare_ends()
        said = {} if error is None else {"error": _in_words(error)}
        self._mesh.send({"left": self._position().message(), **said}, must=True)
        self._mesh.close()
        if self.verdict is not None and not self._delivered and error is None:
            if not exits:
                raise self._given(self.verdict)
            self._say(self.verdict.text)
            self._exit()
        if exits and self._aborting.is_alive():
            self._aborting.join(_PATIENCE)
            if self._aborting.is_alive():  # Python would end it inside of the transport, which ends in SIGABRT
                _exit_now()

    # -- the watchdog's own thread ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()
        if multiprocessing.parent_process() is None:
            atexit.register(self.leave, exits=True)
        else:  # such a process ends without the functions of atexit
            multiprocessing.util.Finalize(self, self.leave, kwargs={"exits": True}, exitpriority=1000)

    def _run(self) -> None:
        due = monotonic()
        while not self._stops:
            near = self._failure is not None or self._someone_is_missed()
            patience = 0.01 if near else max(0.0, due - monotonic())
            for rank, message in self._mesh.receive(patience):
                self._hear(rank, message)
                if message is not None and (not message or "ends" in message):
                    due = 0.0  # who has just come knows nothing of this rank; who ends must know all of it
            if self._stops:
                return
            if self.verdict is None:
                self._look_for_gone()
            if monotonic() >= due:
                due = monotonic() + _PULSE
                self._tick()
            if self.verdict is not None:
                self._end()
                return

    def _hear(self, rank: int, message: Message | None) -> None:
        peer = self._peers[rank]
        peer.heard = monotonic()
        if message is None:
            peer.gone = peer.heard
        elif not message:
            return
        elif "verdict" in message:
            if self.verdict is None:
                self.verdict = Verdict(message["verdict"], message["diverged"])
        elif "left" in message:
            peer.position, peer.has_left = Position.of(message["left"]), True
            peer.error = message.get("error", "")
        else:
            peer.position = Position.of(message.get("ends", message))
            self._compare(rank, peer.position)

    def _compare(self, rank: int, position: Position) -> None:
        theirs = position.entry
        mine = None if theirs is None else self._diary.entry(theirs.number)
        if mine is None or theirs is None:
            return
        if difference(mine, theirs) is None:
            self._suspects.pop(rank, None)
        else:
            self._suspects.setdefault(rank, (monotonic(), mine, theirs))

    def _tick(self) -> None:
        now = monotonic()
        if now - self._ticked > _SILENT:  # this process was stopped: it knows nothing of the others
            self._resumed = now
        self._ticked = now
        if self._moved[0] != self._diary.count:
            self._moved = self._diary.count, now
        own = self._position()
        self._mesh.send(own.message())
        if self.verdict is not None:
            return
        try:
            self._hooks.check()
        except CommunicationError as error:
            self._failure = self._failure or (now, str(error))
        sure = {rank: found for rank, found in self._suspects.items() if now - found[0] >= _SURE}
        if sure:
            self._conclude(self._differ(own, sure), diverged=True)
        elif self._failure is not None:
            since, said = self._failure
            if now - since >= _CAUSE:  # nobody is gone
                self._conclude(f"Rank {self.rank}'s communicator has failed: {said}. {self._everyone(own)}.")
        elif now - self._resumed > _SLOW:
            self._look_for_slow(own, now)

    def _position(self) -> Position:
        diary, now = self._diary, monotonic()
        entry = diary.entry(diary.count - 1)
        waits = 0.0
        if diary.is_inside:
            begun = diary.since if diary.pair or entry is None else entry.time
            waits = max(now - max(begun, self._resumed), 0.001)
        elif now - self._moved[1] > _SLOW and self._hooks.is_busy():
            waits = now - max(self._moved[1], self._resumed)
        stays = diary.is_inside and waits > _FAILED  # its frames, too, while they are looked at
        if not stays and now - self._running_at[0] >= 1:
            self._running_at = now, self._running.line_of(diary.thread)
        place = place_of_thread(diary.thread) if stays else Place(self._running_at[1], "")
        line = place.line or (_END if self._stops else "")
        return Position(
            self.rank, diary.count, entry, waits, diary.pair, diary.peer, diary.saves > 0, line, place.call
        )  # fmt: skip

    def _everyone(self, own: Position) -> str:
        return everyone([own, *(peer.position for peer in self._peers.values() if peer.position is not None)])

    # -- ranks that are gone ----------------------------------------------------------------------------------------

    def _someone_is_missed(self) -> bool:
        gone = {rank for rank, peer in self._peers.items() if self._has_died(peer) or self._has_failed(peer)}
        return not gone <= self._missed

    def _look_for_gone(self) -> None:
        for kind in (self._has_died, self._has_failed, self._has_left):
            found = {rank for rank, peer in self._peers.items() if kind(peer)}
            if not found:
                continue
            own = self._position()
            since = max(self._peers[rank].gone for rank in found)
            waits = self._asked or self._failure is not None
            waits = waits or (bool(own.waits) and min(own.waits, monotonic() - since) > _FAILED)
            if kind == self._has_left:
                # Whoever has left after the same collectives is not missed.
                if waits and (self._asked or any(self._is_behind(rank, own) for rank in found)):
                    self._conclude(self._lost(found, own))
                continue
            if waits:
                self._conclude(self._lost(found, own))
                return
            if monotonic() - since > _QUIET and not found <= self._missed:
                self._missed |= found
                self._say(self._lost(found, own))

    def _has_died(self, peer: _Peer) -> bool:
        return bool(peer.gone) and not peer.has_left

    def _has_failed(self, peer: _Peer) -> bool:
        return bool(peer.gone) and bool(peer.error)

    def _has_left(self, peer: _Peer) -> bool:
        return bool(peer.gone) and peer.has_left and not peer.error

    def _is_behind(self, rank: int, own: Position) -> bool:
        position = self._peers[rank].position
        if self._diary.pair:
            return rank == self._diary.peer
        return position is None or position.count < own.count

    def _lost(self, found: set[int], own: Position) -> str:
        parts = []
        for rank in sorted(found):
            peer = self._peers[rank]
            last = "" if peer.position is None else f" The last heard of it: rank {rank} {peer.position.doing()}."
            if peer.error:
                parts.append(f"Rank {rank} has ended with {peer.error}.{last}")
            elif peer.has_left:
                parts.append(f"Rank {rank} has ended, while the others go on.{last}")
            else:
                parts.append(f"Rank {rank}'s process is gone.{last}")
        here = [peer.position for rank, peer in self._peers.items() if rank not in found and peer.position is not None]
        others = everyone([own, *here])
        return f"{' '.join(parts)} {others[0].upper()}{others[1:]}."

    # -- ranks that differ ------------------------------------------------------------------------------------------

    def _differ(self, own: Position, found: dict[int, tuple[float, Entry, Entry]]) -> str:
        first = min(found, key=lambda rank: found[rank][1].number)
        _, mine, theirs = found[first]
        return self._difference(own, first, mine, theirs)

    def _difference(self, own: Position, rank: int, mine: Entry, theirs: Entry) -> str:
        said = difference(theirs, mine)
        what = f"rank {rank} to {what_of(theirs)}, rank {self.rank} to {what_of(mine)}"
        return (
            f"Rank {rank} differs from rank {self.rank}: at collective {theirs.number} of the job {said} "
            f"({what}). Now {self._everyone(own)}. {_ADVICE}{VALUES if 'order' in (mine.group, theirs.group) else ''}"
        )

    def _ask_for_ends(self) -> None:
        """Others' last collectives, which they may have done since they last said where they are."""
        own = self._position()
        self._mesh.send({"ends": own.message()})
        deadline, patience = monotonic() + _ENDING, 0.0
        while patience >= 0:
            for rank, message in self._mesh.receive(patience):
                self._hear(rank, message)
            peers = self._peers.items()
            waits = any(not peer.gone and not peer.has_left and self._is_behind(rank, own) for rank, peer in peers)
            patience = deadline - monotonic() if waits else -1.0

    def _compare_ends(self) -> None:
        """As this rank ends: what it can still find out."""
        own = self._position()
        for rank, peer in self._peers.items():
            theirs = None if peer.position is None else peer.position.entry
            if theirs is None or peer.position is None:
                continue
            mine = self._diary.entry(theirs.number)
            if mine is None:
                if peer.position.count > own.count and not peer.error:
                    self._conclude(
                        f"Rank {self.rank} has ended after {own.count} collectives, and rank {rank} has come to more: "
                        f"{what_of(theirs)}. {_ADVICE}",
                        diverged=True,
                    )
            elif difference(mine, theirs) is not None:
                self._conclude(self._difference(own, rank, mine, theirs), diverged=True)
            elif peer.has_left and peer.position.count != own.count and not peer.error:
                self._conclude(
                    f"Rank {rank} has ended after {peer.position.count} collectives, rank {self.rank} after "
                    f"{own.count}, the last being {what_of(mine)}. {_ADVICE}",
                    diverged=True,
                )
            if self.verdict is not None:
                return

    # -- ranks that are slow ----------------------------------------------------------------------------------------

    def _look_for_slow(self, own: Position, now: float) -> None:
        known = {rank: peer.position for rank, peer in self._peers.items() if peer.position is not None}
        waiting = [position for position in (own, *known.values()) if position.waits >= _SLOW]
        if not waiting:
            return
        ahead = max(position.count for position in waiting)
        behind = [rank for rank in self._peers if rank not in known or known[rank].count < ahead]
        silent = [rank for rank in known if now - self._peers[rank].heard > _SILENT and not self._peers[rank].has_left]
        text = f"Waiting for {max(position.waits for position in waiting):.0f} s: {self._everyone(own)}."
        if silent:
            text += (
                f" Nothing was heard of {ranks(silent)} for some seconds, though the process is there: it is stopped, "
                "or in a call that does not let Python run."
            )
        unseen = [rank for rank in self._peers if rank not in known]
        if unseen:
            text += f" {ranks(unseen)[0].upper()}{ranks(unseen)[1:]} has not joined the watchdogs."
        self._say_once(f"{sorted(silent)} {[(p.rank, p.line) for p in waiting]}", text, now)
        everywhere = {**known, self.rank: own}
        for position in waiting:
            other = everywhere.get(position.peer) if position.pair else None
            if other is not None and other in waiting and not other.pair and other.count > position.count:
                self._conclude(
                    f"Rank {position.rank} and rank {other.rank} wait for each other. {text} {_ADVICE}", True
                )
                return
        limit, name = self._limit(own, [known[rank] for rank in behind if rank in known])
        if own.waits > limit.total_seconds():
            self._conclude(f"The limit of {limit} for {name} has passed. {text}")

    def _limit(self, own: Position, behind: list[Position]) -> tuple[timedelta, str]:
        if own.saves or any(position.saves for position in behind):
            return self._timeouts.save, "a save"
        return (self._timeouts.step, "a step") if self._diary.step else (self._timeouts.start, "the start")

    def _say_once(self, key: str, text: str, now: float) -> None:
        due, pause = self._said.get(key, (0.0, _AGAIN))
        if now >= due:
            self._said[key] = now + pause, 2 * pause
            self._say(text)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _conclude(self, text: str, diverged: bool = False) -> None:
        if self.verdict is None:
            self.verdict = Verdict(text, diverged)

    def _end(self) -> None:
        """The job cannot go on: tell everybody, free the thread that waits, or else end the process."""
        assert self.verdict is not None
        if not self._delivered:
            self._mesh.send({"verdict": self.verdict.text, "diverged": self.verdict.diverged}, must=True)
            path = self._write(self.verdict.text)
            self._say(f"{self.verdict.text}{f' The last collectives of this rank: {path}' if path else ''}")
        self._known.set()
        self._aborting.start()  # it may take longer than the others wait
        deadline = monotonic() + _GRACE
        while not (self._delivered or self._stops):
            if monotonic() > deadline:
                self._exit()
            time.sleep(0.05)

    def _exit(self) -> None:
        """End the process without the help of the thread that waits."""
        assert self.verdict is not None
        self._mesh.send({"verdict": self.verdict.text, "diverged": self.verdict.diverged}, must=True)
        self._say("This process ends. Its threads:")
        faulthandler.dump_traceback(2)
        path = self._write(self.verdict.text, stacks=True)
        self._say(f"Exit code {EXIT_CODE}.{f' Diary: {path}' if path else ''}")
        _exit_now()

    def _say(self, text: str) -> None:
        # Past Python's own buffers, whose lock the thread that is stuck may hold.
        os.write(2, f"[bmtrain] rank {self.rank}: {text}\n".encode(errors="replace"))

    def _write(self, text: str, stacks: bool = False) -> Path | None:
        """The diary as a file that people read; None if it cannot be written."""
        path = self._folder / f"bmtrain-diary-rank{self.rank}-{self._process}.txt"
        begun, now = monotonic(), time.time()
        lines = [text, "", "number  time          kind        step  batch  collective"]
        for entry in self._diary.last(_TOLD):
            moment = now - (begun - entry.time)
            clock = time.strftime("%H:%M:%S", time.localtime(moment)) + f"{moment % 1:.3f}"[1:]
            said = f"{entry.operation} of {entry.size} bytes ({entry.group})"
            said += f", {what_of(entry)}" if entry.unit else ""
            lines.append(f"{entry.number:<7} {clock:<13} {entry.kind:<11} {entry.step:<5} {entry.batch:<6} {said}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".part")
            with temporary.open("w") as file:
                file.write("\n".join(lines) + "\n")
                if stacks:
                    file.write("\nthreads:\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
            temporary.replace(path)
        except OSError:
            return None
        return path


def _exit_now() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    os._exit(EXIT_CODE)


def _flush(stream: Any) -> None:
    """What is in Python's buffers; not for long, as another thread may hold their lock."""
    flushing = threading.Thread(target=lambda: stream and stream.flush(), daemon=True)
    flushing.start()
    flushing.join(0.2)


def _uncaught() -> BaseException | None:
    """The error with which this process ends, if it is one."""
    error: BaseException | None = sys.exc_info()[1] or getattr(sys, "last_value", None)
    if isinstance(error, SystemExit):  # as torch's spawn ends a process whose function raised
        error = error.__context__
    return error


def _in_words(error: BaseException) -> str:
    place: Place = place_of_error(error)
    text = f"{type(error).__name__}: {error}"
    return (text if len(text) < 500 else text[:500] + " ...") + (f" (at {place.line})" if place.line else "")


_ADVICE = (
    "All ranks must do the same in the same order: take the same batches, run the same blocks, step, evaluate and save "
    "together. Decide what differs by bmt.agree(...), or from a generator that is seeded alike on all ranks."
)
VALUES = (
    " What one rank prints of values that all have parts of, every rank computes: norm = p.grad.norm(), and then "
    "`if bmt.rank() == 0: print(norm)`."
)


def start(
    store: Store,
    rank: int,
    world_size: int,
    host: str | None,
    diary: Diary,
    timeouts: Timeouts,
    folder: str,
    hooks: Hooks,
    secret: str = "",
) -> Watchdog:
    """Connect the watchdogs of all ranks, which meet in ``store``.  Collective.

    ``host`` is where the ranks meet; diaries are written to ``folder``; only who knows ``secret`` may take part.
    """
    watchdog = Watchdog(Mesh(store, rank, world_size, host, secret), diary, timeouts, folder, hooks)
    watchdog.start()
    return watchdog
