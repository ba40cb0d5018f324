"""Measure models that do not simply run all their blocks once: what each pattern costs over its own bare compute.

    torchrun --standalone --nproc_per_node=2 examples/benchmark/patterns.py
    torchrun --standalone --nproc_per_node=2 examples/benchmark/patterns.py --size nano --sequence 64    # without a GPU

Each pattern is run as plain PyTorch on every GPU alone, without optimizer, and sharded by bmtrain with AdamW.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import bmtrain as bmt
from model import SIZES, Block, Config, Decoder, rotations

Order = Callable[[int, list[Block]], list[Block]]


class Adapted(nn.Module):
    """A frozen linear layer with a trainable update of low rank."""

    def __init__(self, linear: nn.Linear, rank: int = 16):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


class Float32Norm(nn.RMSNorm):
    """Its weight stays fp32 beside bf16 matrices."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def nothing(model: Decoder) -> None:
    """Leave the model as it is."""


def mix_dtypes(model: Decoder) -> None:
    for block in model.blocks:
        block.attention_norm = Float32Norm(model.config.dim)
        block.feed_forward_norm = Float32Norm(model.config.dim)


def adapt(model: Decoder) -> None:
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = Adapted(block.attention.qkv)
        block.feed_forward.up = Adapted(block.feed_forward.up)


def freeze_half(model: Decoder) -> None:
    model.embed.requires_grad_(False)
    model.blocks[: len(model.blocks) // 2].requires_grad_(False)


@dataclass(frozen=True)
class Pattern:
    name: str
    prepare: Callable[[Decoder], None] = nothing
    order: Order = lambda step, blocks: blocks


PATTERNS = [
    Pattern("every block once"),
    Pattern("fp32 norms in bf16 blocks", mix_dtypes),
    Pattern("frozen, with adapters", adapt),
    Pattern("first half frozen", freeze_half),
    Pattern("every block twice", order=lambda step, blocks: [b for b in blocks for _ in range(2)]),
    Pattern("the stack twice", order=lambda step, blocks: blocks * 2),
    Pattern("every other block skipped", order=lambda step, blocks: blocks[::2]),
    Pattern("half the steps left early", order=lambda step, blocks: blocks[: len(blocks) // (1 + step % 2)]),
]


class Ordered(Decoder):
    """The decoder with its blocks in a pattern's order."""

    def __init__(self, c: Config, order: Order):
        super().__init__(c)
        self.order, self.step = order, 0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = rotations(tokens.shape[1], self.config.dim // self.config.heads, x)
        for block in self.order(self.step, list(self.blocks)):
            x = block(x, cos, sin)
        self.step += 1
        return self.loss(x, targets)


def build(pattern: Pattern, options: argparse.Namespace, device: torch.device) -> Ordered:
    size = SIZES[options.size]
    with device:
        model = Ordered(replace(size, layers=min(size.layers, options.layers)), pattern.order)
        pattern.prepare(model)
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    for module in model.modules():
        if isinstance(module, Float32Norm):
            module.float()
    return model


def alone(pattern: Pattern, options: argparse.Namespace, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """Forward and backward of the plain model."""
    model = build(pattern, options, device)

    def step(tokens: Tensor, targets: Tensor) -> None:
        model(tokens, targets).backward()
        model.zero_grad()

    return step


def sharded(pattern: Pattern, options: argparse.Namespace, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """The same model's step in bmtrain."""
    model = build(pattern, options, device)
    model.blocks = bmt.TransformerBlockList([bmt.Block(b, use_checkpoint=False) for b in model.blocks])
    model = bmt.BMTrainModelWrapper(model)
    optimizer = bmt.optim.AdamOptimizer([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)

    def step(tokens: Tensor, targets: Tensor) -> None:
        manager.zero_grad()
        manager.backward(model(tokens, targets))
        manager.step()

    return step


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(step: Callable[[Tensor, Tensor], None], options: argparse.Namespace, device: torch.device) -> float:
    """Median time of two steps together, halved: some patterns alternate."""
    batch = torch.randint(SIZES[options.size].vocab, (options.batch, options.sequence + 1), device=device)
    tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    seconds = []
    for pair in range(options.warmup + options.steps):
        wait(device)
        begin = time.perf_counter()
        step(tokens, targets)
        step(tokens, targets)
        wait(device)
        if pair >= options.warmup:
            seconds.append(time.perf_counter() - begin)
    return 500 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--layers", type=int, default=12, help="blocks at most")
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="measured pairs of steps; the median counts")
    options = parser.parse_args()
    bmt.init_distributed(seed=0)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    bmt.print_rank(f"{options.size}, {options.layers} blocks at most, {bmt.world_size()} ranks; milliseconds per step")
    bmt.print_rank(f"{'pattern':30}{'compute':>9}{'bmtrain':>9}{'ratio':>7}")
    for pattern in PATTERNS:
        bmt.synchronize()  # the pattern before gives its memory back
        times = [milliseconds(make(pattern, options, device), options, device) for make in (alone, sharded)]
        bmt.print_rank(f"{pattern.name:30}{times[0]:9.1f}{times[1]:9.1f}{times[0] / times[1]:7.3f}")


if __name__ == "__main__":
    main()
