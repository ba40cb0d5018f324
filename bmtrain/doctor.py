"""``bmt-doctor``, also ``python -m bmtrain doctor``: what this machine has for training, and what stands in the way."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import __version__, kernels
from .comm import nccl_library
from .device import processors, visible_gpus
from .errors import CommunicationError
from .log import interruptible

_GIB = 1 << 30
_WAIT = 90  # seconds that the all-gather may take, with starting its processes
_SLOW_LINKS = {"SYS", "NODE", "PHB"}  # through the host, as nvidia-smi topo names it
_HARMFUL = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before: unset it, except for finding an error",
    "NCCL_P2P_DISABLE": "GPUs talk through the host: unset it",
    "NCCL_SHM_DISABLE": "processes of one machine talk through the network: unset it",
    "NCCL_IB_DISABLE": "nodes talk through TCP: unset it where there is InfiniBand",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL checks every collective and is slow: unset it, except for finding an error",
}
_PORTS = {"MASTER_PORT": 10010, "torchrun": 29500}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``advice`` says what to do; empty where nothing need be done."""

    topic: str
    state: Literal["ok", "note", "bad"]
    """``note``: training works, maybe slower than it could; ``bad``: it will not work."""
    text: str
    advice: str = ""


def parser(**options: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        description="What this machine has for training with bmtrain, and what stands in the way.",
        **{"prog": "bmt-doctor", **options},
    )
    made.add_argument("--json", action="store_true", help="print json")
    made.add_argument("--no-bandwidth", action="store_true", help="start no processes to time an all-gather")
    return made


@interruptible("bmt-doctor")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command.  0: training works here; 1: something is in the way."""
    given = parser().parse_args(arguments)
    found = []
    for finding in examine(bandwidth=not given.no_bandwidth):
        found.append(finding)
        if not given.json:
            print("\n".join(_lines(finding)), flush=True)
    bad = [finding for finding in found if finding.state == "bad"]
    if given.json:
        print(json.dumps({"version": __version__, "ok": not bad, "findings": list(map(asdict, found))}, indent=1))
    else:
        notes = sum(finding.state == "note" for finding in found)
        print(f"{len(bad)} in the way, {notes} to note" if bad or notes else "all is well")
    return 1 if bad else 0


def _lines(finding: Finding) -> Iterator[str]:
    yield f"{finding.state:5} {finding.topic:11} {finding.text}"
    if finding.advice:
        yield f"{'':17} -> {finding.advice}"


def examine(bandwidth: bool = True) -> Iterator[Finding]:
    """All findings, in order; ``bandwidth`` starts two or more processes for some seconds."""
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.platform()}, {processors()} CPUs")
    for look in (_torch, _gpus, _links, _nccl, _compiled, _rendezvous, _ports, _shared_memory, _limits, _environment):
        yield from look()
    if bandwidth:
        yield from _bandwidth()


def _torch() -> Iterator[Finding]:
    built, driver = torch.version.cuda, _driver()
    text = f"{torch.__version__}, " + (f"built for CUDA {built}" if built else "built for the CPU")
    if driver and not built:
        yield Finding(
            "torch", "bad", text, "there is a GPU: install a torch that is built for CUDA (pytorch.org says how)"
        )
    else:
        yield Finding("torch", "ok", text)
    if driver and built and not torch.cuda.is_available():
        yield Finding(
            "driver", "bad", driver, "torch cannot use it: update the driver, or take a torch for an older CUDA"
        )
    elif driver:
        yield Finding("driver", "ok", driver)
    else:
        yield Finding(
            "driver", "note", "no NVIDIA driver", "bmtrain trains on the CPU here, which is for trying things"
        )


def _driver() -> str:
    """The NVIDIA driver's version; empty where there is none."""
    path = Path("/proc/driver/nvidia/version")
    text = (
        path.read_text()
        if path.exists()
        else _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    )
    found = re.search(r"\d{3}\.\d+(?:\.\d+)?", text)
    return found[0] if found else ""


def _output(*command: str) -> str:
    """What a command prints; empty where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _gpus() -> Iterator[Finding]:
    gpus = visible_gpus()
    if not gpus and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("GPUs", "note", "CUDA_VISIBLE_DEVICES is empty and hides all", "unset it to train on GPUs")
    for index, gpu in enumerate(gpus):
        text = f"{index}: {gpu.name}, {gpu.free / _GIB:.1f} of {gpu.total / _GIB:.1f} GiB free"
        if gpu.capability < (8, 0):
            yield Finding("GPU", "note", text, "it computes bf16 slowly, if at all: use fp16 with a loss scale")
        elif gpu.free < 0.9 * gpu.total:
            yield Finding(
                "GPU", "note", text, "another process uses it: see nvidia-smi, or choose CUDA_VISIBLE_DEVICES"
            )
        else:
            yield Finding("GPU", "ok", text)
    if len({gpu.name for gpu in gpus}) > 1:
        yield Finding(
            "GPUs", "note", "of several kinds", "ranks have equal shares, so the slowest and smallest decides"
        )


def _links() -> Iterator[Finding]:
    if len(visible_gpus()) > 1 and (links := links_of(_output("nvidia-smi", "topo", "-m"))):
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(links.items()))
        slow = _SLOW_LINKS & links.keys()
        advice = "some GPUs talk through the host's memory: gathers are slow between them" if slow else ""
        yield Finding("links", "note" if slow else "ok", text, advice)


def links_of(table: str) -> dict[str, int]:
    """How many pairs of GPUs each kind of link joins, from what ``nvidia-smi topo -m`` prints."""
    found: dict[str, int] = {}
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", table).splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    for number, row in enumerate(rows):
        for kind in row[number + 2 : len(rows) + 1]:
            found[kind] = found.get(kind, 0) + 1
    return found


def _nccl() -> Iterator[Finding]:
    if not nccl_library.built:
        return  # what is compiled is looked at next
    try:
        number = nccl_library.version()
        yield Finding("NCCL", "ok", f"{number // 10000}.{number // 100 % 100}.{number % 100}")
    except CommunicationError as error:
        several = len(visible_gpus()) > 1
        text = str(error).splitlines()[0]
        yield Finding(
            "NCCL", "bad" if several else "note", text, "it comes with torch for CUDA: install that" * several
        )


def _compiled() -> Iterator[Finding]:
    gpus = len(visible_gpus())
    again = "BMTRAIN_EXTENSION=1 pip install --force-reinstall --no-deps ."
    if not nccl_library.built:
        why = _why_not_built()
        advice = f"several GPUs need it for NCCL; with a C++ compiler at hand: {again}" if gpus > 1 else ""
        yield Finding("compiled", "bad" if gpus > 1 else "note" if gpus else "ok", f"not used: {why}", advice)
    elif kernels.compiled():
        yield Finding("compiled", "ok", "NCCL bindings and CUDA kernels, both used" if gpus else "all; no GPU uses it")
    else:
        advice = f"the optimizer takes torch's operations, in more passes; with nvcc on PATH: {again}" if gpus else ""
        yield Finding("compiled", "note" if gpus else "ok", "NCCL bindings, without CUDA kernels", advice)


def _why_not_built() -> str:
    try:
        importlib.import_module("bmtrain._C")
    except ModuleNotFoundError:
        return "bmtrain was installed where no NVIDIA driver was, or with BMTRAIN_EXTENSION=0"
    except ImportError as error:
        return f"it is there and cannot be loaded: {error}"
    return "it can be loaded now"


def _rendezvous() -> Iterator[Finding]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if os.environ.get(name)]
    missing = [name for name in names if name not in given]
    if given and missing:
        advice = f"start with torchrun, or set {', '.join(missing)}, too; or unset all for one process"
        yield Finding("launch", "note", f"{', '.join(given)} set, {', '.join(missing)} not", advice)
    name = os.environ.get("MASTER_ADDR") or socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
        yield Finding("host", "ok", f"{name} is {address}")
    except OSError as error:
        advice = (
            "ranks that meet by this name will wait in vain: add it to /etc/hosts, or set MASTER_ADDR to an address"
        )
        yield Finding("host", "note", f"{name} has no address: {error}", advice)


def _ports() -> Iterator[Finding]:
    wanted = {
        **_PORTS,
        **({"MASTER_PORT": int(given)} if (given := os.environ.get("MASTER_PORT", "")).isdecimal() else {}),
    }
    for name, port in wanted.items():
        if _is_taken(port):
            advice = "a job may run already; choose another: MASTER_PORT, or torchrun --rdzv-endpoint=HOST:PORT"
            yield Finding("port", "note", f"{port} ({name}) is taken", advice)
        else:
            yield Finding("port", "ok", f"{port} ({name}) is free")


def _is_taken(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except (OSError, OverflowError):
            return True
        return False


def _shared_memory() -> Iterator[Finding]:
    if not os.path.isdir("/dev/shm"):
        yield Finding("/dev/shm", "note", "is not there", "loaders with workers and NCCL need it: mount it")
        return
    usage = shutil.disk_usage("/dev/shm")
    text = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.free < _GIB:
        advice = "loaders with workers and NCCL use it: docker run --shm-size=8g, or --ipc=host"
        yield Finding("/dev/shm", "note", text, advice)
    else:
        yield Finding("/dev/shm", "ok", text)


def _limits() -> Iterator[Finding]:
    for what, kind, least, option in (
        ("open files", resource.RLIMIT_NOFILE, 4096, "-n 65536"),
        ("processes", resource.RLIMIT_NPROC, 4096, "-u 65536"),
    ):
        limit = resource.getrlimit(kind)[0]
        enough = limit == resource.RLIM_INFINITY or limit >= least
        text = f"{what}: {'no limit' if limit == resource.RLIM_INFINITY else limit}"
        yield Finding(
            "limit", "ok" if enough else "note", text, "" if enough else f"many ranks need more: ulimit {option}"
        )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        advice = "InfiniBand registers memory: ulimit -l unlimited, or docker run --ulimit memlock=-1"
        yield Finding("limit", "note", f"locked memory: {locked >> 20} MiB", advice)


def _environment() -> Iterator[Finding]:
    for name, advice in _HARMFUL.items():
        if os.environ.get(name, "0") not in ("", "0", "OFF", "INFO"):
            yield Finding("environment", "note", f"{name}={os.environ[name]}", advice)
    if os.environ.get("BMTRAIN_WATCH") == "0":
        yield Finding("environment", "note", "BMTRAIN_WATCH=0", "a rank that dies or differs is not named: unset it")
    folder = os.environ.get("BMTRAIN_DIARY_DIR") or tempfile.gettempdir()
    if not os.access(folder, os.W_OK):
        yield Finding(
            "environment", "note", f"{folder} cannot be written", "set BMTRAIN_DIARY_DIR to a folder for diaries"
        )


def _bandwidth() -> Iterator[Finding]:
    gpus = len(visible_gpus())
    ranks = gpus if gpus > 1 else 2
    with tempfile.TemporaryDirectory(prefix="bmt-doctor-") as folder:
        path = Path(folder) / "found.json"
        launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {key: value for key, value in os.environ.items() if key not in launched}
        if gpus < 2:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        failed = _failure([*command, "-m", "bmtrain.benchmark.probe", str(path)], environment)
        if failed or not path.exists():
            advice = "ranks of this machine cannot talk: the findings above, or NCCL_DEBUG=INFO, may say why"
            yield Finding("all-gather", "bad", f"{ranks} ranks: {failed or 'nothing was measured'}", advice)
            return
        found = json.loads(path.read_text())
    speed = found["bytes"] / found["seconds"] / 1e9
    text = f"{ranks} ranks, {found['bytes'] >> 20} MiB in {found['seconds'] * 1e3:.1f} ms: {speed:.1f} GB/s"
    slow = found["device"] == "cuda" and speed < 20
    where = "between GPUs" if found["device"] == "cuda" else "between processes, on the CPU"
    advice = "ZeRO-3 gathers all parameters each step: without NVLink take larger batches" if slow else ""
    yield Finding("all-gather", "note" if slow else "ok", f"{text} {where}", advice)


def _failure(command: Sequence[str], environment: dict[str, str]) -> str:
    """Why a command did not succeed, in one line; empty if it did. Nothing of it goes on."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=_WAIT)
    except subprocess.TimeoutExpired:
        return f"no end after {_WAIT} s"
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks
            process.wait()
    if process.returncode == 0:
        return ""
    told = [line for line in errors.splitlines() if re.match(r"(?:\[.*\]:)?\s*[\w.]*Error\b.*:", line)]
    return told[0].strip() if told else f"exit code {process.returncode}"


if __name__ == "__main__":
    sys.exit(main())
