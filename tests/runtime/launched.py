"""A script that test_launch.py starts in every way a user may: trains a little and writes what it saw."""

import argparse
import json
import os

import torch

import bmtrain as bmt


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--local-rank", "--local_rank", type=int, default=None)
    args = parser.parse_args()
    bmt.init_distributed(seed=3, device="cpu")
    model = bmt.BMTrainModelWrapper(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2))
    losses = []
    for _ in range(5):
        x = bmt.shard_batch(torch.randn(8, 6))
        loss = model(x).square().mean()
        manager.zero_grad()
        manager.backward(loss)
        manager.step()
        losses.append(float(bmt.sum_loss(loss)))
    seen = {
        "rank": bmt.rank(), "world_size": bmt.world_size(), "losses": losses, "local_rank": args.local_rank,
        "environment": os.environ.get("LOCAL_RANK"),
    }  # fmt: skip
    with open(os.path.join(args.out, f"{bmt.rank()}.json"), "w") as file:
        json.dump(seen, file)
    bmt.synchronize()


if __name__ == "__main__":
    main()
