"""The ways to start a script: torchrun, torch.distributed.launch, several nodes, and plain python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import RanksFailed, free_port, run_launched, run_script

SCRIPT = str(Path(__file__).parent / "launched.py")
ROOT = Path(__file__).parents[2]
SECONDS = 120


def environment() -> dict[str, str]:
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if k not in launch}
    paths = [str(ROOT), *filter(None, [clean.get("PYTHONPATH")])]
    return {**clean, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*processes: subprocess.Popen[str]) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def seen(folder: Path, world_size: int) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert [f["rank"] for f in found] == list(range(world_size))
    assert all(f["world_size"] == world_size for f in found)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of ``python script.py``: one process, no launcher."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(SCRIPT, "--out", str(folder)))
    losses: list[float] = seen(folder, 1)[0]["losses"]
    return losses


def check(folder: Path, world_size: int, alone: list[float]) -> list[dict[str, Any]]:
    found = seen(folder, world_size)
    for one in found:
        assert one["losses"] == pytest.approx(alone, rel=1e-5), "the same losses however it is started"
    return found


def test_torchrun(tmp_path: Path, alone: list[float]) -> None:
    run = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    finish(start(*run, SCRIPT, "--out", str(tmp_path)))
    check(tmp_path, 2, alone)


@pytest.mark.long
def test_the_older_launcher_passes_local_rank(tmp_path: Path, alone: list[float]) -> None:
    run = ["-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}"]
    finish(start(*run, SCRIPT, "--out", str(tmp_path)))
    found = check(tmp_path, 2, alone)
    assert [f["environment"] for f in found] == ["0", "1"]


@pytest.mark.long
def test_two_nodes(tmp_path: Path, alone: list[float]) -> None:
    run = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    run += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    finish(*(start(*run, f"--node_rank={node}", SCRIPT, "--out", str(tmp_path)) for node in (0, 1)))
    found = check(tmp_path, 2, alone)
    assert [f["environment"] for f in found] == ["0", "0"], "each is the first of its node"


def test_a_failing_rank_ends_the_job(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import bmtrain as bmt, torch\n"
        "bmt.init_distributed(device='cpu')\n"
        "model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))\n"
        "if bmt.rank() == 1:\n"
        "    raise KeyError('the reason')\n"
        "model(torch.ones(1, 4)).sum().backward()\n"
    )
    done = run_launched(script, ranks=2)
    assert done.returncode != 0 and "KeyError: 'the reason'" in done.stdout


def dies(folder: Path, rank: int) -> Path:
    """A script of three steps, in the first of which ``rank`` ends where it is not started again."""
    script = folder / "dies.py"
    script.write_text(
        "import os\n"
        "import bmtrain as bmt, torch\n"
        "count = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "bmt.init_distributed(device='cpu')\n"
        "model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))\n"
        "for step in range(3):\n"
        "    model(torch.ones(1, 4)).sum().backward()\n"
        f"    if count == '0' and bmt.rank() == {rank}:\n"
        "        os._exit(3)\n"
        "print(f'rank {bmt.rank()} is through {count}')\n"
    )
    return script


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_are_started_again_find_each_other(tmp_path: Path, rank: int) -> None:
    done = run_launched(dies(tmp_path, rank), ranks=2, restarts=1)
    assert done.returncode == 0, done.stdout
    assert "rank 0 is through 1" in done.stdout and "rank 1 is through 1" in done.stdout, done.stdout


RESTARTS = {"static": [], "c10d": ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]}


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("rendezvous", RESTARTS)
def test_as_torchrun_starts_them_again(tmp_path: Path, rendezvous: str, rank: int) -> None:
    where = RESTARTS[rendezvous] or [f"--master_port={free_port()}"]
    run = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", *where]
    process = start(*run, str(dies(tmp_path, rank)))
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and "rank 0 is through 1" in output and "rank 1 is through 1" in output, output


@pytest.mark.parametrize("name", ["SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_a_task_of_another_launcher_does_not_train_alone(name: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    alone = "import os; del os.environ['RANK'], os.environ['WORLD_SIZE']\n"
    script.write_text(f"{alone}import bmtrain as bmt\nbmt.init_distributed(device='cpu')\nprint('alone')\n")
    (done,) = run_script(script, env={name: "0"})
    assert (done.returncode, done.stdout) == (0, "alone\n"), done.stderr
    with pytest.raises(RanksFailed, match="each process would train alone"):
        run_script(script, env={name: "3"})
