"""Tensor parallelism together with other features: every pair of them occurs in some run, compared with plain torch."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import test_plan
import torch
from covering import Row, covering_rows
from ranks import run_ranks
from test_tensor_parallel import pair
from torch import nn
from trains_alike import batch

import bmtrain as bmt

STEPS, SCALE, MAX_NORM = 3, 2.0**8, 0.05
MESHES: list[tuple[int, int | None]] = [(2, None), (4, None), (4, 1)]  # ranks, shard_size
FACTORS: dict[str, list[Any]] = {
    "mesh": MESHES,
    "split by": ["layers", "plan"],
    "precision": ["fp32", "autocast bf16", "autocast fp16", "bf16 model", "precision bf16"],
    "compiled": [False, True],
    "recompute": [True, False, None],
    "accumulate": [1, 3],
    "clip": [False, True],
    "optimizer": ["ours", "torch's", "both"],
}
CELLS = covering_rows(FACTORS, 2)
LIMITS = {"fp32": 1e-4, "autocast bf16": 0.05, "autocast fp16": 0.015, "bf16 model": 0.1, "precision bf16": 0.1}
"""Of the norm of a gradient."""


def casting(cell: Row) -> Any:
    name: str = cell["precision"]
    low = torch.bfloat16 if name.endswith("bf16") else torch.float16
    return torch.autocast("cpu", low) if name.startswith("autocast") else nullcontext()


def plainly(cell: Row, master: nn.Module) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Gradients of each step, and its norm; weights end in ``master``."""
    low = cell["precision"] in ("bf16 model", "precision bf16")
    optimizer = torch.optim.AdamW(master.parameters(), lr=0.01, eps=1e-5, weight_decay=0.1)
    grads, norms = [], []
    for step in range(STEPS):
        for micro in range(cell["accumulate"]):
            model = copy.deepcopy(master).bfloat16() if low else master
            with casting(cell):
                loss = model(*batch(3 * step + micro))
            (loss.float() / cell["accumulate"]).backward()
            for whole, p in zip(master.parameters(), model.parameters(), strict=True):
                if low and p.grad is not None:
                    whole.grad = p.grad.float() + (0 if whole.grad is None else whole.grad)
        grads.append({name: p.grad.clone() for name, p in master.named_parameters() if p.grad is not None})
        norms.append(float(torch.stack([g.double().norm() for g in grads[-1].values()]).norm()))
        for p in master.parameters():
            if cell["clip"] and p.grad is not None:
                p.grad.mul_(min(1.0, MAX_NORM / (norms[-1] + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
    return grads, norms


def split(cell: Row, model: Any) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """The same of the split model."""
    scale = SCALE if cell["precision"] == "autocast fp16" else 1.0
    manager = bmt.optim.OptimManager(loss_scale=scale if scale != 1.0 else None)
    make: Any = bmt.optim.AdamOptimizer if cell["optimizer"] == "ours" else torch.optim.AdamW
    parameters = list(model.parameters())
    if cell["optimizer"] == "both":
        manager.add_optimizer(bmt.optim.AdamOptimizer(parameters[::2], lr=0.01, eps=1e-5, weight_decay=0.1))
        parameters = parameters[1::2]
    manager.add_optimizer(make(parameters, lr=0.01, eps=1e-5, weight_decay=0.1))
    grads, norms = [], []
    for step in range(STEPS):
        manager.zero_grad()
        for micro in range(cell["accumulate"]):
            with casting(cell):
                loss = model(*(bmt.shard_batch(x) for x in batch(3 * step + micro)))
            manager.backward(loss.float() / cell["accumulate"])
        found = {name: bmt.gather_grad(p, join=True) for name, p in model.named_parameters()}
        grads.append({name: grad.float() / scale for name, grad in found.items() if grad is not None})
        norms.append(float(manager.clip_grad_norm(model.parameters(), MAX_NORM)) if cell["clip"] else float("nan"))
        manager.step()
    return grads, norms


def both(cell: Row) -> tuple[Any, Any]:
    """The whole model in plain torch and the split one, with equal weights."""
    if cell["split by"] == "layers":
        return pair(cell["recompute"])
    reference, model = test_plan.Model(), test_plan.Model()
    bmt.parallelize_module(model, test_plan.PLAN | {"head": "colwise_gather_output"})
    blocks = [bmt.Block(layer, use_checkpoint=cell["recompute"]) for layer in model.layers]
    model.layers = bmt.TransformerBlockList(blocks)
    return reference, bmt.BMTrainModelWrapper(model)


def wrong_in(cell: Row) -> list[str]:
    torch._dynamo.reset()
    return wrong_beside(cell, *both(cell))


def wrong_beside(cell: Row, reference: Any, model: Any, noise: tuple[str, ...] = ()) -> list[str]:
    """What is not as ``reference`` has it, except of parameters whose gradients are noise."""
    if cell["precision"] == "bf16 model":
        model.bfloat16()
        reference.bfloat16().float()
    first = {name: value.clone() for name, value in reference.state_dict().items()}
    if cell["compiled"]:
        bmt.compile(model, backend="aot_eager")
    expected, right_norms = plainly(cell, reference)
    steps, norms = split(cell, model)
    limit, wrong = LIMITS[cell["precision"]], []
    for number, (grads, right) in enumerate(zip(steps, expected, strict=True)):
        later = limit * (1 + 4 * number)
        if grads.keys() != right.keys():
            wrong.append(f"step {number}: without a gradient {sorted(right.keys() ^ grads.keys())}")
        for name in [name for name in grads.keys() & right.keys() if not name.endswith(noise)]:
            off = float((grads[name] - right[name]).norm() / right[name].norm().clamp(min=1e-12))
            if not off <= later:
                wrong.append(f"step {number}: gradient of {name} off by {off:.2g}")
        if cell["clip"] and not abs(norms[number] - right_norms[number]) <= later * right_norms[number]:
            wrong.append(f"step {number}: norm {norms[number]}, not {right_norms[number]}")
    state = {name: value.to(first[name].device) for name, value in model.state_dict().items()}
    for name, value in reference.state_dict().items():
        if name.endswith(noise):
            continue
        moved = (value - first[name]).norm()
        rounding = 2**-8 * first[name].norm() if cell["precision"] == "bf16 model" else 0.0
        if not (state[name].float() - value).norm() <= 4 * limit * moved + rounding + 1e-6:
            wrong.append(f"{name} ends elsewhere: {float((state[name].float() - value).norm() / moved):.2g}")
    return wrong


def wrong_cells(cells: list[Row]) -> list[tuple[Row, list[str]]]:
    found = []
    for cell in cells:
        try:
            wrong = wrong_in(cell)
        except Exception as error:
            raise AssertionError(str(cell)) from error
        if wrong:
            found.append((cell, wrong))
    return found


def test_pairs_are_there() -> None:
    assert {(row["mesh"], row["precision"]) for row in CELLS} == {(m, p) for m in MESHES for p in FACTORS["precision"]}


@pytest.mark.parametrize("mesh", [MESHES[0], *(pytest.param(m, marks=pytest.mark.long) for m in MESHES[1:])], ids=str)
@pytest.mark.parametrize("policy", [None, pytest.param("bf16", marks=pytest.mark.long)])
def test_features_together(mesh: tuple[int, int | None], policy: str | None) -> None:
    chosen = [c for c in CELLS if c["mesh"] == mesh and (c["precision"] == "precision bf16") == (policy is not None)]
    assert chosen
    init = {"tp_size": 2, "shard_size": mesh[1]} | ({"precision": policy} if policy else {})
    for found in run_ranks(mesh[0], wrong_cells, chosen, init=init, timeout=280):
        assert not found, "\n".join(f"{cell}\n    " + "\n    ".join(wrong[:8]) for cell, wrong in found)
