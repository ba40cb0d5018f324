"""What the same user would write instead: DDP, or FSDP2 block by block with bf16 compute and fp32 reduction."""

import argparse
import json
import os
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gpt import GPT, SIZES

parser = argparse.ArgumentParser()
parser.add_argument("engine", choices=["ddp", "fsdp2"])
parser.add_argument("--size", default="124m", choices=SIZES)
parser.add_argument("--batch", type=int, default=8, help="sequences of a backward, of all GPUs together")
parser.add_argument("--accum", type=int, default=1)
parser.add_argument("--length", type=int, default=1024)
parser.add_argument("--steps", type=int, default=16)
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()

rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
else:
    dist.init_process_group("gloo")
torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
layers, width, heads, vocabulary = SIZES[args.size]
model = GPT(layers, width, heads, vocabulary, args.length).to(device)
if args.compile:
    for block in model.h:
        block.compile()
if args.engine == "fsdp2":
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device, (world,))
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
else:
    ids = [local] if device == "cuda" else None
    model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
decay = [p for p in model.parameters() if p.dim() >= 2]
rest = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=(device == "cuda"))
tokens = torch.randint(0, vocabulary, (args.steps * args.accum * args.batch, args.length + 1))
data = TensorDataset(tokens)
batches = iter(DataLoader(data, args.batch // world, sampler=DistributedSampler(data, shuffle=False), drop_last=True))
times, losses = [], []
for _ in range(args.steps):
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for micro in range(args.accum):
        (batch,) = next(batches)
        batch = batch.to(device)
        last = micro == args.accum - 1
        with model.no_sync() if args.engine == "ddp" and not last else nullcontext():
            if args.engine == "fsdp2":
                model.set_requires_gradient_sync(last)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(batch[:, :-1], batch[:, 1:]) / args.accum
            loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - begin)
    mean = loss.detach().float().clone()
    dist.all_reduce(mean)
    losses.append(mean.item() / world * args.accum)
gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
if rank == 0:
    print("RESULT", json.dumps({"seconds": times, "gib": gib, "losses": losses}))
dist.destroy_process_group()
