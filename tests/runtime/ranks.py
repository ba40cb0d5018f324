"""Runs a test's function on several ranks, each a process of its own on this machine.

    def hello(word: str) -> str:                # at the top level of the test module
        return f"{word} from {bmt.rank()}"

    def test_hello() -> None:
        assert run_ranks(2, hello, "hi") == ["hi from 0", "hi from 1"]

A test whose ranks do all the asserting is written as what each of them does, once for every number of ranks:

    @on_ranks(1, 2)
    def test_rank_is_in_world() -> None:
        assert bmt.rank() < bmt.world_size()

The processes stay alive between tests and are used again by the next test that asks for the same number of ranks,
because starting one costs more than most tests. They are forked from a server that has torch and bmtrain loaded
already. A test that leaves its ranks in an unknown state (an exception, a time-out) costs them their life; the next
test gets new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import io
import multiprocessing
import os
import pickle
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest

T = TypeVar("T")
P = ParamSpec("P")

DEFAULT_TIMEOUT = 120.0
MOST_IDLE_WORKERS = 10  # a bound on memory: the groups used longest ago are closed beyond it
GRACE_AFTER_FAILURE = 3.0  # how long the other ranks get to report once one has failed


class RanksFailed(AssertionError):
    """Some rank raised, died or did not finish; the message holds what every rank had to say."""


@dataclass(frozen=True)
class _Task:
    module: str
    file: str
    function: str
    arguments: bytes  # pickled (args, kwargs); unpickled only after the module is there
    path: list[str]
    directory: str
    default_device: bool
    drawn_on_cpu: bool


def run_ranks(
    world_size: int,
    function: Callable[..., T],
    *args: Any,
    timeout: float = DEFAULT_TIMEOUT,
    init: dict[str, Any] | None = None,
    initialize: bool = True,
    env: dict[str, str] | None = None,
    fresh: bool = False,
    default_device: bool = True,
    drawn_on_cpu: bool = True,
    **kwargs: Any,
) -> list[T]:
    """Calls ``function(*args, **kwargs)`` on ``world_size`` ranks and returns their results, rank 0's first.

    ``function`` is a top-level function; arguments and results are pickled. Before the first call every process runs
    ``bmt.init_distributed(**init)`` unless ``initialize`` is False; the device is the CPU unless ``init`` or the
    variable BMTRAIN_TEST_DEVICE says otherwise. Before each call the random generators are seeded with 0 and the
    gradient mode and default dtype are torch's own; BMTRAIN_TEST_DEFAULT_DEVICE=cuda beside BMTRAIN_TEST_DEVICE=cuda
    lets tests that name no device run there: tensors are made and arguments put there, random numbers are a CPU's, and
    results come back to the CPU. ``default_device`` False is for tests that name the device of all they make,
    ``drawn_on_cpu`` False for those that look at what a device draws. BMTRAIN_TEST_SHARD_SIZE=1 replicates what else is
    sharded over all ranks. ``env`` adds environment variables. ``fresh`` asks for processes that no other test uses,
    before or after: needed by whatever changes the process for good. With fewer GPUs than ranks, ranks share them:
    right for results, not for time, memory, or how NCCL moves bytes.
    Raises RanksFailed with the traceback of every rank that failed.
    """
    task = _describe(function, args, kwargs, default_device, drawn_on_cpu)
    options = {"device": os.environ.get("BMTRAIN_TEST_DEVICE", "cpu")}
    options |= {"schedule": schedule} if (schedule := os.environ.get("BMTRAIN_TEST_SCHEDULE")) else {}
    size = int(os.environ.get("BMTRAIN_TEST_SHARD_SIZE", "0"))
    options |= {"shard_size": size} if size and world_size % size == 0 else {}
    options |= init or {}
    with _group(world_size, options, initialize, env or {}, fresh) as group:
        results: list[T] = group.run(task, timeout)
        return results


def run_script(
    path: Path,
    *arguments: str,
    ranks: int = 1,
    folder: Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> list[subprocess.CompletedProcess[str]]:
    """What each rank of ``torchrun path arguments`` does and writes, in processes that have loaded torch already.

    They begin in ``folder``.
    """
    where = str(folder or os.getcwd())
    return run_ranks(
        ranks, _run_script, str(path), arguments, where, initialize=False, fresh=True, default_device=False, env=env,
        timeout=timeout,
    )  # fmt: skip


def _run_script(path: str, arguments: tuple[str, ...], folder: str) -> subprocess.CompletedProcess[str]:
    os.chdir(folder)
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(path))
    code: int | str | None = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
    return subprocess.CompletedProcess(sys.argv, int(code), out.getvalue(), err.getvalue())


def run_launched(
    path: Path,
    *arguments: str,
    ranks: int,
    restarts: int = 0,
    folder: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What ``torchrun --max-restarts`` does and all its ranks write together; they, too, have loaded torch already.

    Ranks may end as they like, and are started again.  They begin in ``folder``.
    """
    where = str(folder or os.getcwd())
    (done,) = run_ranks(
        1, _launch, str(path), arguments, ranks, restarts, where, initialize=False, fresh=True, default_device=False,
        env=env,
    )  # fmt: skip
    assert isinstance(done, subprocess.CompletedProcess)
    return done


def _launch(
    path: str, arguments: tuple[str, ...], ranks: int, restarts: int, folder: str
) -> subprocess.CompletedProcess[str]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    config = LaunchConfig(
        1, 1, ranks, run_id="tests", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
        start_method="fork",
    )  # fmt: skip
    code = 0
    with tempfile.TemporaryFile("w+") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        try:
            elastic_launch(config, _launched)(path, arguments)
        except ChildFailedError as error:
            code = 1
            print(error, file=sys.stderr, flush=True)
        output.seek(0)
        return subprocess.CompletedProcess([path, *arguments], code, output.read())


def _launched(path: str, arguments: tuple[str, ...]) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # ranks write into one file
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")
    _say_goodbye()


def on_ranks(
    *world_sizes: int, long: tuple[int, ...] = (), **options: Any
) -> Callable[[Callable[P, None]], Callable[Concatenate[int, P], None]]:
    """Makes a test of what every rank does: one for each of ``world_sizes``, with ``options`` of ``run_ranks``.

    Those for the numbers in ``long`` run with --long.

    Fixtures and parameters that the function asks for are pickled and passed to each rank.
    """

    def decorate(function: Callable[P, None]) -> Callable[Concatenate[int, P], None]:
        @functools.wraps(function)
        def test(world_size: int, *args: P.args, **kwargs: P.kwargs) -> None:
            run_ranks(world_size, on_a_rank, *args, **options, **kwargs)

        on_a_rank: Any = function
        on_a_rank.__qualname__ += ".__wrapped__"  # where a rank finds it, which imports the module too
        signature = inspect.signature(function)
        world_size = inspect.Parameter("world_size", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[world_size, *signature.parameters.values()]
        )
        rows = [*world_sizes, *(pytest.param(size, marks=pytest.mark.long) for size in long)]
        return pytest.mark.parametrize("world_size", rows)(test)

    return decorate


def _describe(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    default_device: bool = True,
    drawn_on_cpu: bool = True,
) -> _Task:
    if "<locals>" in function.__qualname__ or function.__name__ == "<lambda>":
        raise ValueError(
            f"{function.__qualname__} must be defined at the top level of its module to run on other processes"
        )
    file = getattr(sys.modules[function.__module__], "__file__", None) or ""
    arguments = pickle.dumps((args, kwargs))
    path = list(sys.path)
    return _Task(
        function.__module__, file, function.__qualname__, arguments, path, os.getcwd(), default_device, drawn_on_cpu
    )


# ---- the parent's side
# -------------------------------------------------------------------------------------------------


class _Group:
    """The processes of one world."""

    def __init__(self, world_size: int, init: dict[str, Any], initialize: bool, env: dict[str, str]) -> None:
        self.world_size = world_size
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        method = multiprocessing.get_context("forkserver")
        start_fork_server()
        port = free_port()
        for rank in range(world_size):
            ours, theirs = method.Pipe()
            variables = _launch_variables(rank, world_size, port) | gpu_variables(rank, world_size) | env
            process = method.Process(target=_worker, args=(theirs, variables, init, initialize), name=f"rank{rank}")
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, task: _Task, timeout: float) -> list[Any]:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # a dead process is reported below
                pipe.send_bytes(pickle.dumps(task))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                succeeded, value = self._receive(rank, pipe)
                (results if succeeded else failures)[rank] = value
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
        if waiting or failures:
            raise RanksFailed(_failure_text(failures, sorted(waiting.values()), sorted(results), timeout))
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int, pipe: Connection) -> tuple[bool, Any]:
        try:
            succeeded, payload = pickle.loads(pipe.recv_bytes())
            return succeeded, pickle.loads(payload) if succeeded else payload
        except (EOFError, OSError):
            self.processes[rank].join(5)
            return False, f"the process ended with exit code {self.processes[rank].exitcode}"

    def close(self, kill: bool) -> None:
        for pipe in self.pipes:
            pipe.close()  # a waiting worker reads the end of the pipe and leaves
        if not kill:
            for process in self.processes:
                process.join(5)
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


@functools.cache
def start_fork_server() -> None:
    """Start what ranks are forked from; whoever else forks in this process of the tests then does so from there."""
    # What a backward or torch.compile imports, and the converter where a test's module does, every rank that is started
    # would import again, for seconds; and this module, by whatever name tests have it, for milliseconds.  Inductor asks
    # what GPUs there are, and who has asked that cannot be forked into processes that use them.
    compiler = ["torch._dynamo"]
    if os.environ.get("BMTRAIN_TEST_DEVICE") != "cuda":
        compiler += ["torch._dynamo.repro.after_dynamo", "torch._dynamo.backends.common"]
        compiler += ["torch._inductor.compile_fx", "torch._inductor.debug"]
    here = [f"{package}{name}" for package in ("", "tests.runtime.") for name in ("ranks", "drawn_on_cpu")]
    helpers = ["rewriting.helpers", "tests.rewriting.helpers"]
    later = ["torch.profiler._cupti_monitor", "torch.utils.serialization.config", "encodings.idna", "encodings.latin_1"]
    forkserver.set_forkserver_preload([*compiler, "bmtrain", "pytest", "rewriter.convert", *later, *here, *helpers])
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server looks nowhere else, and takes no path before 3.13
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if given is not None:
            os.environ["PYTHONPATH"] = given


_idle: OrderedDict[str, _Group] = OrderedDict()


@contextlib.contextmanager
def _group(
    world_size: int, init: dict[str, Any], initialize: bool, env: dict[str, str], fresh: bool
) -> Iterator[_Group]:
    key = repr((world_size, sorted(init.items()), initialize, sorted(env.items())))
    group = None if fresh else _idle.pop(key, None)
    group = group or _Group(world_size, init, initialize, env)
    try:
        yield group
    except BaseException:
        group.close(kill=True)
        raise
    if fresh:
        group.close(kill=False)
        return
    _idle[key] = group
    while sum(idle.world_size for idle in _idle.values()) > MOST_IDLE_WORKERS and len(_idle) > 1:
        _idle.popitem(last=False)[1].close(kill=False)


@atexit.register
def close_idle_ranks() -> None:
    """Ends the processes that wait for another test."""
    while _idle:
        _idle.popitem()[1].close(kill=False)


def _failure_text(failures: dict[int, str], unfinished: list[int], finished: list[int], timeout: float) -> str:
    parts = [f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())]
    if unfinished and failures:
        parts.append(f"ranks {unfinished} were still running {GRACE_AFTER_FAILURE:g} s after the first failure")
    elif unfinished:
        parts.append(f"ranks {unfinished} did not finish within {timeout:g} s")
    if finished:
        parts.append(f"ranks {finished} finished")
    return "\n".join(parts)


def free_port() -> int:
    """A port that nobody listens on, to be listened on later.

    The system gives none of these away for connections, and many tests at once hardly choose the same.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", _ports.randrange(10_000, 32_000)))
            return int(probe.getsockname()[1])


_ports = random.SystemRandom()  # tests seed the other


def _launch_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


@functools.cache
def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def gpu_variables(rank: int, world_size: int) -> dict[str, str]:
    """What lets ranks share GPUs where there are fewer than ranks: NCCL takes every rank for a host of its own."""
    if not 0 < _gpu_count() < world_size:
        return {}
    return {
        "CUDA_VISIBLE_DEVICES": str(rank % _gpu_count()),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NCCL_HOSTID": f"rank {rank}",
        "NCCL_SOCKET_IFNAME": "lo",
    }


# ---- the workers' side
# -------------------------------------------------------------------------------------------------


def _worker(pipe: Connection, variables: dict[str, str], init: dict[str, Any], initialize: bool) -> None:
    import torch

    gc.freeze()  # what the server has loaded is no garbage; a look through it takes longer than most tests
    os.environ.update(variables)
    if not os.environ.get("BMTRAIN_TEST_DEFAULT_DEVICE", "").startswith(init.get("device", "cpu")):
        os.environ.pop("BMTRAIN_TEST_DEFAULT_DEVICE", None)  # a test of CPUs
    torch.set_num_threads(1)
    _leave_guards_untimed()
    started = False
    while True:
        try:
            task: _Task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            if not started and initialize:
                sys.path[:] = task.path
                import bmtrain as bmt

                bmt.init_distributed(**init)
            started = True
            answer = (True, _drawn_on_cpu().dumps_on_cpu(_perform(task)))
        except BaseException:  # whatever it is, the parent must hear of it
            answer = (False, traceback.format_exc())
        try:
            pipe.send_bytes(pickle.dumps(answer))
        except OSError:  # the parent has given up on this group
            break
    with contextlib.suppress(Exception):
        _say_goodbye()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the other ranks leave at the same moment: an orderly teardown could wait for a peer that is gone


def _leave_guards_untimed() -> None:
    """After each compilation torch writes 32 MiB, to note for its log what guards take that are in no cache."""
    guards = sys.modules.get("torch._dynamo.guards")
    if guards is not None and hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[attr-defined]


def _say_goodbye() -> None:
    """Nobody is to miss this process."""
    from bmtrain.context import context, is_initialized

    watchdog = context().watchdog if is_initialized() else None
    if watchdog is not None:
        watchdog.leave()


def _perform(task: _Task) -> Any:
    sys.path[:] = task.path
    os.chdir(task.directory)
    device = os.environ.get("BMTRAIN_TEST_DEFAULT_DEVICE") if task.default_device else None
    _reset(device)
    function: Any = _module(task)
    for name in task.function.split("."):
        function = getattr(function, name)
    args, kwargs = _drawn_on_cpu().on_default_device(pickle.loads(task.arguments))
    with contextlib.ExitStack() as stack:
        if device:
            stack.enter_context(_drawn_on_cpu().compared_across_devices())
        if device and task.drawn_on_cpu:
            stack.enter_context(_drawn_on_cpu().drawn_on_cpu())
        return function(*args, **kwargs)


def _drawn_on_cpu() -> Any:
    """The module beside this one, which needs torch; from wherever this one was imported."""
    if __package__:
        return importlib.import_module(".drawn_on_cpu", __package__)
    return importlib.import_module("drawn_on_cpu")


def _module(task: _Task) -> Any:
    try:
        return importlib.import_module(task.module)
    except ModuleNotFoundError as error:
        if error.name != task.module:
            raise
    specification = importlib.util.spec_from_file_location(task.module, task.file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[task.module] = module
    specification.loader.exec_module(module)
    return module


def _reset(default_device: str | None) -> None:
    import torch

    gc.collect()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(default_device or None)
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(0)
