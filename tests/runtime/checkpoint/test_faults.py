"""Storage that fails, stalls or lies, and processes that die: what was whole stays whole, and every rank is told."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import oracle
import pytest
import ranks
import torch
from ranks import on_ranks, run_ranks
from test_checkpointer import assert_same
from torch import nn

import bmtrain as bmt
from bmtrain.checkpoint import PREEMPTED, Checkpointer, checkpointer, storage
from bmtrain.checkpoint import folder as folders
from bmtrain.errors import CheckpointError

MUTATIONS = int(os.environ.get("BMTRAIN_TEST_MUTATIONS", "400"))
KILLS = int(os.environ.get("BMTRAIN_TEST_KILLS", "4"))


class Net(nn.Module):
    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.one = nn.Linear(6, width)
        self.other = nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x).tanh())  # type: ignore[no-any-return]


class Job:
    def __init__(self, folder: Any, width: int = 9, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = bmt.BMTrainModelWrapper(Net(width))
        self.manager = bmt.optim.OptimManager()
        self.manager.add_optimizer(bmt.optim.AdamOptimizer(self.model.parameters(), lr=0.01))
        self.ckpt = Checkpointer(folder, model=self.model, optimizer=self.manager, **options)

    def train(self, step: int) -> None:
        self.manager.zero_grad()
        self.manager.backward(oracle.mean(self.model(oracle.inputs(step) + torch.rand(()))))
        self.manager.step()

    def facts(self) -> dict[str, Any]:
        state = self.manager.state_dict()["optimizers"][0]["state"]
        return {"model": {k: v.clone() for k, v in self.model.state_dict().items()}, "optimizer": state}


# ---- storage
# ---------------------------------------------------------------------------------------------------------------------


class Faulty:
    """A file that misbehaves at its nth write."""

    def __init__(self, file: IO[bytes], how: str, at: int) -> None:
        self._file, self._how, self._at, self._count = file, how, at, 0

    def write(self, data: Any) -> int:
        self._count += 1
        if self._count - 1 == self._at:
            if self._how == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            if self._how == "stall":
                time.sleep(0.5)
            if self._how == "lose":
                return len(memoryview(data).cast("B"))
            if self._how == "flip":
                data = bytearray(data)
                data[len(data) // 2] ^= 1
        return self._file.write(data)

    def __enter__(self) -> Faulty:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def fault(rank: int, where: str, how: str, at: int = 0) -> Iterator[None]:
    """Files whose names match ``where`` misbehave on ``rank``; or a function of the protocol fails there."""
    if bmt.rank() != rank:
        yield
        return
    patch = pytest.MonkeyPatch()
    if how == "raise":
        holder, _, name = where.rpartition(".")
        target = {"os": storage.os, "folders": folders, "storage": storage, "shutil": folders.shutil}[holder]

        def fails(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(target, name, fails)
    else:
        opened = storage.open_file

        def open_file(path: Path, mode: str) -> Any:
            file = opened(path, mode)
            return Faulty(file, how, at) if path.match(where) and mode == "wb" else file

        patch.setattr(storage, "open_file", open_file)
    try:
        yield
    finally:
        patch.undo()


def visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != ".lock")


@pytest.mark.parametrize(("wait", "files"), [(True, 1), (True, 3), (False, 1)])
@on_ranks(1, 2)
def test_a_write_that_fails_anywhere_is_told_everywhere(wait: bool, files: int, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointer, "_LARGE", 1)
        patch.setattr(checkpointer, "_MOST_FILES", files)
        patch.setattr(checkpointer, "processors", lambda: 64)
        _fails_anywhere(wait, files, tmp_path)


def _fails_anywhere(wait: bool, files: int, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.train(1)
    job.ckpt.save(1)
    last = bmt.world_size() - 1
    attacks = [(last, f"__{last}_*.distcp", "full", at) for at in ((0, 1, 7, 30) if files == 1 else (0, 7))]
    attacks += [(0, "manifest.json", "full", 0), (0, ".metadata", "full", 0)]
    attacks += [(last, "os.fsync", "raise", 0), (0, "os.rename", "raise", 0), (0, "folders.commit", "raise", 0)]
    attacks += [(0, "storage.finish", "raise", 0), (last, "storage.write_pieces", "raise", 0)]
    for number, (rank, where, how, at) in enumerate(attacks):
        with fault(rank, where, how, at):
            with pytest.raises(CheckpointError, match="step 2 was not written") as caught:
                job.ckpt.save(2, wait=wait)
                if wait or number % 2:
                    job.ckpt.save(3)
                else:
                    job.ckpt.close()
            assert f"rank {rank}" in str(caught.value) or bmt.world_size() == 1, str(caught.value)
            assert "Error" in str(caught.value)
        if not wait and not number % 2:
            job.ckpt = Checkpointer(tmp_path, model=job.model, optimizer=job.manager)
        bmt.synchronize()
        assert visible(tmp_path) == ["step-0000000001"], (where, how, at, visible(tmp_path))
        bmt.synchronize()
    job.train(2)
    expected = job.facts()
    job.ckpt.save(2, wait=wait)
    job.train(3)
    assert job.ckpt.resume() == 2
    assert_same(job.facts(), expected)
    job.ckpt.close()


@on_ranks(2, 3)
def test_an_error_of_a_background_save_stops_all_ranks_at_one_step(tmp_path: Path) -> None:
    job = Job(tmp_path, every=2)
    stopped = None
    with fault(1, "__1_0.distcp", "full", 3):
        for step in range(1, 12):
            job.train(step)
            try:
                job.ckpt.step(step)
            except CheckpointError as error:
                assert "rank 1: OSError: [Errno 28]" in str(error)
                stopped = step
                break
    assert stopped is not None and bmt.store.allgather_objects(stopped) == [stopped] * bmt.world_size()
    job.ckpt.close()


@on_ranks(2)
def test_a_slow_disk_is_waited_for_and_training_goes_on(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.train(1)
    expected = job.facts()
    with fault(1, "__1_0.distcp", "stall", 2):
        start = time.monotonic()
        job.ckpt.save(1, wait=False)
        job.train(2)
        assert time.monotonic() - start < 0.5 and not folders.steps(tmp_path)
        job.ckpt.save(2)  # one is in flight at most: this waits for the first
    assert folders.steps(tmp_path) == [2, 1]
    job.ckpt.resume(1)
    assert_same(job.facts(), expected)
    job.ckpt.close()


@on_ranks(2)
def test_a_disk_that_lies_is_found_out_and_the_older_one_taken(tmp_path: Path) -> None:
    for how in ("flip", "lose"):
        for at in (0, 5, 20):
            shutil.rmtree(tmp_path / how, ignore_errors=True) if bmt.rank() == 0 else None
            bmt.synchronize()
            job = Job(tmp_path / how)
            job.train(1)
            job.ckpt.save(1)
            expected = job.facts()
            job.train(2)
            with fault(1, "__1_0.distcp", how, at):
                job.ckpt.save(2)
            job.train(3)
            before = job.facts()
            with pytest.raises(CheckpointError, match=r"__1_0\.distcp is damaged.*resume\(step=1\)"):
                job.ckpt.resume()
            assert_same(job.facts(), before)
            if bmt.rank() == 0:
                with pytest.warns(UserWarning, match="Going on from step 1"):
                    assert job.ckpt.resume(fall_back=True) == 1
            else:
                assert job.ckpt.resume(fall_back=True) == 1
            assert_same(job.facts(), expected)
            job.ckpt.close()
            bmt.synchronize()


# ---- files
# ---------------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    at = draw.randrange(len(data))
    size = min(draw.choice((1, 2, 8, 100)), len(data) - at)
    return draw.choice(
        [
            lambda: data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :],
            lambda: data[:at] + draw.randbytes(size) + data[at + size :],
            lambda: data[:at] + bytes(size) + data[at + size :],
            lambda: data[:at],
            lambda: data[:at] + data[at + size :],
            lambda: data[:at] + draw.randbytes(size) + data[at:],
            lambda: data + draw.randbytes(size),
            lambda: b"",
            lambda: draw.choice(others),
            lambda: data[:at] + data[at + size : at + 2 * size] + data[at : at + size] + data[at + 2 * size :],
        ]
    )()


def mutations(folder: str, count: int, seed: int) -> int:
    """Loads a checkpoint ``count`` times, each time with another change to one of its files."""
    draw = random.Random(seed)
    job = Job(folder)
    job.train(1)
    job.ckpt.save(1)
    job.train(2)
    job.ckpt.save(2)
    job.train(3)
    before, harmless = job.facts(), 0
    path = folders.path_of(Path(folder), 2)
    files = {file: file.read_bytes() for file in sorted(path.iterdir())}
    older = {file.name: file.read_bytes() for file in folders.path_of(Path(folder), 1).iterdir()}
    for number in range(count):
        file = draw.choice(list(files))
        changed = mutated(files[file], draw, [older[file.name], *files.values()])
        if changed == files[file]:
            harmless += 1
            continue
        file.write_bytes(changed)
        try:
            job.ckpt.resume(2)
        except CheckpointError as error:
            assert file.name in str(error) or folder in str(error), (number, str(error))
        else:
            raise AssertionError(f"mutation {number} (seed {seed}) of {file.name} was loaded")
        file.write_bytes(files[file])
    assert_same(job.facts(), before)
    assert job.ckpt.resume() == 2
    job.ckpt.close()
    return count - harmless


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """BMTRAIN_TEST_MUTATIONS=100000 for a long run."""
    assert run_ranks(1, mutations, str(tmp_path), MUTATIONS, 3, timeout=36000)[0] > MUTATIONS * 0.8


class Code:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@on_ranks(1)
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    import json
    import pickle

    os.chdir(tmp_path)
    job = Job(tmp_path / "a")
    job.ckpt.save(1)
    path = folders.path_of(tmp_path / "a", 1)
    for data in (pickle.dumps(Code()), pickle.dumps({"a": Code()}), pickle.dumps(eval)):
        (path / ".metadata").write_bytes(data)
        facts = json.loads((path / "manifest.json").read_text().split("\n")[1])
        facts["metadata"] = {"length": len(data), "crc32": zlib.crc32(data)}
        (path / "manifest.json").write_bytes(storage._manifest(storage.FORMAT, json.dumps(facts)))
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it holds"):
            job.ckpt.resume()
    assert not (tmp_path / "ran").exists()
    job.ckpt.close()


# ---- folders
# ---------------------------------------------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_what_is_kept_and_what_is_swept(tmp_path: Path) -> None:
    job = Job(tmp_path, keep=2)
    assert job.ckpt.latest() is None and job.ckpt.resume() == 0
    if bmt.rank() == 0:
        for left in (".writing-step-0000000009-abc", ".removing-step-0000000001", ".replaced-step-0000000003"):
            (tmp_path / left).mkdir()
        (tmp_path / ".replaced-step-0000000003" / ".metadata").touch()
        (tmp_path / "step-0000000008").mkdir()  # no .metadata: not whole, and not ours to remove
        (tmp_path / "notes.txt").touch()
    bmt.synchronize()
    assert job.ckpt.latest() is None
    for step in (4, 5, 6, 6):
        job.ckpt.save(step)
    bmt.synchronize()
    assert visible(tmp_path) == ["notes.txt", "step-0000000005", "step-0000000006", "step-0000000008"]
    assert job.ckpt.latest() == 6
    job.ckpt.save(3)  # gone back: what is newer stays, and so does this
    bmt.synchronize()
    assert folders.steps(tmp_path) == [6, 5, 3]
    with pytest.raises(CheckpointError, match=r"only of \[6, 5, 3\]"):
        job.ckpt.resume(4)
    job.ckpt.close()


def two_jobs(folder: str) -> str:
    job = Job(folder)
    job.ckpt.save(1)
    bmt.synchronize()
    time.sleep(1.5)
    job.ckpt.close()
    return ""


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = threading.Thread(target=lambda: run_ranks(1, two_jobs, str(tmp_path), fresh=True))
    first.start()
    while not folders.steps(tmp_path) and first.is_alive():
        time.sleep(0.01)
    with pytest.raises(ranks.RanksFailed, match="another job that still runs"):
        run_ranks(1, two_jobs, str(tmp_path), fresh=True)
    first.join()
    assert folders.steps(tmp_path) == [1]
    run_ranks(1, two_jobs, str(tmp_path), fresh=True)  # its lock went with it


@on_ranks(1, 2)
def test_mistakes_are_told(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for options in ({"keep": 0}, {"every": 0}, {"exit_after": "soon"}, {"best": 3.0}, {"text": "a"}):
        with pytest.raises(ValueError, match=r"keep|exit_after|best|text"):
            Checkpointer(tmp_path, model=job.model, **options)  # type: ignore[arg-type]
    for step in (-1, "1", 2.0):
        with pytest.raises(CheckpointError, match="step must be"):
            job.ckpt.save(step)  # type: ignore[arg-type]
    bad: dict[str, Any] = {"f": Code()}
    ckpt = Checkpointer(tmp_path, model=job.model, bad=bad)
    with pytest.raises(CheckpointError, match=r"bad\.f is not saved"):
        ckpt.save(1)
    for wrong, said in (
        (job.model.one.weight, "a sharded parameter"), (torch.ones(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"), ({"x": {1: object()}}, r"bad\.f\.x\.1"),
    ):  # fmt: skip
        bad["f"] = wrong
        with pytest.raises(CheckpointError, match=said):
            ckpt.save(1)
    bad.clear()
    bad["rank"] = bmt.rank()
    if bmt.world_size() > 1:
        with pytest.raises(CheckpointError, match="bad differs between ranks"):
            ckpt.save(1)
        with pytest.raises(CheckpointError, match="different steps"):
            job.ckpt.save(bmt.rank())
        bad["rank"] = torch.tensor(bmt.rank())
        ckpt.save(1)
        ckpt.resume()
        assert int(bad["rank"]) == 0
    bad["rank"] = 0
    job.ckpt.save(2)
    with pytest.raises(CheckpointError, match="holds nothing for bad"):
        ckpt.resume()
    other = Checkpointer(tmp_path, model=bmt.BMTrainModelWrapper(Net(7)))
    with pytest.raises(CheckpointError, match=r"(?s)nothing was loaded.*one\.weight: shape \(9, 6\)"):
        other.resume()
    for one in (job.ckpt, ckpt, other):
        one.close()


# ---- making room
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "time", "call"])
@on_ranks(1, 2)
def test_a_job_saves_and_makes_room(how: str, tmp_path: Path) -> None:
    job = Job(tmp_path, every=100, exit_after="1s" if how == "time" else None)
    done = 0
    with pytest.raises(SystemExit) as left:
        for step in range(1, 2000):
            job.train(step)
            done = step
            if how != "time" and step == 3 and bmt.rank() == bmt.world_size() - 1:
                job.ckpt.make_room() if how == "call" else os.kill(os.getpid(), getattr(signal, how))
            if how == "time":
                time.sleep(0.01)
            job.ckpt.step(step)
    assert left.value.code == PREEMPTED == 75
    assert bmt.store.allgather_objects(done) == [done] * bmt.world_size() and (how == "time" or done in (4, 5))
    expected = job.facts()
    job = Job(tmp_path)
    assert job.ckpt.resume() == done
    assert_same(job.facts(), expected)
    job.ckpt.close()
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None)


def told_then_asleep(told: Any) -> None:
    told.set()
    time.sleep(60)


@on_ranks(1)
def test_children_go_when_they_are_asked_to(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.ckpt.step(1)
    forks = multiprocessing.get_context("fork")
    told = forks.Event()
    child = forks.Process(target=told_then_asleep, args=(told,))
    child.start()
    assert told.wait(20)  # Python drops a signal that comes while it is being forked
    child.terminate()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM
    job.ckpt.step(2)
    job.ckpt.step(3)
    job.ckpt.close()


# ---- death
# ---------------------------------------------------------------------------------------------------------------------

STEPS = 24


def to_the_end(folder: str, pause: float) -> tuple[int, dict[str, Any]]:
    job = Job(folder, every=2)
    first = job.ckpt.resume()
    for step in range(first + 1, STEPS + 1):
        job.train(step)
        job.ckpt.step(step)
        time.sleep(pause)
    job.ckpt.close()
    return first, job.facts()


def until_killed(world_size: int, folder: Path, draw: random.Random) -> None:
    group = ranks._Group(world_size, {"device": "cpu"}, True, {})

    def run() -> None:
        with pytest.raises(ranks.RanksFailed):
            group.run(ranks._describe(to_the_end, (str(folder), 0.05), {}), 60)

    running = threading.Thread(target=run)
    before = folders.steps(folder)[:1]
    running.start()
    while folders.steps(folder)[:1] == before and running.is_alive():
        time.sleep(0.005)
    time.sleep(draw.random() * 0.3)
    victims = list(group.processes)
    draw.shuffle(victims)
    for process in victims:  # as an agent does with the others when one has died
        process.kill()
        time.sleep(draw.choice((0.0, 0.02, 0.2)))
    running.join()
    group.close(kill=True)


def killed_and_restarted(worlds: Callable[[int], int], kills: int, folder: Path, seed: int) -> dict[str, Any]:
    draw, done = random.Random(seed), 0
    while done < kills:
        if (folders.steps(folder) or [0])[0] >= STEPS - 4:  # begin anew
            shutil.rmtree(folder)
        until_killed(worlds(done), folder, draw)
        done += 1
        for step in folders.steps(folder):
            assert not list(storage.Stored(folders.path_of(folder, step)).problems())
    results = run_ranks(worlds(done), to_the_end, str(folder), 0.0, init={"device": "cpu"})
    assert all(first == results[0][0] > 0 for first, _ in results)
    return results[0][1]


def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """BMTRAIN_TEST_KILLS=200 for a long run."""
    expected = run_ranks(2, to_the_end, str(tmp_path / "undisturbed"), 0.0, init={"device": "cpu"})[0][1]
    assert_same(killed_and_restarted(lambda kill: 2, KILLS, tmp_path / "same", 1), expected)
    found = killed_and_restarted(lambda kill: (2, 1, 3)[kill % 3], KILLS // 2, tmp_path / "other", 2)
    for name, value in expected["model"].items():
        oracle.assert_close(found["model"][name], value, name)


assert checkpointer  # what tests patch is imported once, here
