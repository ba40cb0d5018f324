"""Ordinary models whose layers a plan splits, against the whole model in plain torch on one process."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from trains_alike import VOCABULARY, assert_trains_alike

import bmtrain as bmt
from bmtrain.errors import ConfigurationError
from bmtrain.parallel.embedding import vocab_parallel_embedding
from bmtrain.parallel.group import tensor_group

WIDTH, HEADS = 16, 4


class Attention(nn.Module):
    """Twice as many query heads as others.  ``counted``: it cuts features by a count of heads, else by their width."""

    def __init__(self, counted: bool, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH // HEADS) if normed else nn.Identity()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v, self.out = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH)
        self.counted = counted
        if counted:
            self.n_head, self.n_kv_heads = HEADS, HEADS // 2
        else:
            self.head_dim = WIDTH // HEADS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.counted:
            q = q.view(rows, length, self.n_head, -1)
            k, v = (t.view(rows, length, self.n_kv_heads, -1) for t in (k, v))
        else:
            q, k, v = (t.view(rows, length, -1, self.head_dim) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (self.norm(q), self.norm(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: torch.Tensor = self.out(y.transpose(1, 2).reshape(rows, length, -1))
        return out


class Layer(nn.Module):
    def __init__(self, counted: bool, normed: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = Attention(counted, normed)
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, 12), "down": nn.Linear(12, WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp["down"](F.gelu(self.mlp["up"](self.norms[1](x))))


class Model(nn.Module):
    _tp_plan: dict[str, str]

    def __init__(self, counted: bool = False, tied: bool = True, normed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.layers = nn.ModuleList(Layer(counted, normed) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))


PLAN = {
    "layers.*.attention.[qkv]": "colwise",
    "layers.*.attention.out": "rowwise",
    "layers.*.mlp.up": "colwise",
    "layers.*.mlp.down": "rowwise",
}
TORCHS: dict[str, Any] = {
    "layers.*.attention.[qkv]": ColwiseParallel(),
    "layers.*.attention.out": RowwiseParallel(),
    "layers.*.mlp.up": ColwiseParallel(output_layouts=Replicate()),
    "layers.*.mlp.down": RowwiseParallel(input_layouts=Replicate()),
}


@on_ranks(4, long=(2,), init={"tp_size": 2})
def test_split_models_are_the_whole_one() -> None:
    cases: dict[str, tuple[dict[str, Any], dict[str, Any] | None, list[str] | None]] = {
        "by width": ({}, PLAN, None),
        "by counts": ({"counted": True}, PLAN, ["n_head", "n_kv_heads"]),
        "torch's": ({"tied": False}, TORCHS, None),
        "tied, both split": ({}, {**PLAN, "head": "colwise_gather_output"}, None),
        "apart, both split": ({"tied": False}, {**PLAN, "head": "colwise_rep", "embedding": "embedding_rowwise"}, None),
        "a norm of heads": (
            {"normed": True},
            {**PLAN, "layers.*.attention.norm": "replicated_with_grad_allreduce"},
            None,
        ),
        "brought along": ({}, None, None),
    }
    for options, plan, divide in cases.values():
        reference, model = Model(**options), Model(**options)
        model._tp_plan = {**PLAN, "head": "colwise_gather_output"}
        made = bmt.parallelize_module(model, plan, divide)
        assert made is model and model.layers[0].attention.q.weight.shape == (WIDTH // 2, WIDTH)
        assert_trains_alike(bmt.BMTrainModelWrapper(model), reference)


class Converted(bmt.DistributedModule):
    """As a converted model's class, which is sharded when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Model()
        bmt.parallelize_module(self, {f"net.{name}": style for name, style in PLAN.items()})

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        return self.net(tokens, targets)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Model()

    forward = Converted.forward


@on_ranks(2, init={"tp_size": 2})
def test_in_a_constructor() -> None:
    assert_trains_alike(Converted(), Whole())


@on_ranks(2, init={"tp_size": 2})
def test_slices_are_of_the_first_ranks_values() -> None:
    model, reference = Model(), Model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(bmt.rank())
    oracle.assert_same_weights(bmt.BMTrainModelWrapper(bmt.parallelize_module(model, PLAN)), reference, exact=True)


@on_ranks(1, 2)
def test_without_tensor_parallel_ranks_nothing_changes() -> None:
    model = Model(counted=True)
    before = dict(model.named_modules())
    assert bmt.parallelize_module(model, PLAN) is model and dict(model.named_modules()) == before
    with pytest.raises(ConfigurationError, match="name of no module"):
        bmt.parallelize_module(model, {"layers.*.atention.q": "colwise"})


def refusals() -> dict[str, tuple[Any, dict[str, Any] | None, list[str] | None]]:
    odd, cut, hooked = Model(), Model(), Model()
    odd.layers[1].mlp["up"], odd.layers[1].mlp["down"] = nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH)
    cut.layers[0].attention.head_dim = 8
    hooked.head.register_forward_hook(lambda *_: None)
    limited = nn.ModuleDict({"e": nn.Embedding(4, 2, max_norm=1.0)})
    return {
        "brings no plan along": (Model(), None, None),
        "name of no module": (Model(), {"layers.0.mlp.up": "colwise", "layer.*.mlp.up": "colwise"}, None),
        "layers.0.attention is Attention": (Model(), {"layers.*.attention": "colwise"}, None),
        "norm is LayerNorm": (Model(), {"norm": "colwise"}, None),
        "'sequence_parallel', which is not supported": (Model(), {"norm": "sequence_parallel"}, None),
        "SequenceParallel.* not supported": (Model(), {"norm": SequenceParallel()}, None),
        "RowwiseParallel.* not supported": (Model(), {"head": RowwiseParallel(output_layouts=Shard(1))}, None),
        'embedding is an embedding, which can be split "rowwise" only': (Model(), {"embedding": "colwise"}, None),
        "e is an embedding with max_norm": (limited, {"e": "rowwise"}, None),
        r"layers.1.mlp.up.out_features is 13, which cannot be split evenly over 2": (odd, PLAN, None),
        "layers.0.attention.k has 1 heads of 8 features": (cut, PLAN, None),
        r"Attention.n_head is 4, .* divide=\[\"n_head\"\]": (Model(counted=True), PLAN, None),
        "n_odd is 3, which cannot be divided": (_with_odd_count(), PLAN, ["n_odd"]),
        "embedding.weight is also the weight": (Model(), {"head": "rowwise_split_input"}, None),
        "head is a layer with hooks": (hooked, {"head": "colwise"}, None),
        "layers.0 is more than one module": (Model(), {"layers.*": "replicated_with_grad_allreduce"}, None),
    }


def _with_odd_count() -> Model:
    model = Model()
    model.layers[0].attention.n_odd = 3  # type: ignore[assignment]
    return model


@on_ranks(2, init={"tp_size": 2})
def test_what_cannot_be_split_is_refused_and_nothing_changes() -> None:
    for message, (model, plan, divide) in refusals().items():
        before = dict(model.named_modules())
        with pytest.raises(ConfigurationError, match=message):
            bmt.parallelize_module(model, plan, divide)
        assert dict(model.named_modules()) == before, message


@on_ranks(2, init={"tp_size": 2})
def test_a_sharded_model_is_refused() -> None:
    for model in (bmt.BMTrainModelWrapper(Model()), Converted()):
        names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        with pytest.raises(ConfigurationError, match="sharded already"):
            bmt.parallelize_module(model, {names[0]: "colwise"})


@on_ranks(2, init={"tp_size": 2, "device": "cpu"})  # a GPU says so later, and not as an exception
def test_a_token_that_is_nowhere_is_an_error() -> None:
    table = bmt.nn.VPEmbedding(6, 2, dtype=torch.float32)
    bmt.init_parameters(table)
    for token in (6, 100) if bmt.rank() else (-1, -7):
        with pytest.raises(IndexError, match="out of range"):
            vocab_parallel_embedding(torch.tensor([token]), table.weight.gather(), tensor_group())
