"""The workload of every engine: a Llama-style decoder in ordinary PyTorch, which knows of none of them.

Shapes: tokens and targets (B, T) int64 -> loss (), the mean cross-entropy in nats per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    layers: int
    dim: int
    heads: int
    hidden: int  # width inside the feed-forward part
    vocab: int = 32000


SIZES = {
    "nano": Config(2, 64, 2, 176, vocab=512),  # small enough to try the benchmark itself on a CPU
    "tiny": Config(4, 256, 4, 688),
    "1.3b": Config(24, 2048, 16, 5504),
    "3b": Config(26, 3072, 24, 8192),
    "7b": Config(32, 4096, 32, 11008),
    "13b": Config(40, 5120, 40, 13824),
}


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.out = nn.Linear(c.dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).unbind(2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate = nn.Linear(c.dim, c.hidden, bias=False)
        self.up = nn.Linear(c.dim, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.dim)
        self.attention = Attention(c)
        self.feed_forward_norm = nn.RMSNorm(c.dim)
        self.feed_forward = FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab, c.dim)
        self.blocks = nn.ModuleList([Block(c) for _ in range(c.layers)])
        self.norm = nn.RMSNorm(c.dim)
        self.head = nn.Linear(c.dim, c.vocab, bias=False)
        self.numbers = {module: number for number, module in enumerate(self.modules())}

    def first_weight(self, module: nn.Module, device: torch.device) -> Tensor | None:
        """What `module.weight` begins with, the same whoever asks, and in whatever order; fp32.

        Values that bf16 holds, so that a model in bf16 begins with the masters of one in fp32.
        """
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Embedding):
            generator = torch.Generator(device).manual_seed(self.numbers[module])
            drawn = torch.empty(weight.shape, device=device).normal_(std=0.02, generator=generator)
            return drawn.bfloat16().float()
        return torch.ones(weight.shape, device=device) if isinstance(module, nn.RMSNorm) else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.RMSNorm):
            module.weight.copy_(self.first_weight(module, module.weight.device))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = rotations(tokens.shape[1], self.config.dim // self.config.heads, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.view(-1))


def rotations(T: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each (T, 1, head_dim / 2), in the type and on the device of `like`."""
    position = torch.arange(T, device=like.device, dtype=torch.float32)
    frequency = 10000 ** (-torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim)
    angle = torch.outer(position, frequency)[:, None, :]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def count_parameters(c: Config) -> int:
    return c.layers * (4 * c.dim**2 + 3 * c.dim * c.hidden + 2 * c.dim) + 2 * c.vocab * c.dim + c.dim


FLOPS_FORMULA = "6 x (weights in matrices, without the embedding) + 6 x layers x sequence x dim"


def flops_per_token(c: Config, T: int) -> float:
    """Forward and backward of the model itself; what recomputation repeats is not counted.

    Two for every multiply-add, three passes over every matrix; causal attention does half of two (T x dim) products.
    """
    matrices = c.layers * (4 * c.dim**2 + 3 * c.dim * c.hidden) + c.vocab * c.dim
    return 6 * matrices + 6 * c.layers * T * c.dim
