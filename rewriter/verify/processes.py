"""Starts workers and talks to them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE = 5.0
"""Seconds that the other ranks get to answer after one has failed."""


@dataclass(frozen=True)
class Failure:
    """A phase that raised, died or did not end."""

    message: str
    detail: str = ""


Reply = dict[str, Any] | Failure


class Group:
    """The processes of one side. Started when first asked; ended and started anew after a failure."""

    def __init__(self, job: dict[str, Any], work: Path, timeout: float) -> None:
        self._job, self._work, self._timeout = job, work, timeout
        self._processes: list[subprocess.Popen[str]] = []
        self._count = 0

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
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self._processes = []

    def _start(self) -> None:
        self._count += 1
        ranks = self._job["ranks"]
        meeting = self._work / f"{self._job['side']}{ranks}.{self._count}"
        for rank in range(ranks):
            job = {**self._job, "rank": rank, "meeting": str(meeting)}
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            with open(f"{meeting}.{rank}.log", "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "rewriter.verify.worker", json.dumps(job)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, env=environment,
                )  # fmt: skip
            self._processes.append(process)

    def _ask(self, phase: str, options: dict[str, Any]) -> list[Reply]:
        import torch

        answers = self._exchange(phase, options)
        failed = [a for a in answers if "error" in a]
        if failed:
            logs = "".join(self._log(rank) for rank, a in enumerate(answers) if not a.get("traceback"))
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
        name = f"{self._job['side']}{self._job['ranks']}"
        answers: list[dict[str, Any]] = [{"error": f"no answer within {self._timeout:g} s"} for _ in self._processes]
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                assert process.stdin is not None and process.stdout is not None
                request = {"phase": phase, "options": options, "file": str(self._work / f"{name}.{rank}.pt")}
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
                with contextlib.suppress(OSError):  # it has died; its closed output says so below
                    process.stdin.write(json.dumps(request) + "\n")
            deadline = time.monotonic() + self._timeout
            while waiting.get_map() and time.monotonic() < deadline:
                for key, _ in waiting.select(max(0.0, deadline - time.monotonic())):
                    stream: Any = key.fileobj
                    waiting.unregister(stream)
                    line = stream.readline()
                    answers[key.data] = json.loads(line) if line else {"error": "the process ended"}
                    if "error" in answers[key.data]:
                        deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _log(self, rank: int) -> str:
        path = self._work / f"{self._job['side']}{self._job['ranks']}.{self._count}.{rank}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""
