"""A process that has loaded torch and nothing else; every run is a fork of it, with its own environment and output.

A line of json on standard input starts one. Its process id and, at its end, its exit code come as files.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
from typing import Any

import torch._dynamo  # noqa: F401 - every optimizer's constructor loads it; here once for all runs

from rewriter.verify.script import record


def serve() -> int:
    """Start what is asked for until standard input ends."""
    gc.freeze()  # what is loaded stays shared with the forks
    running: dict[int, str] = {}
    pending = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.05)
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                for left in running:
                    os.killpg(left, signal.SIGKILL)
                return 0
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                spec = json.loads(line)
                pid = os.fork()
                if not pid:
                    return record.main(_prepared(spec))
                running[pid] = spec["base"]
                _write(spec["base"] + ".pid", pid)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid in running:
                _write(running.pop(pid) + ".exit", os.waitstatus_to_exitcode(status))


def _prepared(spec: dict[str, Any]) -> dict[str, Any]:
    """In the new process: its own group, environment and output."""
    os.setsid()
    for key, value in spec["environment"].items():
        os.environ[key] = value
    for number, kind in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(spec["base"] + kind, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return spec


def _write(path: str, number: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # whoever asked has gone, with the folder
        with open(path + ".new", "w") as file:
            file.write(str(number))
        os.replace(path + ".new", path)


if __name__ == "__main__":
    sys.exit(serve())
