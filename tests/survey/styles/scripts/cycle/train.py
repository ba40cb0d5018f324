import os
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset


def infinite(dl):
    while True:
        for d in dl:
            yield d


def exists(x):
    return x is not None


class D(Dataset):
    def __init__(self):
        self.x = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return self.x[i]


class Auto(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)
        self.b = nn.Linear(3, 6)

    def forward(self, x):
        return ((self.b(torch.relu(self.a(x))) - x) ** 2).mean()


class Trainer(object):
    def __init__(self, model, *, train_batch_size=12, lr=1e-2, steps=8, accum=2, save_every=4, results="./results"):
        super().__init__()
        self.model = model
        self.ds = D()
        self.dl = infinite(DataLoader(self.ds, batch_size=train_batch_size, shuffle=True))
        self.opt = Adam(model.parameters(), lr=lr)
        self.ema = type(model)()
        self.ema.load_state_dict(model.state_dict())
        self.step, self.steps, self.accum, self.save_every = 0, steps, accum, save_every
        self.results = Path(results)
        self.results.mkdir(exist_ok=True)

    def save(self, m):
        torch.save({"step": self.step, "model": self.model.state_dict(), "opt": self.opt.state_dict(), "ema": self.ema.state_dict()}, str(self.results / f"model-{m}.pt"))

    def load(self, m):
        data = torch.load(str(self.results / f"model-{m}.pt"))
        self.model.load_state_dict(data["model"])
        self.step = data["step"]
        self.opt.load_state_dict(data["opt"])
        self.ema.load_state_dict(data["ema"])

    def update_ema(self, beta=0.9):
        for cur, ma in zip(self.model.parameters(), self.ema.parameters()):
            old, up = ma.data, cur.data
            ma.data = old * beta + (1 - beta) * up

    def train(self):
        while self.step < self.steps:
            total = 0.0
            for _ in range(self.accum):
                data = next(self.dl)
                loss = self.model(data)
                loss = loss / self.accum
                total += loss.item()
                loss.backward()
            print(f"{self.step}: {total:.4f}")
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.opt.step()
            self.opt.zero_grad()
            self.step += 1
            self.update_ema()
            if self.step != 0 and self.step % self.save_every == 0:
                self.ema.eval()
                with torch.inference_mode():
                    milestone = self.step // self.save_every
                    print("ema", round(self.ema(self.ds.x).item(), 5))
                self.save(milestone)
        print("training complete")


torch.manual_seed(4)
t = Trainer(Auto())
t.train()
t2 = Trainer(Auto(), steps=12)
t2.load(2)
t2.train()
