"""Carries an attack out and judges what came of it."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from .attacks import DEATHS, Attack

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))  # the harness that runs several ranks
from ranks import free_port, gpu_variables

SCRIPT = Path(__file__).with_name("script.py")
ROOT = Path(__file__).parents[2]
SECONDS = 10.0  # from the fault to its report, and to the end of the job
START, PATIENCE = 150.0, 30.0  # until the fault, and from it to the end, for what has failed
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Finding:
    """What came of an attack."""

    problems: list[str] = field(default_factory=list)
    reported_after: float | None = None
    """Seconds."""
    ended_after: float | None = None
    exit_codes: list[int] = field(default_factory=list)
    output: str = ""

    @property
    def verdict(self) -> str:
        """One line."""
        return "; ".join(self.problems) or "right"


def judge(attack: Attack, forked: bool = False) -> Finding:
    """Run ``attack`` and hold it against what the table says.

    ``forked``: start ranks by hand in processes that have torch loaded already.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return _Run(attack, Path(folder), forked and not attack.torchrun).judge()


class _Process(Protocol):
    """What is needed of a process."""

    pid: int
    stdout: Iterable[bytes] | None
    returncode: int

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""

    def wait(self) -> int:
        """Its exit code."""


class _Forked:
    """A process of ``script``, of a server that has torch and bmtrain loaded."""

    def __init__(self, script: list[str], env: dict[str, str]) -> None:
        _start_server()
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_run_script, args=(theirs, script, env))
        self._process.start()
        theirs.close()
        self._pipe = ours
        self.stdout: Iterable[bytes] = os.fdopen(os.dup(ours.fileno()), "rb")
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return self.returncode

    @property
    def returncode(self) -> int:
        assert self._process.exitcode is not None
        return self._process.exitcode


@functools.cache
def _start_server() -> None:
    forkserver.set_forkserver_preload(["torch._dynamo", "bmtrain"])
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if given is not None:
            os.environ["PYTHONPATH"] = given


def _run_script(output: Connection, script: list[str], env: dict[str, str]) -> None:
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.environ.update(env)
    sys.argv[:] = script
    runpy.run_path(script[0], run_name="__main__")


class _Run:
    def __init__(self, attack: Attack, out: Path, forked: bool) -> None:
        self.attack, self.out, self.forked, self.mark = attack, out, forked, uuid.uuid4().hex
        self.found = Finding()
        self.lines: list[tuple[float, int, str]] = []  # when, which process, what
        self.fault: float | None = None

    def judge(self) -> Finding:
        processes = self._start()
        readers = [threading.Thread(target=self._read, args=given) for given in enumerate(processes)]
        for reader in readers:
            reader.start()
        begun = time.time()
        while any(process.poll() is None for process in processes) and time.time() < self._deadline(begun):
            time.sleep(0.05)
            self._watch_for_the_fault()
        ended = time.time()
        self._watch_for_the_fault()
        time.sleep(0.3)
        orphans = self._orphans(processes)
        while orphans and self.fault is not None and time.time() < self.fault + SECONDS:
            time.sleep(0.2)  # workers of a loader look after their parent every few seconds
            orphans = self._orphans(processes)
        late = [process for process in processes if process.poll() is None]
        for pid in {*orphans, *(process.pid for process in late)}:
            os.kill(pid, signal.SIGKILL)
        for process, reader in zip(processes, readers, strict=True):
            process.wait()
            reader.join()
        self.found.exit_codes = [process.returncode for process in processes]
        self.found.output = "\n".join(line for *_, line in self.lines)
        self._judge(ended, bool(late), bool(orphans))
        return self.found

    def _orphans(self, processes: list[_Process]) -> list[int]:
        return [pid for pid in _marked(self.mark) if pid not in {process.pid for process in processes}]

    def _deadline(self, begun: float) -> float:
        limit = float(self.attack.env.get("LIMIT", "0"))
        return begun + START if self.fault is None else self.fault + PATIENCE + limit

    def _start(self) -> list[_Process]:
        attack = self.attack
        port = free_port()
        clean = {key: value for key, value in os.environ.items() if key not in LAUNCH}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        common = {
            **clean, **attack.env, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FAULTS_MARK": self.mark,
            "BMTRAIN_DIARY_DIR": str(self.out / "diaries"),
        }  # fmt: skip
        script = [str(SCRIPT), attack.fault, attack.phase, str(attack.rank), str(self.out)]

        def popen(*command: str, **env: str) -> _Process:
            if self.forked:
                return _Forked(list(command), {**common, **env})
            return subprocess.Popen(
                [sys.executable, *command], env={**common, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

        if attack.torchrun:
            count = f"--nproc_per_node={attack.ranks}"
            return [popen("-m", "torch.distributed.run", count, f"--master_port={port}", *script)]
        place = {"WORLD_SIZE": str(attack.ranks), "LOCAL_WORLD_SIZE": str(attack.ranks), "MASTER_PORT": str(port)}
        place["MASTER_ADDR"] = "127.0.0.1"
        return [
            popen(*script, **{"RANK": str(rank), "LOCAL_RANK": str(rank), **place, **gpu_variables(rank, attack.ranks)})
            for rank in range(attack.ranks)
        ]

    def _read(self, number: int, process: _Process) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append((time.time(), number, line.decode(errors="replace").rstrip("\n")))

    def _watch_for_the_fault(self) -> None:
        if self.fault is None and (self.out / "fault").exists():
            told = json.loads((self.out / "fault").read_text())
            self.fault = told["time"]
            if self.attack.resumes_after:
                threading.Timer(self.attack.resumes_after, os.kill, (told["pid"], signal.SIGCONT)).start()

    # -- the verdict ------------------------------------------------------------------------------------------------

    def _judge(self, ended: float, late: bool, orphans: bool) -> None:
        attack, problems = self.attack, self.found.problems
        if self.fault is None:
            problems.append("the fault never happened")
            return
        self.found.ended_after = ended - self.fault
        if late:
            problems.append("never ended")
        elif orphans:
            problems.append("left a process behind")
        if attack.outcome != "ends":
            if any(self.found.exit_codes):
                problems.append(f"exit codes {self.found.exit_codes}")
            if attack.outcome == "unharmed":
                return
        else:
            self._judge_the_end(late)
        self._judge_the_report()

    def _judge_the_end(self, late: bool) -> None:
        assert self.found.ended_after is not None
        limit = float(self.attack.env.get("LIMIT", "0"))
        if not late and self.found.ended_after > SECONDS + limit:
            self.found.problems.append(f"ended after {self.found.ended_after:.1f} s")
        codes = self.found.exit_codes
        # Whoever leaves by sys.exit(0), or comes to its script's end, says itself that all is well.
        well = not self.attack.torchrun and (self.attack.fault == "leave" or self.attack.phase == "rest")
        survivors = _without(codes, self.attack.rank) if well else codes
        if not all(survivors):
            self.found.problems.append(f"exit codes {codes}")
        halves = [path.name for path in self.out.glob("*.pt") if not _is_whole(path)]
        if halves:
            self.found.problems.append(f"half written: {halves}")

    def _judge_the_report(self) -> None:
        """Every rank that could speak has named the one at fault, and where it and the others were."""
        attack, problems = self.attack, self.found.problems
        assert self.fault is not None
        dead = attack.fault in ("kill", "segfault", "exit", "raise", "leave", "stop") or attack.phase == "rest"
        speakers = [rank for rank in range(attack.ranks) if not (dead and rank == attack.rank)]
        said: dict[int, list[tuple[float, str]]] = {rank: [] for rank in speakers}
        for moment, process, line in self.lines:
            by = re.match(r"\[bmtrain\] rank (\d+):", line)
            rank = int(by[1]) if by else -1 if attack.torchrun else process
            if moment > self.fault and rank in said and (by or re.search(r"(Divergence|Communication)Error: ", line)):
                said[rank].append((moment, line))
        naming = re.compile(rf"[Rr]ank(s [-0-9, ]*| ){attack.rank}\b")
        moments = []
        for rank, lines in said.items():
            named = [moment for moment, line in lines if naming.search(line.replace(f"[bmtrain] rank {rank}:", ""))]
            if named:
                moments.append(min(named))
            elif attack.torchrun and self._agent_names():
                pass  # torchrun has ended this rank before it could speak, and names the cause itself
            else:
                problems.append(f"rank {rank} did not name rank {attack.rank}")
        text = "\n".join(line for lines in said.values() for _, line in lines)
        if not text and attack.fault in DEATHS and attack.torchrun and self._agent_names():
            return  # nobody lived long enough to say where
        place = r"(script\.py:\d+|the end of the script)"
        self.found.reported_after = max(moments) - self.fault if moments else None
        if moments and max(moments) - self.fault > SECONDS:
            problems.append(f"reported after {max(moments) - self.fault:.1f} s")
        if not re.search(
            rf"[Rr]ank {attack.rank} [^;]*{place}|"
            rf"Rank {attack.rank} has ended with .*script\.py",
            text,
        ):
            problems.append("no place of the rank at fault")
        if not any(re.search(rf"[Rr]ank(s [-0-9, ]*| ){rank}\b[^;]*{place}", text) for rank in speakers):
            problems.append("no place of the others")
        if not re.search(place, text):
            problems.append("no place")

    def _agent_names(self) -> bool:
        return bool(re.search(rf"rank\s*: {self.attack.rank} ", self.found.output))


def _without(codes: list[int], rank: int) -> list[int]:
    return [code for number, code in enumerate(codes) if number != rank]


def _is_whole(path: Path) -> bool:
    import torch

    try:
        torch.load(path, weights_only=False)
    except Exception as error:
        return isinstance(error, AttributeError | ModuleNotFoundError)  # a class of the script's
    return True


def _marked(mark: str) -> list[int]:
    """The processes that carry ``mark`` in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found
