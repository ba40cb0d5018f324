"""Four language models in the published style, which can also be built of plain torch.

Written as model zoos write them: layers of their own with ``init_method``, norms in TorchScript, position biases handed
to every block, parameters of other modules read where they are needed, ``state_dict`` made of ``_save_to_rank0``.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bmtrain as bmt

VOCABULARY, WIDTH, HEADS, INNER, LENGTH, LAYERS = 19, 8, 2, 12, 6, 2

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script  # type: ignore[untyped-decorator]
    def rms_layernorm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        old_dtype = hidden.dtype
        variance = hidden.to(torch.float32).pow(2).mean(dim=-1, keepdim=True)
        hidden = (hidden * torch.rsqrt(variance + eps)).to(old_dtype)
        return hidden * weight

    @torch.jit.script  # type: ignore[untyped-decorator]
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def names(published: bool, dtype: torch.dtype, lora: int = 0) -> SimpleNamespace:
    """What the models are written with, of the library or of torch; ``lora`` is the rank of adapters."""
    if published:
        pipes = bmt.config["pipe_enabled"]
        return SimpleNamespace(
            Module=bmt.DistributedModule, Parameter=bmt.DistributedParameter,
            Block=partial(bmt.Block, mode="PIPE") if pipes else bmt.CheckpointBlock,
            List=bmt.PipelineTransformerBlockList if pipes else bmt.TransformerBlockList,
            whole_state=bmt.store._save_to_rank0, dtype=dtype, lora=lora,
        )  # fmt: skip

    def parameter(data: Tensor, init_method: Any = None) -> nn.Parameter:
        made = nn.Parameter(data)
        made.init = init_method  # type: ignore[attr-defined]
        return made

    class List(nn.ModuleList):
        def forward(self, hidden: Tensor, *args: Any) -> Tensor:
            for block in self:
                hidden = block(hidden, *args)
            return hidden

    return SimpleNamespace(
        Module=nn.Module, Parameter=parameter, Block=lambda module: module, List=List,
        whole_state=nn.Module.state_dict, dtype=dtype, lora=lora,
    )  # fmt: skip


def init_plain(model: nn.Module) -> None:
    """``bmt.init_parameters`` for the model of plain torch."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.init(parameter)  # type: ignore[attr-defined]


def layers_of(lib: SimpleNamespace) -> SimpleNamespace:
    """The layers that the models share."""

    def weight(*shape: int, std: float = 0.3) -> Any:
        return lib.Parameter(
            torch.empty(shape, dtype=lib.dtype),
            init_method=bmt.ParameterInitializer(nn.init.normal_, mean=0.0, std=std),
        )

    def constant(*shape: int, value: float = 0.0) -> Any:
        return lib.Parameter(
            torch.empty(shape, dtype=lib.dtype), init_method=bmt.ParameterInitializer(nn.init.constant_, value)
        )

    class Linear(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
            super().__init__()
            self.weight = weight(dim_out, dim_in)
            self.bias = constant(dim_out) if bias else None
            if lib.lora:
                self.lora_A, self.lora_B = weight(lib.lora, dim_in), constant(dim_out, lib.lora)

        def forward(self, x: Tensor) -> Tensor:
            out = F.linear(x, self.weight, self.bias)
            return out + F.linear(F.linear(x, self.lora_A), self.lora_B) if lib.lora else out

    class Embedding(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = weight(size, WIDTH, std=1.0)

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.weight)

        def projection(self, x: Tensor) -> Tensor:
            return F.linear(x / math.sqrt(WIDTH), self.weight)

    class RMSNorm(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weight = constant(WIDTH, value=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return rms_layernorm(x, self.weight, 1e-6)  # type: ignore[no-any-return]

    class LayerNorm(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = constant(WIDTH, value=1.0), constant(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-6)

    class Attention(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.project_q, self.project_k = Linear(WIDTH, WIDTH, bias), Linear(WIDTH, WIDTH, bias)
            self.project_v, self.attention_out = Linear(WIDTH, WIDTH, bias), Linear(WIDTH, WIDTH, bias)

        def forward(self, query: Tensor, memory: Tensor, mask: Tensor, bias: Any = None, rotary: Any = None) -> Tensor:
            def heads(x: Tensor) -> Tensor:
                return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

            q, k, v = heads(self.project_q(query)), heads(self.project_k(memory)), heads(self.project_v(memory))
            if rotary is not None:
                q, k = rotate(q, *rotary), rotate(k, *rotary)
            score = (q @ k.transpose(-1, -2)).float() / math.sqrt(WIDTH // HEADS)
            score = score if bias is None else score + bias.float()
            score = torch.softmax(score.masked_fill(~mask[:, None], -1e4), dim=-1).to(v.dtype)
            return self.attention_out((score @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    class FeedForward(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self, bias: bool, gated: bool) -> None:
            super().__init__()
            self.w_in, self.w_out = Linear(WIDTH, INNER, bias), Linear(INNER, WIDTH, bias)
            self.w_gate = Linear(WIDTH, INNER, bias) if gated else None

        def forward(self, x: Tensor) -> Tensor:
            inner = self.w_in(x)
            inner = F.gelu(inner) if self.w_gate is None else F.silu(self.w_gate(x)) * inner
            return self.w_out(inner)  # type: ignore[no-any-return]

    class Layer(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self, norm: Any, bias: bool = True, gated: bool = False, crosses: bool = False) -> None:
            super().__init__()
            self.norm_a, self.self_attention = norm(), Attention(bias)
            if crosses:
                self.norm_c, self.cross_attention = norm(), Attention(bias)
            self.norm_f, self.ffn, self.crosses = norm(), FeedForward(bias, gated), crosses

        def forward(self, x: Tensor, mask: Tensor, bias: Any = None, rotary: Any = None, memory: Any = None) -> Tensor:
            normed = self.norm_a(x)
            x = x + self.self_attention(normed, normed, mask, bias, rotary)
            if self.crosses:
                x = x + self.cross_attention(self.norm_c(x), memory, torch.ones_like(mask))
            return x + self.ffn(self.norm_f(x))  # type: ignore[no-any-return]

    class PositionBias(lib.Module):  # type: ignore[misc, name-defined]
        """Relative positions, one bucket for each distance."""

        def __init__(self) -> None:
            super().__init__()
            self.relative_attention_bias = weight(HEADS, 2 * LENGTH)

        def forward(self, length: int) -> Tensor:
            place = torch.arange(length)
            found: Tensor = self.relative_attention_bias[:, place[:, None] - place[None] + LENGTH]
            return found

    def stack(count: int, *args: Any, **kwargs: Any) -> Any:
        return lib.List([lib.Block(Layer(*args, **kwargs)) for _ in range(count)])

    class Base(lib.Module):  # type: ignore[misc, name-defined]
        def state_dict(self) -> Any:
            return lib.whole_state(self)

    return SimpleNamespace(
        Base=Base, Linear=Linear, Embedding=Embedding, RMSNorm=RMSNorm, LayerNorm=LayerNorm,
        PositionBias=PositionBias, stack=stack, constant=constant,
    )  # fmt: skip


def bert(lib: SimpleNamespace) -> Any:
    """Sees both directions; the head's bias, and the embedding's weight, are read in the model's own forward."""
    of = layers_of(lib)

    class Head(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm, self.decoder = of.Linear(WIDTH, WIDTH), of.LayerNorm(), lib.Module()
            self.decoder.bias = of.constant(VOCABULARY)

    class Bert(of.Base):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.input_embedding, self.position_embedding = of.Embedding(VOCABULARY), of.Embedding(LENGTH)
            self.encoder, self.lm_head = of.stack(LAYERS, of.LayerNorm), Head()

        def forward(self, ids: Tensor) -> Tensor:
            x = self.input_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1]))
            x = self.encoder(x, torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool))
            x = self.lm_head.norm(F.gelu(self.lm_head.dense(x)))
            return self.input_embedding.projection(x) + self.lm_head.decoder.bias  # type: ignore[no-any-return]

    return Bert()


def gpt(lib: SimpleNamespace) -> Any:
    """Sees what came before; the projection is tied to the embedding."""
    of = layers_of(lib)

    class GPT(of.Base):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.input_embedding, self.position_embedding = of.Embedding(VOCABULARY), of.Embedding(LENGTH)
            self.encoder, self.output_norm = of.stack(LAYERS, of.LayerNorm), of.LayerNorm()

        def forward(self, ids: Tensor) -> Tensor:
            x = self.input_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
            x = self.encoder(x, causal(ids))
            return self.input_embedding.projection(self.output_norm(x))  # type: ignore[no-any-return]

    return GPT()


def t5(lib: SimpleNamespace) -> Any:
    """Two stacks, norms in TorchScript, position biases that are computed once and handed to every block."""
    of = layers_of(lib)

    class Stack(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self, crosses: bool) -> None:
            super().__init__()
            self.position_bias = of.PositionBias()
            self.layers = of.stack(LAYERS, of.RMSNorm, bias=False, gated=True, crosses=crosses)
            self.output_norm = of.RMSNorm()

        def forward(self, x: Tensor, mask: Tensor, memory: Any = None) -> Tensor:
            return self.output_norm(self.layers(x, mask, self.position_bias(x.shape[1]), None, memory))  # type: ignore[no-any-return]

    class T5(of.Base):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.input_embedding, self.output_projection = of.Embedding(VOCABULARY), of.Linear(WIDTH, VOCABULARY, False)
            self.encoder, self.decoder = Stack(False), Stack(True)

        def forward(self, ids: Tensor) -> Tensor:
            both = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool)
            memory = self.encoder(self.input_embedding(ids.flip(1)), both)
            return self.output_projection(self.decoder(self.input_embedding(ids), causal(ids), memory))  # type: ignore[no-any-return]

    return T5()


def llama(lib: SimpleNamespace) -> Any:
    """Rotary positions in TorchScript, gates, no biases."""
    of = layers_of(lib)

    class Llama(of.Base):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.input_embedding, self.lm_head = of.Embedding(VOCABULARY), of.Linear(WIDTH, VOCABULARY, bias=False)
            self.encoder, self.output_norm = of.stack(LAYERS, of.RMSNorm, bias=False, gated=True), of.RMSNorm()
            half = WIDTH // HEADS // 2
            self.register_buffer("inv_freq", 100 ** -(torch.arange(half) / half), persistent=False)

        def forward(self, ids: Tensor) -> Tensor:
            angle = torch.arange(ids.shape[1])[:, None] * self.inv_freq
            rotary = angle.cos().to(lib.dtype), angle.sin().to(lib.dtype)
            x = self.encoder(self.input_embedding(ids), causal(ids), None, rotary)
            return self.lm_head(self.output_norm(x))  # type: ignore[no-any-return]

    return Llama()


def causal(ids: Tensor) -> Tensor:
    """(B, T, T) which positions each one sees."""
    return torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool).tril()


MODELS = {"bert": bert, "gpt": gpt, "t5": t5, "llama": llama}
