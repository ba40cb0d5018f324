"""csrc/nccl against a stand-in for NCCL: versions, error texts, and who keeps memory and windows alive.

Needs a C++ compiler and bmtrain's compiled extension, but neither a GPU nor NCCL.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bmtrain._C")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

HERE = Path(__file__).parent
ROOT = Path(importlib.util.find_spec("bmtrain._C").origin).parents[1]  # type: ignore[union-attr, arg-type]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Stand-ins for a new and an old NCCL."""
    built = {}
    for version in (22809, 21805):
        path = tmp_path_factory.mktemp(str(version)) / "libfake.so"
        source = str(HERE / "fake_nccl.cpp")
        flags = ["-shared", "-fPIC", *os.environ.get("CXXFLAGS", "").split(), f"-DVERSION={version}"]
        subprocess.run(["g++", *flags, source, "-o", str(path)], check=True)
        built[version] = path
    return built


def run(library: Path, code: str, **env: str) -> list[str]:
    """What ``code`` prints in a new process, one entry a line.  It finds the stand-in's journal in ``journal()``."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + PRELUDE + code],
        env={**os.environ, "FAKE_LIBRARY": str(library), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


# torch would bring the real NCCL, which comes first: a package without bmtrain/__init__.py imports none.
WITHOUT_TORCH = f"""
import sys, types
package = sys.modules["bmtrain"] = types.ModuleType("bmtrain")
package.__path__ = [{str(ROOT / "bmtrain")!r}]
"""

PRELUDE = """
import array, ctypes, gc, os, threading, time
from bmtrain import _C
from bmtrain.errors import CommunicationError
fake = ctypes.CDLL(os.environ["FAKE_LIBRARY"])
fake.fake_journal.restype = ctypes.c_char_p
def journal():
    return fake.fake_journal().decode()
nccl = _C.nccl
print(nccl.load([os.environ["FAKE_LIBRARY"]]))
def connect(policy=0):
    return nccl.Communicator(id=nccl.unique_id(), rank=0, world_size=1, policy=policy)
def new_arena(size=1):
    return nccl.Arena(bytes=size, device=0)
FLOAT, SUM, NOTHING = 7, 0, dict(count=0, dtype=7, stream=0)
def all_reduce(comm):
    comm.all_reduce(source=0, target=0, op=SUM, **NOTHING)
def outcome(call, *arguments):
    try:
        return str(call(*arguments))
    except CommunicationError as error:
        return str(error)
def in_thread(call, *arguments):
    # The thread, which prints what came of the call.
    thread = threading.Thread(target=lambda: print(outcome(call, *arguments) + "\\n", end=""))
    thread.start()
    return thread
"""


def test_new_library_has_everything(libraries: dict[int, Path]) -> None:
    code = """
print(nccl.has_arenas(), nccl.has_windows(), nccl.has_policies(), nccl.has_float8())
print(nccl.path() == os.environ["FAKE_LIBRARY"])
connect(2), connect(0)
print(journal())
"""
    opened = "init policy 2 id u;init policy 0 id u;"
    assert run(libraries[22809], code) == ["22809", "True True True True", "True", opened]


def test_old_library_works_without_what_came_later(libraries: dict[int, Path]) -> None:
    code = """
print(nccl.has_arenas(), nccl.has_windows(), nccl.has_policies(), nccl.has_float8())
comm = connect(2)
for call in (lambda: new_arena(), lambda: comm.split(color=0, key=0, policy=0)):
    try:
        call()
    except CommunicationError as error:
        print(error)
source, target = array.array("f", [1, 2, 3]), array.array("f", [0, 0, 0])
comm.all_gather(
    shard=source.buffer_info()[0], whole=target.buffer_info()[0], count=3, dtype=FLOAT, stream=0)
print(target.tolist())
comm.close()
print(journal())
"""
    assert run(libraries[21805], code) == [
        "21805",
        "False False False False",
        "This NCCL has no ncclMemAlloc; 2.19 or newer is needed.",
        "Splitting a communicator needs NCCL 2.18 or newer.",
        "[1.0, 2.0, 3.0]",
        "init;all_gather;destroy;",
    ]


def test_memory_lives_until_neither_tensor_nor_window_needs_it(libraries: dict[int, Path]) -> None:
    code = """
first, second = connect(), connect()
arena = new_arena(5000)
print(arena.bytes, first.register_window(arena.address + 4999) == "", first.register_window(arena.address) == "",
      second.register_window(arena.address) == "")
capsule = arena.to_dlpack()
del arena
gc.collect()
print(nccl.arena_bytes())
gc.collect()
address = new_arena().address
del capsule
gc.collect()
print(journal())
second.close()
print(journal().count("deregister"), journal().count("free"))
first.close()
print(journal(), nccl.arena_bytes())
try:
    first.register_window(address)
except CommunicationError as error:
    print(error)
"""
    opened = "init policy 0 id u;init policy 0 id u;alloc;register;register;alloc;free;"
    assert run(libraries[22809], code) == [
        "22809",
        "8192 True True True",
        "8192",
        opened,
        "1 1",
        opened + "deregister;destroy;deregister;destroy;free; 0",
        "This communicator has been closed or aborted.",
    ]


def test_a_window_can_be_closed_alone(libraries: dict[int, Path]) -> None:
    code = """
comm, arena = connect(), new_arena()
comm.register_window(arena.address)
print(comm.deregister_window(arena.address), comm.deregister_window(arena.address))
del arena
gc.collect()
print(journal().split(";", 1)[1])
"""
    assert run(libraries[22809], code)[1:] == ["True False", "alloc;register;deregister;free;"]


@pytest.mark.parametrize(
    "mode, reason",
    [("error", "invalid argument"), ("none", "NCCL does not support symmetric windows between these devices")],
)
def test_windows_that_cannot_be_opened_give_a_reason(libraries: dict[int, Path], mode: str, reason: str) -> None:
    code = """
comm, arena = connect(), new_arena()
print(comm.register_window(arena.address))
comm.close()
"""
    assert run(libraries[22809], code, FAKE_WINDOW=mode)[1:] == [reason]


def test_errors_say_what_failed_and_where(libraries: dict[int, Path]) -> None:
    code = """
comm = connect()
for call in (lambda: comm.reduce_scatter(whole=0, shard=0, op=SUM, **NOTHING), comm.check_async_error,
             lambda: comm.register_window(64),
             lambda: nccl.Communicator(id=b"short", rank=0, world_size=1, policy=0)):
    try:
        call()
    except CommunicationError as error:
        print(error)
comm.abort()
comm.abort()
try:
    all_reduce(comm)
except CommunicationError as error:
    print(error)
print(journal())
"""
    lines = run(libraries[22809], code, FAKE_ASYNC_ERROR="1")
    assert lines[1].startswith("NCCL: invalid argument (library().ReduceScatter(")
    assert "csrc/nccl/communicator.cpp:" in lines[1] and lines[1].endswith("Last error: the fake was asked to fail")
    assert lines[2].startswith("NCCL: other error (asynchronous operation at ")
    assert lines[3:] == [
        "Only memory from alloc() can be registered.",
        "A NCCL unique id has 128 bytes.",
        "This communicator has been closed or aborted.",
        "init policy 0 id u;abort;",
    ]


def test_integers_are_taken_by_name_alone(libraries: dict[int, Path]) -> None:
    code = """
comm = connect()
for call, integers, first in (
    (comm.all_gather, 5, "shard"), (comm.reduce_scatter, 6, "whole"), (comm.reduce, 7, "source"),
    (comm.split, 3, "color"), (nccl.Arena, 2, "bytes"), (_C.reference.accumulate, 4, "total"),
):
    try:
        call(*[0] * integers)
    except TypeError as error:
        print(f"*, {first}: " in str(error))
"""
    assert run(libraries[22809], code)[1:] == ["True"] * 6


def test_groups(libraries: dict[int, Path]) -> None:
    code = """
nccl.group_start()
nccl.group_end()
print(journal())
"""
    assert run(libraries[22809], code)[1:] == ["group_start;group_end;"]


def test_missing_library_is_named() -> None:
    code = WITHOUT_TORCH + "from bmtrain import _C; _C.nccl.load(['/nowhere/libnccl.so.2'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "CommunicationError: NCCL (libnccl.so.2) was not found" in result.stderr
    assert "/nowhere/libnccl.so.2" in result.stderr


def test_abort_waits_for_a_call_of_another_thread_that_is_about_to_leave(libraries: dict[int, Path]) -> None:
    code = """
comm = connect()
fake.fake_hold(b"all_reduce")
call = in_thread(all_reduce, comm)
assert fake.fake_wait_until_held()
abort = in_thread(comm.abort)
while comm.is_open:
    time.sleep(0.001)
time.sleep(0.05)
print(outcome(all_reduce, comm))
fake.fake_hold(b"")
call.join(), abort.join()
print(journal())
"""
    lines = run(libraries[22809], code)
    assert lines[1] == "This communicator has been closed or aborted."
    assert lines[2:] == ["None", "None", "init policy 0 id u;all_reduce;abort;"]


def test_abort_ends_a_call_of_another_thread_that_waits_for_a_peer(libraries: dict[int, Path]) -> None:
    code = """
comm, arena = connect(), new_arena()
comm.register_window(arena.address)
del arena
fake.fake_hold(b"all_reduce")
call = in_thread(all_reduce, comm)
assert fake.fake_wait_until_held()
start = time.monotonic()
comm.abort()
call.join()
print(time.monotonic() - start < 10, journal().split("register;")[1])
"""
    error, ended = run(libraries[22809], code)[1:]
    assert error.startswith("NCCL: other error (")
    assert ended == "True abort under a call;all_reduce failed;free;"


def test_abort_knows_that_the_end_of_a_group_uses_the_communicators_in_it(libraries: dict[int, Path]) -> None:
    code = """
comm, other = connect(), connect()
def group():
    nccl.group_start()
    comm.send(data=0, peer=0, **NOTHING)
    comm.recv(data=0, peer=0, **NOTHING)
    nccl.group_end()
fake.fake_hold(b"group_end")
call = in_thread(group)
assert fake.fake_wait_until_held()
other.abort()
abort = in_thread(comm.abort)
while comm.is_open:
    time.sleep(0.001)
time.sleep(0.05)
fake.fake_hold(b"")
call.join(), abort.join()
print(journal().split("recv;")[1])
"""
    assert run(libraries[22809], code)[1:] == ["None", "None", "abort;group_end;abort;"]


@pytest.mark.parametrize("end, freed", [("abort", "abort"), ("close", "destroy")])
def test_nothing_is_freed_under_threads_that_go_on_calling(libraries: dict[int, Path], end: str, freed: str) -> None:
    code = f"""
comm = connect()
def call_until_refused():
    while True:
        try:
            all_reduce(comm), comm.check_async_error()
        except CommunicationError as error:
            return error
threads = [in_thread(call_until_refused) for _ in range(4)]
while journal().count("all_reduce") < 100:
    time.sleep(0.001)
comm.{end}()
for thread in threads:
    thread.join()
calls = journal().split(";")
print(calls[-2:], calls.count("{freed}"))
"""
    lines = run(libraries[22809], code)
    assert lines[1:] == ["This communicator has been closed or aborted."] * 4 + [f"['{freed}', ''] 1"]


def test_close_refuses_while_another_thread_waits_inside_a_call(libraries: dict[int, Path]) -> None:
    code = """
comm = connect()
fake.fake_hold(b"all_reduce")
call = in_thread(all_reduce, comm)
assert fake.fake_wait_until_held()
print(outcome(comm.close), comm.is_open)
fake.fake_hold(b"")
call.join()
comm.close()
print(journal())
"""
    refusal, *rest = run(libraries[22809], code)[1:]
    assert refusal.startswith("A call or a group on this communicator has not ended") and refusal.endswith("True")
    assert rest == ["None", "init policy 0 id u;all_reduce;destroy;"]


@pytest.mark.parametrize("failure", ["DEREGISTER", "DESTROY"])
def test_close_that_fails_still_gives_everything_back(libraries: dict[int, Path], failure: str) -> None:
    code = """
comm = connect()
for _ in range(2):
    arena = new_arena()
    comm.register_window(arena.address)
del arena
print(nccl.arena_bytes(), outcome(comm.close), sep="|")
print(nccl.arena_bytes(), comm.is_open, outcome(comm.close))
print(journal().split("register;", 2)[2])
"""
    failed, after, calls = run(libraries[22809], code, **{f"FAKE_{failure}_ERROR": "1"})[1:]
    assert failed.startswith("8192|NCCL: invalid argument (") and failure.capitalize() in failed
    assert after == "0 False None"
    windows = "deregister failed;deregister;" if failure == "DEREGISTER" else "deregister;deregister;"
    assert calls == windows + "destroy;free;free;"


@pytest.mark.parametrize("owner", ["arena", "capsule"])
def test_other_threads_go_on_while_memory_is_freed(libraries: dict[int, Path], owner: str) -> None:
    code = f"""
arena = new_arena()
capsule = arena.to_dlpack()
{"del capsule" if owner == "arena" else "del arena"}
fake.fake_hold(b"free")
def let_go():
    fake.fake_wait_until_held()
    fake.fake_hold(b"")
    print("ran")
thread = threading.Thread(target=let_go)
thread.start()
start = time.monotonic()
del {owner}
thread.join()
print(time.monotonic() - start < 10, nccl.arena_bytes(), journal())
"""
    assert run(libraries[22809], code)[1:] == ["ran", "True 0 alloc;free;"]
