"""Features together: every pair of them occurs in some training run, which is compared with plain torch.

Compared are the gradient of every parameter (one that is missing has failed), the norm, and the weights after three
steps, or eight where blocks are recorded.  BMTRAIN_TEST_MATRIX=inductor adds Inductor's code, and
BMTRAIN_TEST_MATRIX=long takes every three features.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from covering import Row, covering_rows
from fresh import PLENTY, fresh_graphs
from ranks import run_ranks
from replayed import replays
from torch import nn

import bmtrain as bmt
from bmtrain.block import linear
from bmtrain.context import context

MATRIX = os.environ.get("BMTRAIN_TEST_MATRIX", "pairs")
LONG = MATRIX != "pairs"
WIDTH, ROWS, SCALE, MAX_NORM = 16, 12, 2.0**8, 0.05

FACTORS: dict[str, list[Any]] = {
    "model": ["plain", "tied", "frozen", "twice", "skipped", "nested", "lora", "dicts"],
    "precision": ["fp32", "autocast bf16", "autocast fp16", "bf16 model", "precision bf16"],
    "compiled": [None, "aot_eager", *(["inductor"] if LONG else [])],
    "recompute": [True, False, None],
    "ranks": [1, 2, 3],
    "accumulate": [1, 3],
    "clip": [False, True],
    "optimizer": ["ours", "torch's", "two"],
    "graphs": [False, True],
}
CELLS = covering_rows(FACTORS, 3 if MATRIX == "long" else 2)
GROUPS = [(ranks, policy) for ranks in (1, 2, 3) for policy in (None, "bf16")]

# Of the norm: gradients of the first step, those of later ones, and what three steps changed.
LIMITS = {
    "fp32": (2e-5, 1e-3, 2e-3), "autocast bf16": (0.03, 0.1, 0.2), "autocast fp16": (0.005, 0.03, 0.1),
    "bf16 model": (0.03, 0.1, 0.2), "precision bf16": (0.03, 0.1, 0.2),
}  # fmt: skip


# ---- models
# ------------------------------------------------------------------------------------------------------------

Wrap = Callable[[nn.Module], nn.Module]


class Layer(nn.Module):
    def __init__(self, low_rank: bool = False, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.inner, self.low_rank = inner, None
        if low_rank:
            self.requires_grad_(False)
            self.low_rank = nn.Sequential(nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, 32, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        up = self.up(h) if self.low_rank is None else self.up(h) + self.low_rank(h)
        x = x + self.gain * self.down(F.gelu(up))
        return x if self.inner is None else self.inner(x)


class DictLayer(Layer):
    def forward(self, *, hidden: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"hidden": super().forward(hidden), "other": hidden * scale}


class Model(nn.Module):
    def __init__(self, kind: str, wrap: Wrap) -> None:
        super().__init__()
        self.kind = kind
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        made: list[nn.Module] = [
            DictLayer()
            if kind == "dicts"
            else Layer(low_rank=kind == "lora", inner=wrap(Layer()) if kind == "nested" else None)
            for _ in range(3)
        ]
        if kind == "tied":
            self.leave.weight = self.enter.weight
            made[2].up.weight = made[0].up.weight  # type: ignore[union-attr]
        if kind == "frozen":
            made[0].requires_grad_(False)
            made[1].up.requires_grad_(False)  # type: ignore[union-attr]
        self.layers = nn.ModuleList([wrap(layer) for layer in made])

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        x = self.enter(x)
        if self.kind == "dicts":
            for layer in self.layers:
                out = layer(hidden=x, scale=0.5)
                x = out["hidden"] + out["other"]
            return self.leave(x)  # type: ignore[no-any-return]
        order = {"twice": [0, 1, 2, 0], "skipped": [0, 1] if step % 2 else [0]}.get(self.kind, [0, 1, 2])
        for index in order:
            x = self.layers[index](x)
        return self.leave(x)  # type: ignore[no-any-return]


def steps_of(cell: Row) -> int:
    return 8 if cell["graphs"] else 3  # blocks are recorded after the fourth


def build(cell: Row, wrap: Wrap = lambda module: module) -> Model:
    torch.manual_seed(11)
    model = Model(cell["model"], wrap)
    return model.bfloat16() if cell["precision"] == "bf16 model" else model


# ---- training
# ------------------------------------------------------------------------------------------------------------


def batch(step: int, micro: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 * step + micro), device="cpu")


def casting(cell: Row, kind: str) -> AbstractContextManager[Any]:
    name: str = cell["precision"]
    if not name.startswith("autocast"):
        return nullcontext()
    return torch.autocast(kind, torch.bfloat16 if name.endswith("bf16") else torch.float16)


def loss_of(cell: Row, model: nn.Module, x: torch.Tensor, number: int) -> torch.Tensor:
    x = x.to(torch.bfloat16) if cell["precision"] == "bf16 model" else x
    with casting(cell, x.device.type):
        return model(x, number).float().tanh().square().mean()


def optimizers(cell: Row, parameters: list[Any], ours: bool) -> list[torch.optim.Optimizer]:
    def adam(chosen: list[Any]) -> torch.optim.Optimizer:
        if ours:
            return bmt.optim.AdamOptimizer(chosen, lr=1e-3, eps=1e-5)
        return torch.optim.AdamW(chosen, lr=1e-3, eps=1e-5, weight_decay=0.0)

    def sgd(chosen: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD(chosen, lr=0.05, momentum=0.9)

    if cell["optimizer"] == "ours":
        return [adam(parameters)]
    if cell["optimizer"] == "torch's":
        return [sgd(parameters)]
    return [adam([p for p in parameters if p.dim() > 1]), sgd([p for p in parameters if p.dim() < 2])]


Step = tuple[dict[str, torch.Tensor], float]  # gradients, before they are clipped; their norm


def plainly(cell: Row, device: torch.device) -> tuple[list[Step], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By torch alone: fp32 weights, of which low-precision models compute with a copy; gradients are added in fp32."""
    master = build(cell).float().to(device)
    low = cell["precision"] in ("bf16 model", "precision bf16")
    first = {name: p.detach().clone() for name, p in master.named_parameters()}
    chosen = optimizers(cell, list(master.parameters()), ours=False)
    steps: list[Step] = []
    for step in range(steps_of(cell)):
        for micro in range(cell["accumulate"]):
            model = copy.deepcopy(master).bfloat16() if low else master
            x = batch(step, micro).to(device, torch.bfloat16 if low else torch.float32)
            (loss_of(cell, model, x, step + micro) / cell["accumulate"]).backward()
            for whole, p in zip(master.parameters(), model.parameters(), strict=True):
                if low and p.grad is not None:
                    whole.grad = p.grad.float() + (0 if whole.grad is None else whole.grad)
        grads = {name: p.grad.clone() for name, p in master.named_parameters() if p.grad is not None}
        norm = float(torch.stack([g.double().norm() for g in grads.values()]).norm())
        steps.append((grads, norm))
        for p in master.parameters():
            if cell["clip"] and p.grad is not None:
                p.grad.mul_(min(1.0, MAX_NORM / (norm + 1e-6)))
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
    return steps, first, {name: p.detach() for name, p in master.named_parameters()}


def sharded(cell: Row, device: torch.device) -> tuple[list[Step], dict[str, torch.Tensor]]:
    torch._dynamo.reset()
    fresh_graphs(PLENTY if cell["graphs"] else None, cell["graphs"])
    with mock.patch.object(linear, "_LARGE", 0):
        model = build(cell, lambda module: bmt.Block(module, use_checkpoint=cell["recompute"]))
        bmt.BMTrainModelWrapper(model)
    if cell["compiled"] is not None:
        bmt.compile(model, backend=cell["compiled"])
    scale = SCALE if cell["precision"] == "autocast fp16" else 1.0
    manager = bmt.optim.OptimManager(loss_scale=scale if scale != 1.0 else None)
    for optimizer in optimizers(cell, list(model.parameters()), ours=True):
        manager.add_optimizer(optimizer)
    steps: list[Step] = []
    for step in range(steps_of(cell)):
        manager.zero_grad()
        for micro in range(cell["accumulate"]):
            x = batch(step, micro).chunk(bmt.world_size())[bmt.rank()].to(device)
            manager.backward(loss_of(cell, model, x, step + micro) / cell["accumulate"])
        found = {name: bmt.gather_grad(p) for name, p in model.named_parameters()}
        grads = {name: grad.float() / scale for name, grad in found.items() if grad is not None}
        norm = float("nan")
        if cell["clip"]:
            groups = [group for optimizer in manager.optimizers for group in optimizer.param_groups]
            norm = float(manager.clip_grad_norm(groups, MAX_NORM))
        steps.append((grads, norm))
        manager.step()
    return steps, {name: value.to(device) for name, value in model.state_dict().items()}


def wrong_in(cell: Row) -> list[str]:
    """What is not as in plain torch."""
    device = context().device.torch_device
    expected, first, last = plainly(cell, device)
    with replays() if cell["graphs"] else nullcontext():
        steps, weights = sharded(cell, device)
    early, late, change = LIMITS[cell["precision"]]
    wrong = []
    for number, ((grads, norm), (right, right_norm)) in enumerate(zip(steps, expected, strict=True)):
        limit = late if number else early
        if grads.keys() != right.keys():
            wrong.append(f"step {number}: without a gradient {sorted(right.keys() ^ grads.keys())}")
        wrong += [
            f"step {number}: gradient of {name} off by {_off(grads[name], right[name]):.2g}"
            for name in grads.keys() & right.keys()
            if not _off(grads[name], right[name]) <= limit
        ]
        if cell["clip"] and not abs(norm - right_norm) <= limit * right_norm:
            wrong.append(f"step {number}: norm {norm}, not {right_norm}")
    for name, value in last.items():
        moved = value - first[name]
        if not moved.any():
            right_now = torch.equal(weights[name], first[name].to(weights[name].dtype))
        else:
            rounding = 2**-8 * first[name].norm() if cell["precision"] == "bf16 model" else 0.0
            right_now = bool((weights[name].float() - value).norm() <= change * moved.norm() + rounding)
        if not right_now:
            wrong.append(f"{name} ends elsewhere: {_off(weights[name].float() - first[name], moved):.2g}")
    return wrong


def _off(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm().clamp(min=1e-12))


def wrong_cells(cells: list[Row]) -> tuple[list[tuple[Row, list[str]]], int]:
    """Cells that are not as in plain torch, and how many blocks were recorded."""
    found, recorded = [], 0
    for cell in cells:
        try:
            wrong = wrong_in(cell)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
            if bmt.world_size() > 1:
                raise AssertionError(str(cell)) from error  # the ranks may be apart: nothing more can be learnt here
        if wrong:
            found.append((cell, wrong))
        graphs: Any = context().engine
        recorded += sum(block.is_recorded for block in graphs.graphs.blocks()) if cell["graphs"] else 0
    return found, recorded


# ---- tests
# ------------------------------------------------------------------------------------------------------------


def test_all_pairs_are_there() -> None:
    names = list(FACTORS)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert {(row[a], row[b]) for row in CELLS} == {(x, y) for x in FACTORS[a] for y in FACTORS[b]}


@pytest.mark.timeout(7200 if LONG else 300)
@pytest.mark.parametrize(("ranks", "policy"), GROUPS)
def test_features_together(ranks: int, policy: str | None) -> None:
    chosen = [c for c in CELLS if c["ranks"] == ranks and (c["precision"] == "precision bf16") == (policy is not None)]
    assert chosen
    init = {"precision": policy} if policy is not None else {}
    for found, recorded in run_ranks(ranks, wrong_cells, chosen, init=init, timeout=7000 if LONG else 280):
        assert recorded or not any(cell["graphs"] for cell in chosen)
        assert not found, "\n".join(f"{cell}\n    " + "\n    ".join(wrong[:8]) for cell, wrong in found)
