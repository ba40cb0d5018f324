import json
import math
import os
import pickle
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

out_dir = "out"
eval_interval = 5
eval_iters = 4
batch_size = 12
block_size = 16
grad_accum = 2
max_iters = 15
lr = 1e-2
warmup = 3
device = "cpu"


@dataclass
class Config:
    vocab: int = 32
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16
    block: int = 16


class Attn(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.proj = nn.Linear(c.n_embd, c.n_embd)
        self.h = c.n_head

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.h, C // self.h).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.attn = Attn(c)
        self.mlp = nn.Sequential(nn.Linear(c.n_embd, 4 * c.n_embd), nn.GELU(), nn.Linear(4 * c.n_embd, c.n_embd))

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class LM(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.tr = nn.ModuleDict(dict(wte=nn.Embedding(c.vocab, c.n_embd), wpe=nn.Embedding(c.block, c.n_embd),
                                     h=nn.ModuleList([Block(c) for _ in range(c.n_layer)]), ln=nn.LayerNorm(c.n_embd)))
        self.head = nn.Linear(c.n_embd, c.vocab, bias=False)
        self.tr.wte.weight = self.head.weight
        self.apply(self._init)
        for n, p in self.named_parameters():
            if n.endswith("proj.weight"):
                torch.nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * c.n_layer))

    def _init(self, m):
        if isinstance(m, nn.Linear):
            torch.nn.init.normal_(m.weight, std=0.02)
            if m.bias is not None:
                torch.nn.init.zeros_(m.bias)

    def n_params(self):
        return sum(p.numel() for p in self.parameters()) - self.tr.wpe.weight.numel()

    def forward(self, idx, targets=None):
        x = self.tr.wte(idx) + self.tr.wpe(torch.arange(idx.size(1), device=idx.device))
        for b in self.tr.h:
            x = b(x)
        logits = self.head(self.tr.ln(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss

    def configure(self, wd, lr):
        d = {n: p for n, p in self.named_parameters() if p.requires_grad}
        groups = [{"params": [p for p in d.values() if p.dim() >= 2], "weight_decay": wd},
                  {"params": [p for p in d.values() if p.dim() < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0):
        for _ in range(n):
            logits, _ = self(idx[:, -self.c.block:])
            p = F.softmax(logits[:, -1] / temperature, dim=-1)
            idx = torch.cat((idx, torch.multinomial(p, 1)), 1)
        return idx


torch.manual_seed(1337)
rng = np.random.default_rng(0)
data = (np.cumsum(rng.integers(0, 3, 4000)) % 32).astype(np.int64)
os.makedirs(out_dir, exist_ok=True)
ctx = nullcontext()


def get_batch(split):
    d = data[:3500] if split == "train" else data[3500:]
    ix = torch.randint(len(d) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(d[i:i + block_size]) for i in ix])
    y = torch.stack([torch.from_numpy(d[i + 1:i + 1 + block_size]) for i in ix])
    return x.to(device), y.to(device)


model = LM(Config())
print(f"parameters {model.n_params()}")
optimizer = model.configure(0.1, lr)
scaler = torch.amp.GradScaler("cuda", enabled=False)


@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ["train", "val"]:
        losses = torch.zeros(eval_iters)
        for k in range(eval_iters):
            X, Y = get_batch(split)
            with ctx:
                logits, loss = model(X, Y)
            losses[k] = loss.item()
        out[split] = losses.mean()
    model.train()
    return out


def get_lr(it):
    return lr * (it + 1) / warmup if it < warmup else lr * 0.5 * (1 + math.cos(math.pi * (it - warmup) / (max_iters - warmup)))


X, Y = get_batch("train")
best = 1e9
t0 = time.time()
it = 0
log = []
while True:
    for g in optimizer.param_groups:
        g["lr"] = get_lr(it)
    if it % eval_interval == 0:
        losses = estimate_loss()
        print(f"step {it}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if losses["val"] < best:
            best = losses["val"]
            if it > 0:
                print("saving checkpoint")
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter": it, "best": best}, os.path.join(out_dir, "ckpt.pt"))
    for micro in range(grad_accum):
        with ctx:
            logits, loss = model(X, Y)
            loss = loss / grad_accum
        X, Y = get_batch("train")
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    lossf = loss.item() * grad_accum
    log.append(lossf)
    print(f"iter {it}: loss {lossf:.4f}")
    it += 1
    if it > max_iters:
        break
with open(os.path.join(out_dir, "meta.pkl"), "wb") as f:
    pickle.dump({"best": float(best), "log": log}, f)
json.dump({"iters": it}, open(os.path.join(out_dir, "done.json"), "w"))
