"""Starts runs of a script, watches them, and notices when they stall."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewriter.verify.script.record import STACKS

GRACE = 8.0
"""Seconds that the other ranks get to end after one has failed."""
_LAUNCH = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "BMTRAIN_TP_SIZE",
    "BMTRAIN_METER",  # which would write a file that only the converted script has
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """What is run, and how much of it."""

    lines: tuple[tuple[str, ...], ...]
    """Scripts with their arguments, run one after the other in one folder: training, then going on."""
    steps: int | None = None
    timeout: float = 120.0
    still: bool = False


@dataclass
class Run:
    """What a run did."""

    root: Path
    events: list[list[dict[str, Any]]] = field(default_factory=list)
    """Those of each rank."""
    codes: list[int | None] = field(default_factory=list)
    """Exit codes; None for a rank that was ended."""
    stacks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """What each rank wrote to standard error."""
    stalled: bool = False
    origin: Callable[[str], str] = str
    """Of a line, the one that is named to the user."""

    @property
    def ranks(self) -> int:
        return len(self.events)

    @property
    def succeeded(self) -> bool:
        return not self.stalled and all(code == 0 for code in self.codes)

    def of(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        """A rank's events of one kind, in order."""
        return [event for event in self.events[rank] if event["kind"] == kind]

    def waiting(self, rank: int) -> str:
        """Where a rank was when it was ended, in words: ``waits in save at train.py:12``."""
        if self.codes[rank] is not None:
            return "has ended" if self.codes[rank] == 0 else f"ended with exit code {self.codes[rank]}"
        callee, base = "", f"{os.path.realpath(self.root)}{os.sep}"
        for path, line, name in _main_thread(self.stacks[rank]):
            if path.startswith(base):
                inside = f" in {callee}" if callee else ""
                return f"waits{inside} at {self.origin(f'{path.removeprefix(base)}:{line}')}"
            callee = name
        return "waits outside of the project"


def _main_thread(stacks: str) -> list[tuple[str, str, str]]:
    """Innermost call first: file, line, function. The main thread comes last in what faulthandler writes."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)
    return re.findall(r'File "(.+)", line (\d+) in (\S+)', threads[-1])


class Host:
    """Where runs are started from: a process that has loaded torch once."""

    def __init__(self) -> None:
        package = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), package]))
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCH}
        # One order of sets in every run; one thread, as torchrun has it, so that sums are made alike.
        environment |= {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rewriter.verify.script.host"], stdin=subprocess.PIPE, env=environment,
            start_new_session=True,  # Ctrl-C is for this process; that one ends with its standard input
        )  # fmt: skip

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(
        self, command: Command, root: Path, base: Path, ranks: int = 0, converted: bool = False, part: str = ""
    ) -> Run:
        """Run a command in ``root`` to its end, or for as long as it does something.

        Args:
            base: where what is recorded goes: files whose names begin so.
            ranks: as torchrun would start them; 0 is ``python`` alone.
            part: of the first batch, with which the run ends.
        """
        done = Run(root)
        for number, words in enumerate(command.lines):
            spec = {
                "root": str(root), "command": list(words), "steps": command.steps, "still": command.still, "part": part,
                "converted": converted, "world": ranks, "number": number,
            }  # fmt: skip
            self._run(spec, base.with_name(f"{base.name}.{number}"), command.timeout, done)
            if part or not done.succeeded:
                break
        return done

    def _run(self, spec: dict[str, Any], base: Path, timeout: float, done: Run) -> None:
        """One script on all its ranks; ``done`` gets what it did."""
        ranks = spec["world"]
        bases = [base.with_name(f"{base.name}.{rank}") for rank in range(ranks or 1)]
        port = _free_port()
        for rank, own in enumerate(bases):
            self._ask({**spec, "base": str(own), "environment": _launched(rank, ranks, port) if ranks else {}})
        try:
            done.stalled = self._watch(bases, timeout)
            done.codes = [_number(own, ".exit") for own in bases]
            events = [
                [json.loads(line) for line in _text(own, ".events").splitlines() if line[-1] == "}"] for own in bases
            ]
            done.events = [one + more for one, more in zip(done.events or [[] for _ in bases], events, strict=True)]
            done.errors = [_text(own, ".stderr") for own in bases]
            self._dump(bases, done)
        finally:
            self._end(bases)

    def _ask(self, spec: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(spec).encode() + b"\n")
        self._process.stdin.flush()

    def _watch(self, bases: Sequence[Path], timeout: float) -> bool:
        """Wait for the end; whether it did not come."""
        seen, since = -1, time.monotonic()
        while True:
            codes = [_number(own, ".exit") for own in bases]
            if all(code is not None for code in codes):
                return False
            sizes = sum(_size(own, kind) for own in bases for kind in (".events", ".stdout", ".stderr", ".exit"))
            if sizes != seen:
                seen, since = sizes, time.monotonic()
            failed = any(codes)
            if time.monotonic() - since > (min(GRACE, timeout) if failed else timeout):
                return not failed
            if self._process.poll() is not None:
                raise RuntimeError(f"the process that starts runs has ended with {self._process.returncode}")
            time.sleep(0.05)

    def _dump(self, bases: Sequence[Path], done: Run) -> None:
        """Where those are that did not end."""
        alive = [own for own, code in zip(bases, done.codes, strict=True) if code is None]
        for own in alive:
            pid = _number(own, ".pid")
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, STACKS)
        if alive:
            time.sleep(0.5)
        done.stacks = [_text(own, ".stacks") for own in bases]

    def _end(self, bases: Sequence[Path]) -> None:
        """Every rank, with whatever it has started."""
        for own in bases:
            pid = _number(own, ".pid")
            if pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and not all(own.with_name(own.name + ".exit").exists() for own in bases):
            time.sleep(0.02)


def _launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0", "ROLE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "prove",
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _text(base: Path, kind: str) -> str:
    path = base.with_name(base.name + kind)
    return path.read_text(errors="replace") if path.exists() else ""


def _number(base: Path, kind: str) -> int | None:
    text = _text(base, kind)
    return int(text) if text else None


def _size(base: Path, kind: str) -> int:
    path = base.with_name(base.name + kind)
    return path.stat().st_size if path.exists() else 0
