import json
import os
from collections import defaultdict
from datetime import datetime

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm


class Config:
    lr = 0.05
    epochs = 3
    bs = 8
    out = "exp"


class Words(Dataset):
    def __init__(self, n=60):
        g = torch.Generator().manual_seed(2)
        self.lens = torch.randint(3, 8, (n,), generator=g)
        self.data = [torch.randint(1, 9, (int(l),), generator=g) for l in self.lens]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


def collate(batch):
    x = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=0)
    return {"input": x[:, :-1], "target": x[:, 1:], "n": (x[:, 1:] != 0).sum()}


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(9, 8, padding_idx=0)
        self.r = nn.GRU(8, 8, batch_first=True)
        self.o = nn.Linear(8, 9)

    def forward(self, x):
        return self.o(self.r(self.e(x))[0])


class Runner:
    def __init__(self, cfg):
        self.cfg = cfg
        ds = Words()
        self.loaders = {
            "train": DataLoader(Subset(ds, range(48)), cfg.bs, shuffle=True, collate_fn=collate),
            "valid": DataLoader(Subset(ds, range(48, 60)), cfg.bs, collate_fn=collate),
        }
        self.net = LM()
        self.optim = torch.optim.Adam(self.net.parameters(), cfg.lr)
        self.loss_fn = nn.CrossEntropyLoss(ignore_index=0)
        self.metrics = defaultdict(list)
        if not os.path.exists(cfg.out):
            os.makedirs(cfg.out)

    def step(self, batch, train):
        logits = self.net(batch["input"])
        loss = self.loss_fn(logits.transpose(1, 2), batch["target"])
        if train:
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
        mask = batch["target"] != 0
        acc = ((logits.argmax(-1) == batch["target"]) & mask).sum() / mask.sum()
        return {"loss": loss.item(), "acc": acc.item(), "tokens": int(batch["n"])}

    def run(self, name):
        train = name == "train"
        self.net.train(train)
        total = defaultdict(float)
        bar = tqdm(self.loaders[name], desc=name)
        for i, batch in enumerate(bar):
            with torch.set_grad_enabled(train):
                m = self.step(batch, train)
            for k, v in m.items():
                total[k] += v
            bar.set_postfix(loss=m["loss"])
        n = i + 1
        out = {k: (v if k == "tokens" else v / n) for k, v in total.items()}
        for k, v in out.items():
            self.metrics[f"{name}/{k}"].append(v)
        return out

    def fit(self):
        best = float("inf")
        for ep in range(self.cfg.epochs):
            a, b = self.run("train"), self.run("valid")
            print(f"{ep} | train {a['loss']:.4f} {a['acc']:.3f} {a['tokens']:.0f} | valid {b['loss']:.4f} {b['acc']:.3f}")
            if b["loss"] < best:
                best = b["loss"]
                torch.save({"net": self.net.state_dict(), "opt": self.optim.state_dict(), "cfg": vars(Config)["lr"]}, os.path.join(self.cfg.out, "best.pth"))
        with open(os.path.join(self.cfg.out, "metrics.json"), "w") as f:
            json.dump(self.metrics, f)


if __name__ == "__main__":
    torch.manual_seed(5)
    Runner(Config()).fit()
