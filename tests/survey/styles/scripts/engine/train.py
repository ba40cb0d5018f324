import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, RandomSampler, SequentialSampler

from engine import evaluate, train_one_epoch
import misc


def get_args_parser():
    p = argparse.ArgumentParser("train", add_help=False)
    p.add_argument("--batch_size", default=8, type=int)
    p.add_argument("--epochs", default=2, type=int)
    p.add_argument("--output_dir", default="out")
    p.add_argument("--clip", default=0.5, type=float)
    return p


def main(args):
    misc.init(args)
    torch.manual_seed(0)
    x = torch.randn(58, 4)
    y = (x.sum(1) > 0).long()
    tr, va = TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])
    data_loader_train = DataLoader(tr, sampler=RandomSampler(tr), batch_size=args.batch_size, drop_last=True)
    data_loader_val = DataLoader(va, sampler=SequentialSampler(va), batch_size=4, drop_last=False)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print("number of params: %d" % n_parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    criterion = nn.CrossEntropyLoss()
    best = 0.0
    for epoch in range(args.epochs):
        train_stats = train_one_epoch(model, criterion, data_loader_train, optimizer, epoch, args)
        test_stats = evaluate(data_loader_val, model)
        if args.output_dir:
            misc.save_on_master({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "args": args}, Path(args.output_dir) / "checkpoint.pth")
        best = max(best, test_stats["acc1"])
        log_stats = {**{f"train_{k}": v for k, v in train_stats.items()}, **{f"test_{k}": v for k, v in test_stats.items()}, "epoch": epoch, "n_parameters": n_parameters}
        if args.output_dir and misc.is_main_process():
            with open(Path(args.output_dir) / "log.txt", mode="a", encoding="utf-8") as f:
                f.write(json.dumps(log_stats) + "\n")
        print(f"Max accuracy: {best:.2f}%")


if __name__ == "__main__":
    args = get_args_parser().parse_args()
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    main(args)
