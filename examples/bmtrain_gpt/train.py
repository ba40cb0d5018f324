"""Train a small GPT on the help texts that every Python ships, byte by byte.

    python train.py --out run
    python train.py --out run --resume
"""

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tqdm import tqdm

from model import GPT, GPTConfig
import bmtrain as bmt


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the checkpoint")
    parser.add_argument("--losses", help="append one JSON line per step to this file")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--stop-after", type=int, help="leave after this step without saving, as a crash would")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--eval-batches", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=12, help="sequences per micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=30, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm; 0 does not clip")
    parser.add_argument("--block-size", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="for autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--local-rank", "--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_text():
    """The help texts as bytes: int64 tensors for training (90%) and validation (10%)."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    data = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()
    split = int(0.9 * len(data))
    return data[:split], data[split:]


def unigram_entropy(data):
    """Nats per byte of a model that knows only how frequent each byte is."""
    frequency = torch.bincount(data).double() / len(data)
    return torch.special.entr(frequency).sum().item()


def get_batch(data, options, generator):
    starts = bmt.shard_batch(torch.randint(len(data) - options.block_size, (options.batch_size,), generator=generator))
    x = torch.stack([data[i : i + options.block_size] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + options.block_size] for i in starts])
    return x.to(options.device), y.to(options.device)


@torch.no_grad()
def estimate_loss(model, data, options, autocast):
    """Mean loss over the same `eval_batches` random batches at every call."""
    generator = torch.Generator().manual_seed(options.seed)
    losses = torch.zeros(options.eval_batches)
    model.eval()
    for i in range(options.eval_batches):
        x, y = get_batch(data, options, generator)
        with autocast:
            _, loss = model(x, y)
        losses[i] = bmt.sum_loss(loss).item()
    model.train()
    return losses.mean().item()


def learning_rate(step, options):
    """Linear warm-up, then a cosine down to a tenth."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def main():
    options = parse_options()
    bmt.init_distributed(seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint_path = options.out / "checkpoint.pt"

    train_data, val_data = load_text()
    bmt.print_rank(f"{len(train_data):,} bytes to train on, unigram entropy {unigram_entropy(train_data):.3f} nats per byte")

    config = GPTConfig(
        block_size=options.block_size,
        n_layer=options.n_layer,
        n_head=options.n_head,
        n_embd=options.n_embd,
        dropout=options.dropout,
    )
    model = GPT(config)
    model.to(options.device)
    bmt.print_rank(f"{model.count_parameters():,} parameters")

    optimizer = bmt.optim.AdamOptimizer(
        model.parameter_groups(options.weight_decay), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    device_type = torch.device(options.device).type
    autocast = torch.autocast(device_type, getattr(torch, options.dtype), enabled=options.dtype != "float32")
    optim_manager = bmt.optim.OptimManager(loss_scale=2**16 if options.dtype == "float16" else None)
    optim_manager.add_optimizer(optimizer)

    # The batches have a generator of their own, saved with the rest: a resumed run sees the batches that were to come.
    generator = torch.Generator().manual_seed(options.seed)
    start = 0
    if options.resume:
        checkpoint = torch.load(checkpoint_path, map_location="cpu")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        generator.set_state(checkpoint["generator"])
        start = checkpoint["step"]
        bmt.print_rank(f"resumed at step {start}")

    with open(options.losses or os.devnull if bmt.rank() == 0 else os.devnull, "a") as losses:
        progress = tqdm(range(start, options.steps), initial=start, total=options.steps, mininterval=1.0, disable=bmt.rank() != 0)
        for step in progress:
            lr = learning_rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = lr

            step_loss = 0.0
            for _ in range(options.accumulate):
                x, y = get_batch(train_data, options, generator)
                with autocast:
                    _, loss = model(x, y)
                    loss = loss / options.accumulate
                optim_manager.backward(loss)
                step_loss += bmt.sum_loss(loss).item()

            if options.grad_clip > 0:
                optim_manager.clip_grad_norm(optimizer.param_groups, options.grad_clip)
            optim_manager.step()
            optim_manager.zero_grad()

            bmt.print_rank(json.dumps({"step": step, "loss": step_loss, "lr": lr}), file=losses, flush=True)
            progress.set_postfix(loss=f"{step_loss:.3f}", refresh=False)

            done = step + 1
            if options.stop_after == done:
                bmt.print_rank(f"stopped after step {done}, nothing saved")
                return
            if done % options.eval_every == 0 or done == options.steps:
                train_loss = estimate_loss(model, train_data, options, autocast)
                val_loss = estimate_loss(model, val_data, options, autocast)
                bmt.print_rank(f"\nstep {done}: training loss {train_loss:.4f}, validation loss {val_loss:.4f}")
            if done % options.save_every == 0 or done == options.steps:
                checkpoint = {
                    "config": asdict(config),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "step": done,
                }
                bmt.save_checkpoint(checkpoint, checkpoint_path)


if __name__ == "__main__":
    main()
