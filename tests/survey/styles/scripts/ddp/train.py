import os
import random

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


class DS(Dataset):
    def __init__(self, n):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 4, generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.x[i].sum().unsqueeze(0)


class Trainer:
    def __init__(self, model, train_data, val_data, optimizer, save_every, path):
        self.rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.train_data, self.val_data, self.optimizer = train_data, val_data, optimizer
        self.save_every, self.epochs_run, self.path = save_every, 0, path
        self.model = model
        if os.path.exists(path):
            self._load(path)
        self.model = DDP(self.model)

    def _load(self, path):
        snap = torch.load(path)
        self.model.load_state_dict(snap["MODEL_STATE"])
        self.epochs_run = snap["EPOCHS_RUN"]
        print(f"Resuming at epoch {self.epochs_run}")

    def _batch(self, s, t):
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(s), t)
        loss.backward()
        self.optimizer.step()
        return loss

    def _epoch(self, e):
        self.train_data.sampler.set_epoch(e)
        total = torch.zeros(1)
        for s, t in self.train_data:
            total += self._batch(s, t).detach()
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        if self.rank == 0:
            print(f"epoch {e} loss {total.item() / self.world / len(self.train_data):.4f}")

    @torch.no_grad()
    def _eval(self):
        self.model.eval()
        err = torch.zeros(2)
        for s, t in self.val_data:
            err[0] += (self.model(s) - t).abs().sum()
            err[1] += len(s)
        dist.all_reduce(err)
        gathered = [torch.zeros(2) for _ in range(self.world)]
        dist.all_gather(gathered, err)
        self.model.train()
        return (gathered[0][0] / gathered[0][1]).item()

    def _save(self, e):
        torch.save({"MODEL_STATE": self.model.module.state_dict(), "EPOCHS_RUN": e + 1}, self.path)

    def train(self, n):
        for e in range(self.epochs_run, n):
            self._epoch(e)
            mae = self._eval()
            if self.rank == 0:
                print(f"mae {mae:.4f}")
            if self.rank == 0 and e % self.save_every == 0:
                self._save(e)
            dist.barrier()


def main():
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29777")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    dist.init_process_group(backend="gloo")
    torch.manual_seed(0)
    w = dist.get_world_size()
    ds, val = DS(48), DS(12)
    model = nn.Linear(4, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    train = DataLoader(ds, batch_size=12 // w, shuffle=False, sampler=DistributedSampler(ds, shuffle=False))
    vl = DataLoader(val, batch_size=3, shuffle=False, sampler=DistributedSampler(val, shuffle=False))
    Trainer(model, train, vl, opt, 2, "snapshot.pt").train(4)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
