"""Models for the tests, written once and built twice: with torch's own names, and with what conversion puts there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt


@dataclass(frozen=True)
class Names:
    """What a model is made of."""

    Module: Any
    Parameter: Any
    stack: Callable[[Iterable[nn.Module]], nn.ModuleList]
    block: Callable[[nn.Module], nn.Module]


def plain() -> Names:
    """Torch's own names: the reference."""
    return Names(nn.Module, nn.Parameter, nn.ModuleList, lambda module: module)


def sharded(recompute: bool = True, zero_level: int = 3) -> Names:
    """What conversion puts in their place."""

    def block(module: nn.Module) -> nn.Module:
        made: nn.Module = bmt.Block(module, use_checkpoint=recompute, zero_level=zero_level)
        return made

    def stack(modules: Iterable[nn.Module]) -> nn.ModuleList:
        return bmt.TransformerBlockList([block(m) for m in modules])

    return Names(bmt.DistributedModule, bmt.DistributedParameter, stack, block)


# ---- the example's architecture
# -----------------------------------------------------------------------------------------------------


def gpt(names: Names, layers: int = 3, width: int = 16, heads: int = 2, vocabulary: int = 31, length: int = 8) -> Any:
    """The architecture and the initialisation of examples/plain_gpt."""

    class Attention(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(width, 3 * width)
            self.c_proj = nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, time, _ = x.shape
            q, k, v = self.c_attn(x).view(batch, time, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]

    class Mlp(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.c_fc = nn.Linear(width, 4 * width)
            self.c_proj = nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c_proj(F.gelu(self.c_fc(x)))  # type: ignore[no-any-return]

    class Layer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.attn = nn.LayerNorm(width), Attention()
            self.ln_2, self.mlp = nn.LayerNorm(width), Mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]

    class Gpt(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.ModuleDict(
                {
                    "wte": nn.Embedding(vocabulary, width),
                    "wpe": nn.Embedding(length, width),
                    "h": names.stack([Layer() for _ in range(layers)]),
                    "ln_f": nn.LayerNorm(width),
                }
            )
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
            self.transformer.wte.weight = self.lm_head.weight
            self.apply(self._init_weights)
            for name, p in self.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.normal_(p, mean=0.0, std=0.1 / math.sqrt(2 * layers))

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.1)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            x = self.transformer.wte(tokens) + self.transformer.wpe(positions)
            for block in self.transformer.h:
                x = block(x)
            return self.lm_head(self.transformer.ln_f(x))  # type: ignore[no-any-return]

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = self.logits(tokens)
            return F.cross_entropy(logits.view(-1, vocabulary).float(), targets.reshape(-1))

    return Gpt()


# ---- awkward shapes and uses
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    """What a block of the awkward model returns."""

    x: torch.Tensor
    aux: dict[str, torch.Tensor]


def awkward(names: Names) -> Any:
    """Odd sizes, parameters smaller than the world, tied and shared ones, frozen ones, mixed dtypes, nested blocks."""
    width, vocabulary = 5, 7

    class Inner(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(width, 3, bias=False)
            self.one = names.Parameter(torch.tensor([0.3]))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": torch.tanh(self.lin(x)) * self.one}

    class Outer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self, shared: torch.Tensor | None) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.inner = names.block(Inner())
            self.out = nn.Linear(3, width)
            self.out.bias.requires_grad_(False)
            self.scalar = names.Parameter(torch.tensor(0.7))
            self.precise = names.Parameter(torch.linspace(0.5, 1.5, width, dtype=torch.float64))
            self.register_buffer("offset", torch.linspace(-1, 1, width))
            self.register_buffer("unsaved", torch.full((1,), 0.25), persistent=False)
            if shared is not None:
                self.shared = shared

        def forward(self, x: torch.Tensor, skip: int | None = None, *, gain: float, **extra: torch.Tensor) -> Output:
            h = self.inner(self.norm(x))["y"]
            y = self.out(h) * self.scalar * self.precise.to(x.dtype) + self.offset * self.unsaved
            if hasattr(self, "shared"):
                y = y + x @ self.shared
            if "bias" in extra:
                y = y + extra["bias"]
            return Output(x + gain * y, {"square": y.square().mean() + self.scalar})

    class Awkward(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(vocabulary, width)
            shared = names.Parameter(torch.randn(width, width) * 0.3)
            self.blocks = names.stack([Outer(shared), Outer(None), Outer(shared)])
            for p in self.blocks[0].inner.parameters():
                p.requires_grad_(False)
            for p in self.blocks[1].parameters():
                p.requires_grad_(False)
            self.temperature = names.Parameter(torch.tensor(1.0))
            self.frozen = names.Parameter(torch.randn(width) * 0.1, requires_grad=False)
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.emb(tokens) + self.frozen
            aux: Any = 0.0
            for number, block in enumerate(self.blocks):
                extra = {"bias": self.frozen} if number % 2 else {}
                out = block(x, gain=0.5, **extra)
                x, aux = out.x, aux + out.aux["square"]
            logits = self.head(x) * self.temperature
            return F.cross_entropy(logits.view(-1, vocabulary).float(), targets.reshape(-1)) + 0.1 * aux

    return Awkward()


BUILDERS: dict[str, Callable[[Names], Any]] = {"gpt": gpt, "awkward": awkward}
VOCABULARY = {"gpt": 31, "awkward": 7}


def build(model: str, names: Names, seed: int = 3) -> Any:
    """The model with this name, from this seed."""
    torch.manual_seed(seed)
    return BUILDERS[model](names)


def batch(model: str, step: int, size: int = 12, length: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """(size, length) tokens and targets of one global batch, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    data = torch.randint(VOCABULARY[model], (size, length + 1), generator=generator)
    return data[:, :-1], data[:, 1:]


def share(tensor: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """This rank's equal part of a global batch."""
    return tensor.chunk(bmt.world_size())[bmt.rank()].to(device or torch.get_default_device())


def tied(module: Any) -> Any:
    """A cycle, so that reference counts do not tell when it is gone."""
    module.__dict__["itself"] = [module]
    return module
