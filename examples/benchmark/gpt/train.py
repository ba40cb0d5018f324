"""An ordinary training script for one GPU: autocast, fused AdamW, clipping, accumulation.

Prints, as JSON, what a step took and the losses.
"""

import argparse
import json
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from gpt import GPT, SIZES

parser = argparse.ArgumentParser()
parser.add_argument("--size", default="124m", choices=SIZES)
parser.add_argument("--batch", type=int, default=8, help="sequences of a backward, of all GPUs together")
parser.add_argument("--accum", type=int, default=1)
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--steps", type=int, default=16)
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_float32_matmul_precision("high")
layers, width, heads, vocabulary = SIZES[args.size]
model = GPT(layers, width, heads, vocabulary, args.length).to(device)
decay = [p for p in model.parameters() if p.dim() >= 2]
rest = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=(device == "cuda"))
if args.compile:
    model = torch.compile(model)
tokens = torch.randint(0, vocabulary, (args.steps * args.accum * args.batch, args.length + 1))
loader = DataLoader(TensorDataset(tokens), batch_size=args.batch, shuffle=False, drop_last=True)
batches = iter(loader)
times, losses = [], []
for _ in range(args.steps):
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    total = 0.0
    for _ in range(args.accum):
        (batch,) = next(batches)
        batch = batch.to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(batch[:, :-1], batch[:, 1:]) / args.accum
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - begin)
    losses.append(loss.item() * args.accum)
gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
print("RESULT", json.dumps({"seconds": times, "gib": gib, "losses": losses}))
