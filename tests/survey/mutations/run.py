"""Runs a script's commands in processes that have torch loaded already, as python or torchrun would start them."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.runtime.ranks import free_port

HANGS = 124
GRACE = 5.0  # how long the other ranks get once one has failed


def load() -> None:
    """What every script imports, once, before the first fork; no tensor is made, so no thread is started."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    import torch

    for name in (
        "torch._dynamo",
        "torch.distributed",
        "torch.optim.swa_utils",
        "bmtrain",
        "rewriter.cli",
        "rewriter.rules",
    ):
        importlib.import_module(name)
    torch.set_num_threads(1)


def run(command: Sequence[str], folder: Path, ranks: int = 0, seconds: float = 60.0) -> int:
    """The exit code: the first rank's that failed, HANGS if some did not end. Ranks 0 is no launcher at all.

    What a process prints is in the folder's ``../NAME-out-RANK`` and ``../NAME-err-RANK``, after what was there.
    """
    context = multiprocessing.get_context("fork")
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes: list[BaseProcess] = []
    for rank in range(max(1, ranks)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        launched = variables | ({name: str(value) for name, value in own.items()} if ranks else {})
        launched |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"} if ranks else {}
        process = context.Process(target=_start, args=(list(command), folder, rank, launched))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + seconds
    failed = 0
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        for process in processes:
            process.join(0.05)
            if process.exitcode and not failed:
                failed = process.exitcode
                deadline = min(deadline, time.monotonic() + GRACE)
    hang = any(process.is_alive() for process in processes)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    failed = failed or next((p.exitcode for p in processes if p.exitcode), 0)
    return HANGS if hang and failed in (0, -9) else failed


def output(folder: Path, stream: str) -> str:
    """What all ranks printed, rank 0's first."""
    return "".join(path.read_text() for path in sorted(folder.parent.glob(f"{folder.name}-{stream}-*")))


def _start(command: list[str], folder: Path, rank: int, variables: dict[str, str]) -> None:
    for stream, number in (("out", 1), ("err", 2)):
        target = os.open(folder.parent / f"{folder.name}-{stream}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, number)
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = list(command)
    try:
        if command[0] == "rewriter":
            from rewriter.cli import main

            sys.exit(main(command[1:]))
        sys.path[0:0] = [str(folder)]
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
