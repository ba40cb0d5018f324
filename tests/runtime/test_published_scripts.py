"""Scripts in the style of those written for earlier releases, whole, against the same script in plain torch."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn

import bmtrain as bmt

VOCABULARY, WIDTH, ROWS, LENGTH = 23, 8, 8, 5


def library(published: bool) -> SimpleNamespace:
    """The names that the models below are written with, from this library or from torch."""
    if published:
        return SimpleNamespace(
            Module=bmt.DistributedModule, Parameter=bmt.DistributedParameter, Block=bmt.CheckpointBlock,
            List=bmt.TransformerBlockList,
        )  # fmt: skip

    def parameter(data: torch.Tensor, init_method: Any = None, **kwargs: Any) -> nn.Parameter:
        made = nn.Parameter(data)
        made.init = init_method  # type: ignore[attr-defined]
        return made

    class List(nn.ModuleList):
        def __init__(self, modules: Any, num_hidden: int = 1) -> None:
            super().__init__(modules)
            self.num_hidden = num_hidden

        def forward(self, *args: Any) -> Any:
            hidden, rest = args[: self.num_hidden], args[self.num_hidden :]
            for module in self:
                out = module(*hidden, *rest)
                hidden = (out,) if self.num_hidden == 1 else tuple(out)
            return hidden[0] if self.num_hidden == 1 else hidden

    return SimpleNamespace(Module=nn.Module, Parameter=parameter, Block=lambda module: module, List=List)


def language_model(lib: SimpleNamespace) -> Any:
    """Layers of its own with ``init_method``, initialised late; position bias handed to every block."""

    class Linear(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self, dim_in: int, dim_out: int, std: float = 0.3) -> None:
            super().__init__()
            self.weight = lib.Parameter(
                torch.empty(dim_out, dim_in), init_method=bmt.ParameterInitializer(nn.init.normal_, mean=0.0, std=std)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight)

    class Embedding(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weight = lib.Parameter(
                torch.empty(VOCABULARY, WIDTH), init_method=bmt.ParameterInitializer(nn.init.normal_, std=1.0)
            )

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.embedding(ids, self.weight) / math.sqrt(WIDTH)

        def projection(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x / math.sqrt(WIDTH), self.weight)

    class Layer(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.w_in, self.w_out = Linear(WIDTH, 16), Linear(16, WIDTH)

        def forward(self, x: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return x + self.w_out(torch.tanh(self.w_in(x * mask[..., None] + bias)))

    class Model(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.input_embedding = Embedding()
            self.position_bias = lib.Parameter(torch.zeros(LENGTH, WIDTH), init_method=lambda p: p.uniform_(-0.1, 0.1))
            self.layers = lib.List([lib.Block(Layer()) for _ in range(3)])

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.layers(self.input_embedding(ids), mask, self.position_bias)
            return self.input_embedding.projection(hidden)

    return Model()


def tokens(step: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


@on_ranks(1, 2)
def test_pretraining(tmp_path: Path) -> None:
    """Late initialisation, fused loss, loss scale, Noam, clipping, inspection, saving and loading."""
    reference = language_model(library(False))
    model = language_model(library(True))
    torch.manual_seed(9)
    for parameter in reference.parameters():
        with torch.no_grad():
            parameter.init(parameter)
    torch.manual_seed(9)
    bmt.init_parameters(model)
    oracle.assert_same_weights(model, reference, exact=True)

    loss_func = bmt.loss.FusedCrossEntropy(ignore_index=-100)
    optimizer = bmt.optim.AdamOffloadOptimizer(model.parameters(), weight_decay=1e-2)
    lr_scheduler = bmt.lr_scheduler.Noam(optimizer, start_lr=1e-2, warmup_iter=2, end_iter=8, num_iter=0)
    optim_manager = bmt.optim.OptimManager(loss_scale=2**12)
    optim_manager.add_optimizer(optimizer, lr_scheduler)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.0, weight_decay=1e-2)
    bmt.synchronize()
    average = bmt.utils.AverageRecorder()
    for step in range(4):
        data = tokens(step)
        share = data[bmt.rank() * ROWS // bmt.world_size() : (bmt.rank() + 1) * ROWS // bmt.world_size()]
        optim_manager.zero_grad()
        logits = model(share[:, :-1], torch.ones(len(share), LENGTH))
        loss = loss_func(logits.view(-1, VOCABULARY), share[:, 1:].reshape(-1))
        global_loss = bmt.sum_loss(loss).item()
        optim_manager.scale_loss(loss).backward()
        grad_norm = optim_manager.clip_grad_norm(optimizer.param_groups, 0.5, norm_type=2)
        for group in theirs.param_groups:
            group["lr"] = lr_scheduler.current_lr
        optim_manager.step()
        average.record(global_loss)

        theirs.zero_grad()
        whole = F.cross_entropy(
            reference(data[:, :-1], torch.ones(ROWS, LENGTH)).view(-1, VOCABULARY), data[:, 1:].reshape(-1)
        )
        whole.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        theirs.step()
        assert global_loss == pytest.approx(whole.item(), rel=1e-5)
        assert float(grad_norm) == pytest.approx(float(norm), rel=1e-5)
    seen = bmt.inspect.inspect_model(model, "layers.*.w_in*")
    assert [entry["name"] for entry in seen] == [f"layers.{i}.w_in.weight" for i in range(3)]
    assert seen[0]["std"] == pytest.approx(float(reference.layers[0].w_in.weight.std()), rel=1e-3)
    assert "layers.0.w_in.weight" in bmt.inspect.format_summary(seen)
    assert average.value > 0
    oracle.assert_same_weights(model, reference, limit=1e-4)

    path = os.path.join(tmp_path, "model.pt")
    bmt.save(model, path)
    oracle.assert_same_weights(SimpleNamespace(state_dict=lambda: torch.load(path)), model, exact=True)
    again = language_model(library(True))
    bmt.load(again, path, strict=False)
    oracle.assert_same_weights(again, model, exact=True)


def dual_encoder(lib: SimpleNamespace) -> Any:
    class Layer(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tanh(self.left(query)) + query, torch.tanh(self.right(key)) + key

    class Model(lib.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = lib.List([lib.Block(Layer()) for _ in range(2)], num_hidden=2)
            self.scale = lib.Parameter(torch.ones(()))

        def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            query, key = self.layers(query, key)
            return query * self.scale, key

    return Model()


@on_ranks(1, 2)
def test_retrieval() -> None:
    """Two hidden states; negatives from all ranks by a gather with gradients; sums over ranks; results gathered."""
    torch.manual_seed(3)
    reference = dual_encoder(library(False))
    torch.manual_seed(3)
    model = dual_encoder(library(True))
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer, bmt.lr_scheduler.Cosine(optimizer, 1e-2, 1, 10))
    theirs = torch.optim.AdamW(reference.parameters(), weight_decay=0.0)
    part = slice(bmt.rank() * ROWS // bmt.world_size(), (bmt.rank() + 1) * ROWS // bmt.world_size())
    for step in range(3):
        query, key = torch.randn(2, ROWS, 6, generator=torch.Generator().manual_seed(step))
        q, k = model(query[part], key[part])
        keys = bmt.distributed.all_gather(k).flatten(0, 1)
        others = bmt.distributed.all_gather(q).flatten(0, 1)
        target = torch.arange(ROWS)
        # Every rank computes the whole loss, whose gradient reaches its own rows only: the sum over ranks is whole.
        loss = F.cross_entropy(others @ keys.T, target)
        manager.zero_grad()
        manager.backward(loss * bmt.world_size())
        for group in theirs.param_groups:
            group["lr"] = manager.lr_schedulers[0].current_lr
        manager.step()
        right, left = reference(query, key)
        whole = F.cross_entropy(right @ left.T, target)
        theirs.zero_grad()
        whole.backward()
        theirs.step()
        assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
        hits = (others @ keys.T).argmax(1).eq(target)[part]
        expected = (right @ left.T).argmax(1).eq(target)
        assert int(bmt.distributed.all_reduce(hits.sum().float(), "sum")) == int(expected.sum())
        assert torch.allclose(bmt.gather_result(q.detach()), right.detach(), atol=1e-5)
    oracle.assert_same_weights(model, reference, limit=1e-4)


@on_ranks(1, 2)
def test_fine_tuning(tmp_path: Path) -> None:
    """A wrapped model of somebody else, parameter groups, frozen parts, accumulation, state of everything saved."""
    torch.manual_seed(4)
    reference = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.manual_seed(4)
    model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        for parameter in net[0].parameters():  # type: ignore[index]
            parameter.requires_grad_(False)
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        return [
            {"params": [p for n, p in named if "bias" not in n], "weight_decay": 0.1},
            {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
        ]

    optimizer = bmt.optim.AdamOptimizer(groups(model), lr=1e-2)
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer, bmt.lr_scheduler.Linear(optimizer, 1e-2, 1, 6))
    theirs = torch.optim.AdamW(groups(reference), lr=1e-2)
    for step in range(3):
        for micro in range(2):
            x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(10 * step + micro))
            y = torch.arange(ROWS) % 3
            loss = F.cross_entropy(model(bmt.shard_batch(x)), bmt.shard_batch(y)) / 2
            manager.backward(loss)
            F.cross_entropy(reference(x), y).div(2).backward()
        manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in theirs.param_groups:
            group["lr"] = manager.lr_schedulers[0].current_lr
        manager.step()
        manager.zero_grad()
        theirs.step()
        theirs.zero_grad()
    oracle.assert_same_weights(model, reference, limit=1e-4)
    state = manager.state_dict(gather_opt=True)
    if bmt.rank() == 0:
        torch.save(state, os.path.join(tmp_path, "manager.pt"))
    bmt.synchronize()
    before = manager.lr_schedulers[0].current_lr
    manager.load_state_dict(torch.load(os.path.join(tmp_path, "manager.pt"), weights_only=False))
    assert manager.lr_schedulers[0].current_lr == before
    moments = optimizer.state_dict()["state"]
    for index, theirs_state in theirs.state_dict()["state"].items():
        oracle.assert_close(moments[index]["exp_avg"], theirs_state["exp_avg"], f"moment {index}", 1e-4)
