"""A small training script in which one rank dies, differs or stalls at a chosen point.

    python script.py FAULT PHASE RANK OUT

``OUT`` is a folder: the moment of the fault is written there, and checkpoints.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from datetime import timedelta

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bmtrain as bmt

FAULT, PHASE, RANK, OUT = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
STEPS, FAULTY = 8, int(os.environ.get("FAULTY_STEP", "3"))  # by the sixth, BMTRAIN_GRAPHS=1 has recorded blocks
LIMIT = timedelta(seconds=float(os.environ.get("LIMIT", "600")))
WORKERS = int(os.environ.get("WORKERS", "0"))
SHARD_SIZE, TP_SIZE = int(os.environ.get("SHARD_SIZE", "0")) or None, int(os.environ.get("TP_SIZE", "1"))
step = 0


def wrong(phase: str) -> bool:
    """Whether this rank is to go wrong now; writes down when and where."""
    outside = phase in ("start", "sharding", "end")  # of the loop
    if phase != PHASE or bmt.rank() != RANK or not (outside or step == FAULTY) or os.path.exists(f"{OUT}/fault"):
        return False
    with open(f"{OUT}/fault.part", "w") as file:
        json.dump({"time": time.time(), "pid": os.getpid()}, file)
    os.rename(f"{OUT}/fault.part", f"{OUT}/fault")
    return True


def point(phase: str) -> None:
    """Where a rank may die or stall."""
    if FAULT.startswith("skip") or not wrong(phase):
        return
    if FAULT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif FAULT == "segfault":
        ctypes.string_at(0)
    elif FAULT == "exit":
        os._exit(3)
    elif FAULT == "leave":
        sys.exit(0)
    elif FAULT == "raise":
        raise KeyError("the reason")
    elif FAULT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif FAULT == "sleep":
        time.sleep(float(os.environ.get("SECONDS_ASLEEP", "8")))
    elif FAULT == "other size":
        bmt.sum_loss(bmt.to_device(torch.zeros(3)))
    elif FAULT == "evaluate":
        with torch.no_grad():
            net(bmt.to_device(torch.zeros(2, 8)))
    elif FAULT == "save":
        bmt.save(net, f"{OUT}/alone.pt")
    elif FAULT == "gather":
        with bmt.gathered(net):
            pass
    elif FAULT == "sum":
        bmt.sum_loss(bmt.to_device(torch.zeros(())))
    elif FAULT == "agree":
        bmt.agree(True)
    elif FAULT == "batch":
        next(iter(loader))
    elif FAULT == "barrier":
        bmt.synchronize()
    else:
        raise ValueError(FAULT)


def skips(phase: str) -> bool:
    """Whether this rank leaves something out."""
    return FAULT == "skip" and wrong(phase)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        if TP_SIZE == 1:
            self.linear: nn.Module = nn.Linear(8, 8)
        else:
            self.linear = nn.Sequential(
                bmt.nn.ColumnParallelLinear(8, 8, gather_input=False),
                bmt.nn.RowParallelLinear(8, 8, all_reduce_output=True),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class FaultyCell(Cell):
    """One in which a rank may go wrong; what its code reads changes with every step, so that it is not recorded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        point("forward")
        if x.requires_grad:
            x.register_hook(lambda grad: point("backward"))
        return super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        second = FaultyCell if PHASE in ("forward", "backward") else Cell
        self.cells = nn.ModuleList(bmt.CheckpointBlock(kind()) for kind in (Cell, second, Cell))
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, cell in enumerate(self.cells):
            if number == 1 and skips("block"):
                continue
            x = cell(x)
        return self.head(x)


class Witness:
    """Part of a checkpoint that takes a look while it is written."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        point("writing")
        return Witness, ()


def evaluate() -> None:
    with torch.no_grad():
        for _ in range(3):
            point("evaluation")
            net(bmt.to_device(torch.zeros(2, 8)))


def generate() -> None:
    with torch.no_grad():
        x = bmt.to_device(torch.ones(1, 8))
        for token in range(4):
            point("generate")
            if token == 2 and skips("generate"):
                break
            x = x + net(x)


bmt.init_distributed(
    device=os.environ.get("BMTRAIN_TEST_DEVICE", "cpu"),
    seed=1,
    timeout=bmt.Timeouts(start=LIMIT, step=LIMIT, save=LIMIT),
    shard_size=SHARD_SIZE,
    tp_size=TP_SIZE,
)
point("start")
torch.set_num_threads(1)
whole = Net()
point("sharding")
net = bmt.BMTrainModelWrapper(whole)
if TP_SIZE > 1:
    bmt.init_parameters(net)
manager = bmt.optim.OptimManager()
manager.add_optimizer(bmt.optim.AdamOptimizer(net.parameters(), lr=1e-2))
data = TensorDataset(torch.randn(64, 8))
loader = bmt.shard_loader(DataLoader(data, batch_size=6, shuffle=True, drop_last=True, num_workers=WORKERS))
for step, (batch,) in enumerate(loader):
    if step == STEPS:
        break
    if skips("batch"):
        continue
    loss = net(bmt.to_device(batch)).square().mean()
    manager.zero_grad()
    if not skips("backward"):
        manager.backward(loss)
    point("step")
    if not skips("step"):
        manager.step()
    point("sum_loss")
    bmt.sum_loss(loss)
    if step == FAULTY:
        evaluate()
        generate()
        with bmt.gathered(net):
            point("gathered")
        point("save")
        bmt.save(net, f"{OUT}/model.pt")
        bmt.save_checkpoint({"witness": Witness()}, f"{OUT}/more.pt")
    if skips("rest"):
        break
point("end")
print(f"rank {bmt.rank()} is through", flush=True)
