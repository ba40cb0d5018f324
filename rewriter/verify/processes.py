"""Starts workers and talks to them."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rewriter.verify.worker import serve

GRACE = 5.0
"""Seconds that the other ranks get to answer after one has failed."""
LOADED = ("torch", "torch.distributed", "rewriter.verify.phases")
"""Imported once and for all; every worker is a fresh fork of a process that knows nothing but these."""


@dataclass(frozen=True)
class Failure:
    """A phase that raised, died or did not end."""

    message: str
    detail: str = ""


Reply = dict[str, Any] | Failure


def preload(modules: Sequence[str]) -> None:
    """Load more than ``LOADED`` once and for all; before the first Group."""
    _State.loaded = True
    multiprocessing.get_context("forkserver").set_forkserver_preload([*LOADED, *modules])


class Group:
    """The processes of one side. Started when first asked; ended and started anew after a failure."""

    def __init__(self, job: dict[str, Any], work: Path, timeout: float) -> None:
        self._job, self._work, self._timeout = job, work, timeout
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._count = 0
        self._name = f"{job['side']}{job['ranks']}"

    def ask(self, phase: str, **options: Any) -> list[Reply]:
        """What every rank recorded. One failure is every rank's."""
        if not self._processes:
            self._start()
            if phase != "build":
                built = self._ask("build", {})
                if any(isinstance(reply, Failure) for reply in built):
                    return built
        return self._ask(phase, options)

    def close(self) -> None:
        """End every process."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        self._count += 1
        ranks = self._job["ranks"]
        method = multiprocessing.get_context("forkserver")
        if not _State.loaded:
            preload(())
        with _without_interrupts():
            forkserver.ensure_running()
        for rank in range(ranks):
            job = {**self._job, "rank": rank, "meeting": str(self._work / f"{self._name}.{self._count}")}
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            }  # fmt: skip
            ours, theirs = method.Pipe()
            process = method.Process(target=serve, args=(theirs, job, environment, str(self._log(rank))), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _ask(self, phase: str, options: dict[str, Any]) -> list[Reply]:
        import torch

        answers = self._exchange(phase, options)
        failed = [a for a in answers if "error" in a]
        if failed:
            logs = "".join(self._logged(rank) for rank, a in enumerate(answers) if not a.get("traceback"))
            self.close()
            # What one rank raised tells more than that the others waited for it.
            told = [a for a in failed if a.get("traceback")] or failed
            failure = Failure(told[0]["error"], told[0].get("traceback", "") or logs)
            return [failure] * len(answers)
        records: list[Reply] = []
        for answer in answers:
            records.append(torch.load(answer["file"], weights_only=False))
            Path(answer["file"]).unlink()
        return records

    def _exchange(self, phase: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{"error": f"no answer within {self._timeout:g} s"} for _ in self._processes]
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        for pipe, rank in waiting.items():
            with contextlib.suppress(OSError):  # it has died; its closed pipe says so below
                pipe.send({"phase": phase, "options": options, "file": str(self._work / f"{self._name}.{rank}.pt")})
        deadline = time.monotonic() + self._timeout
        while waiting and time.monotonic() < deadline:
            for ready in wait(list(waiting), max(0.0, deadline - time.monotonic())):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                try:
                    answers[rank] = ready.recv()
                except (EOFError, OSError):
                    answers[rank] = {"error": "the process ended"}
                if "error" in answers[rank]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _log(self, rank: int) -> Path:
        return self._work / f"{self._name}.{self._count}.{rank}.log"

    def _logged(self, rank: int) -> str:
        path = self._log(rank)
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started inside ignores Ctrl-C, which is for this process alone: it ends the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _State:
    loaded = False
