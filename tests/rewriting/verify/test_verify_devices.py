"""Models of several kinds, converted and verified on two ranks: over gloo, and over NCCL where there are GPUs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter.verify.report import table
from rewriter.verify.run import Settings, verify

EXAMPLES = Path(__file__).parents[3] / "examples"

MODELS = '''import random

import torch
from torch import nn
from torch.nn import functional as F


class Picture(nn.Module):
    """Convolutions, running statistics, stages of different widths."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.ModuleList([
            nn.Sequential(nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.BatchNorm2d(2 * w), nn.ReLU())
            for w in (8, 16)
        ])
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        seen = []
        for stage in self.stages:
            x = stage(x)
            seen.append(x)
        return {"logits": self.head(x.mean((2, 3))), "seen": seen}


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Routed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, 3)
        self.experts = nn.ModuleList([Expert(width) for _ in range(3)])

    def forward(self, x, scale=1.0):
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            out[mask] = expert(x[mask]) * weights[mask].unsqueeze(-1)
        return x + scale * out


class Mixture(nn.Module):
    """Experts, layer drop, tied embeddings."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Routed(8) for _ in range(3)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        for layer in self.layers:
            if self.training and random.random() < 0.3:
                continue
            x = layer(x, scale=0.5)
        return self.head(x)


class Decoder(nn.Module):
    """Pairs of attention and feed-forward, used twice; two inputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(2):
            self.layers.append(nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True), Expert(8)]))
        self.drop = nn.Dropout(0.1)

    def forward(self, x, memory):
        for _ in range(2):
            for attention, ff in self.layers:
                x = x + self.drop(attention(x, memory, memory, need_weights=False)[0])
                x = x + self.drop(ff(x))
        return x


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        out, state = self.rnn(x)
        return self.head(out), state


def picture(): return Picture(), (torch.randn(4, 3, 8, 8),)
def mixture(): return Mixture(), (torch.randint(11, (4, 6)),)
def decoder(): return Decoder(), (torch.randn(4, 5, 8), torch.randn(4, 7, 8))
def sound(): return Sound(), (torch.randn(4, 5, 4),)
'''


def gpt() -> tuple[Any, ...]:
    """examples/plain_gpt or examples/bmtrain_gpt, whichever is on the path."""
    model = importlib.import_module("model")
    config = model.GPTConfig(vocab_size=17, block_size=8, n_layer=3, n_head=2, n_embd=16, dropout=0.1)
    return model.GPT(config), (torch.randint(17, (4, 8)), torch.randint(17, (4, 8)))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
            ],
        ),
    ],
)
@pytest.mark.parametrize(
    "factory", ["gpt", *(pytest.param(f, marks=pytest.mark.long) for f in ("picture", "mixture", "decoder", "sound"))]
)
def test_two_ranks(factory: str, device: str, tmp_path: Path) -> None:
    original, converted, module = EXAMPLES / "plain_gpt", EXAMPLES / "bmtrain_gpt", __name__
    if factory != "gpt":
        pytest.importorskip("libcst")
        from ..helpers import converted as convert

        original, converted, module = tmp_path / "original", tmp_path / "converted", "model"
        for folder, text in ((original, MODELS), (converted, convert(MODELS))):
            folder.mkdir()
            (folder / "model.py").write_text(text)
    report = verify(Settings(original, converted, f"{module}:{factory}", (2,), device=device, timeout=120))
    assert report.held, "\n".join(table(report))
