"""Where calls of ``torch.distributed`` stay in any file of a script, it registers torch's process group."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

MAIN = """import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import comm

{seed}dist.init_process_group(backend="nccl")
model = DistributedDataParallel(torch.nn.Linear(4, 1))
opt = torch.optim.SGD(model.parameters(), 0.1)
for x in torch.utils.data.DataLoader(data, batch_size=4):
    loss = model(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(comm.everybodys(loss))
dist.destroy_process_group()
"""
GATHERS = """import torch
import torch.distributed as dist


def everybodys(value):
    parts = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return parts
"""
REDUCES = """import torch.distributed as dist


def everybodys(value):
    dist.all_reduce(value)
    return value
"""


def converted(folder: Path, main: str, comm: str) -> tuple[str, str, list[str]]:
    for _ in range(2):  # a second run changes nothing
        (folder / "comm.py").write_text(comm)
        (folder / "main.py").write_text(main)
        results = convert_paths(sorted(folder.iterdir()), Options(), [folder])
        first = (comm, main)
        comm, main = (result.after.decode() for result in results)
    assert first == (comm, main)
    return main, comm, [finding.message for result in results for finding in result.reported]


@pytest.mark.parametrize("seed", ["", "torch.manual_seed(3)\n"], ids=["no seed", "a seed"])
def test_a_call_in_another_file_has_its_process_group(tmp_path: Path, seed: str) -> None:
    main, comm, said = converted(tmp_path, MAIN.format(seed=seed), GATHERS)
    start = f"bmt.init_distributed({'seed=3' if seed else ''})\nbmt.distributed.register_process_group()\n"
    assert start in main and "process_group(backend" not in main and "destroy" not in main
    assert "dist.all_gather(parts, value)" in comm and "range(bmt.world_size())" in comm
    assert not any("process group" in message for message in said)


def test_calls_that_become_bmtrains_need_none(tmp_path: Path) -> None:
    main, comm, _ = converted(tmp_path, MAIN.format(seed=""), REDUCES)
    assert "register_process_group" not in main and "init_process_group" not in main and "dist.all_reduce" not in comm


def test_a_launch_without_ranks_is_reported() -> None:
    result = convert_text("""import torch
import torch.multiprocessing as mp


def train(rank, gpus):
    model = torch.nn.Linear(4, 1)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for x in torch.utils.data.DataLoader(data, batch_size=4):
        model(x).mean().backward()
        opt.step()


def main(gpus, many):
    if many:
        mp.spawn(train, nprocs=gpus, args=(gpus,))
    else:
        train(0, gpus)


main(2, True)
""")
    (line,) = (finding.line for finding in result.reported if "take themselves for rank 0" in finding.message)
    assert line == 17


PACKAGES = {
    "a function": ("from timm.utils import reduce_tensor", "reduce_tensor(loss, 2)"),
    "of a module": ("import timm.utils", "timm.utils.distribute_bn(model, 2, True)"),
    "a loader": ("from timm.data import create_loader", "create_loader(data, 4, distributed=True)"),
    "a metric": ("import torchmetrics", "torchmetrics.Accuracy()(out, y)"),
}
ALONE = "import torch\n\nmodel = torch.nn.Linear(4, 1)\nopt = torch.optim.SGD(model.parameters(), 0.1)\n"
STEPS = "for x in torch.utils.data.DataLoader(data, batch_size=4):\n    model(x).mean().backward()\n    opt.step()\n"


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_find_the_process_group_that_the_script_made(tmp_path: Path, name: str) -> None:
    imported, call = PACKAGES[name]
    main = MAIN.format(seed="").replace("import comm", imported).replace("comm.everybodys(loss)", call)
    after, _, _ = converted(tmp_path, main, REDUCES)
    assert "bmt.init_distributed()\nbmt.distributed.register_process_group()\n" in after


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_of_a_script_without_one_go_on_without(tmp_path: Path, name: str) -> None:
    imported, call = PACKAGES[name]
    after, _, _ = converted(tmp_path, f"{imported}\n{ALONE}{STEPS}    print({call})\n", REDUCES)
    assert "register_process_group" not in after
