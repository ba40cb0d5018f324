import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from engine import Trainer
from model import Net


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--out", default="results")
    args = p.parse_args()
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(68, 6, generator=g)
    y = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
    train = DataLoader(TensorDataset(x[:48], y[:48]), batch_size=args.batch_size, shuffle=True)
    val = DataLoader(TensorDataset(x[48:], y[48:]), batch_size=args.batch_size)
    net = Net(6, 16, 3)
    opt = optim.Adam(net.parameters(), lr=1e-2)
    sched = optim.lr_scheduler.ReduceLROnPlateau(opt, patience=1)
    t = Trainer(net, opt, sched, nn.CrossEntropyLoss(), args.out)
    t.fit(train, val, args.epochs)
    cm = t.confusion(val, 3)
    np.save(Path(args.out) / "cm.npy", cm)
    with open(Path(args.out) / "history.csv", "w", newline="") as f:
        w = csv.DictWriter(f, fieldnames=["epoch", "train_loss", "train_acc", "val_loss", "val_acc"])
        w.writeheader()
        for row in t.history:
            w.writerow(row)
    (Path(args.out) / "summary.json").write_text(json.dumps({"best": t.best, "epochs": args.epochs}))


if __name__ == "__main__":
    main()
