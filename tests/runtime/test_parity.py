"""Training on any number of ranks against plain torch on one process, over the same global batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import models
import pytest
import torch
from ranks import run_ranks

import bmtrain as bmt

STEPS = 8
LEARNING_RATE = 1e-2
FP32 = 1e-5  # of the loss, and of a gradient's largest entry
# bfloat16 keeps 8 bits: one rounding is 2^-9 of a value, and a backward rounds some dozen times on the way.
BF16_LOSS, BF16_GRAD = 2e-2, 6e-2

# Their true gradient is zero (softmax does not see a key's bias), so Adam moves them by noise divided by itself.
MOVED_BY_NOISE = ("c_attn.bias",)


@dataclass(frozen=True)
class Task:
    """What is trained: all that the reference depends on."""

    model: str
    accumulation: int
    clip: float | None
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """What training gave.  Gradients are those of the first step and of one step at the reference's last weights."""

    initial: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    first: dict[str, torch.Tensor | None]
    last: dict[str, torch.Tensor | None]
    final: dict[str, torch.Tensor]


# Every pair of settings meets in some row: accumulation, clipping, recomputation, ZeRO level.
SETTINGS = [
    (1, None, True, 3),
    (4, 0.5, False, 3),
    (1, 0.5, True, 2),
    (4, None, False, 2),
    (4, 0.5, True, 3),
    (1, None, False, 3),
]


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The usual ones: matrices decay, the rest does not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@cache
def reference(task: Task) -> Run:
    """Plain torch, whole batches."""
    exact()
    model = models.build(task.model, models.plain())
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(task.device)
    optimizer = torch.optim.AdamW(groups(model), lr=LEARNING_RATE)

    def backward(step: int) -> float:
        total = 0.0
        for micro in range(task.accumulation):
            tokens, targets = models.batch(task.model, step * 7 + micro)
            loss = model(tokens.to(task.device), targets.to(task.device)) / task.accumulation
            loss.backward()
            total += float(loss.detach())
        return total

    def grads() -> dict[str, torch.Tensor | None]:
        return {n: None if p.grad is None else p.grad.cpu().clone() for n, p in model.named_parameters()}

    losses, norms, first = [], [], {}
    for step in range(STEPS):
        losses.append(backward(step))
        first = first or grads()
        if task.clip is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)))
        optimizer.step()
        optimizer.zero_grad()
    backward(99)
    return Run(initial, losses, norms, first, grads(), {k: v.cpu() for k, v in model.state_dict().items()})


def train(task: Task, recompute: bool, zero_level: int, final: dict[str, torch.Tensor]) -> Run:
    """The same on this rank's share; ``final`` are the reference's last weights."""
    exact()
    model = models.build(task.model, models.sharded(recompute, zero_level))
    initial = model.state_dict()
    optimizer = bmt.optim.AdamOptimizer(groups(model), lr=LEARNING_RATE)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)

    def backward(step: int) -> float:
        total = 0.0
        for micro in range(task.accumulation):
            tokens, targets = models.batch(task.model, step * 7 + micro)
            loss = model(models.share(tokens, task.device), models.share(targets, task.device)) / task.accumulation
            manager.backward(loss)
            total += float(bmt.sum_loss(loss))
        return total

    def grads() -> dict[str, torch.Tensor | None]:
        found = {n: bmt.gather_grad(p) for n, p in model.named_parameters()}
        return {n: None if g is None else g.cpu() for n, g in found.items()}

    losses, norms, first = [], [], {}
    for step in range(STEPS):
        losses.append(backward(step))
        first = first or grads()
        if task.clip is not None:
            norms.append(float(manager.clip_grad_norm(optimizer.param_groups, task.clip)))
        manager.step()
        manager.zero_grad()
    trained = model.state_dict()
    model.load_state_dict(final)
    backward(99)
    return Run(initial, losses, norms, first, grads(), trained)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error in units of the largest entry."""
    size = float(expected.abs().max())
    # What is zero but for rounding has no size of its own: then the error itself is measured.
    return float((found - expected).abs().max()) / (size if size > 1e-7 else 1.0)


def compare_grads(ours: dict[str, torch.Tensor | None], theirs: dict[str, torch.Tensor | None], limit: float) -> None:
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        found = ours[name]
        if expected is None:
            assert found is None or not found.any(), f"{name} has a gradient that the reference does not have"
            continue
        assert found is not None and found.shape == expected.shape, name
        error = relative(found, expected)
        assert error <= limit, f"{name} differs by {error:.1e} of its largest entry"


def compare(run: Run, expected: Run) -> None:
    assert list(run.initial) == list(expected.initial)
    for key, value in expected.initial.items():
        assert torch.equal(run.initial[key], value) and run.initial[key].dtype == value.dtype, f"initial {key} differs"
    assert run.losses == pytest.approx(expected.losses, rel=FP32)
    assert run.norms == pytest.approx(expected.norms, rel=FP32)
    compare_grads(run.first, expected.first, FP32)
    compare_grads(run.last, expected.last, FP32)
    for key, value in expected.final.items():
        if not key.endswith(MOVED_BY_NOISE):
            assert relative(run.final[key], value) <= 2e-4, f"{key} after {STEPS} steps"


def check(
    model: str,
    setting: tuple[int, float | None, bool, int],
    world_size: int,
    device: str,
    shard_size: int | None = None,
) -> None:
    accumulation, clip, recompute, zero_level = setting
    task = Task(model, accumulation, clip, device)
    expected = reference(task)
    assert expected.losses[-1] < expected.losses[0], "the reference does not learn"
    init = {"device": device} | ({} if shard_size is None else {"shard_size": shard_size})
    for run in run_ranks(world_size, train, task, recompute, zero_level, expected.final, init=init):
        compare(run, expected)


# All settings on two ranks; on one two of them, which differ in every part, and one on three with --long.
ROWS = [
    *((2, setting) for setting in SETTINGS),
    *((1, setting) for setting in SETTINGS[1:3]),
    *(pytest.param(3, setting, marks=pytest.mark.long) for setting in SETTINGS[1:3]),
    *(pytest.param(1, setting, marks=pytest.mark.long) for setting in (SETTINGS[0], *SETTINGS[3:])),
    *(pytest.param(4, setting, marks=pytest.mark.long) for setting in SETTINGS[1:3]),
]


@pytest.mark.parametrize(("world_size", "setting"), ROWS, ids=str)
@pytest.mark.parametrize("model", models.BUILDERS)
def test_training_equals_plain_torch(model: str, setting: Any, world_size: int) -> None:
    check(model, setting, world_size, "cpu")


# Groups of ranks, each of which keeps all parameters: two rows that differ in every setting, and all the others.
MESHES = [("gpt", SETTINGS[2], 2, 1), ("awkward", SETTINGS[1], 4, 2)]
MORE = [
    (model, setting, *mesh)
    for model in models.BUILDERS
    for setting in SETTINGS[1:3]
    for mesh in ((2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4))
    if (model, setting, *mesh) not in MESHES
]


@pytest.mark.parametrize(
    ("model", "setting", "world_size", "shard_size"),
    [*MESHES, *(pytest.param(*row, marks=pytest.mark.long) for row in MORE)],
    ids=str,
)
def test_training_with_replicas_equals_plain_torch(model: str, setting: Any, world_size: int, shard_size: int) -> None:
    check(model, setting, world_size, "cpu", shard_size)


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("model", models.BUILDERS)
def test_training_on_gpus_equals_plain_torch(model: str, setting: Any, world_size: int) -> None:
    check(model, setting, world_size, "cuda")


# ---- low precision
# ---------------------------------------------------------------------------------------------------------------------


class Bf16Reference:
    """bfloat16 model, fp32 master weights, fp32 sums of gradients: what mixed-precision training means."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().requires_grad_() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3, weight_decay=0.1)

    def step(self) -> None:
        for p, master in zip(self.params, self.masters, strict=True):
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        self.optimizer.step()
        for p, master in zip(self.params, self.masters, strict=True):
            p.data.copy_(master.data)


def train_bf16(device: str, recompute: bool) -> dict[str, Any]:
    """Losses of both, and each gradient's error at the first step."""
    plain = Bf16Reference(models.build("gpt", models.plain()).bfloat16().to(device))
    model = models.build("gpt", models.sharded(recompute)).bfloat16()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3, weight_decay=0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    losses, errors = [], {}
    for step in range(15):
        tokens, targets = (x.to(device) for x in models.batch("gpt", step))
        whole = plain.model(tokens, targets)
        whole.backward()
        loss = model(models.share(tokens, device), models.share(targets, device))
        manager.backward(loss)
        losses.append((float(bmt.sum_loss(loss)), float(whole.detach())))
        if step == 0:
            for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.model.named_parameters(), strict=True):
                found = bmt.gather_grad(ours)
                assert found is not None and found.dtype == torch.float32 and theirs.grad is not None
                errors[name] = relative(found, theirs.grad.float())
        plain.step()
        manager.step()
        manager.zero_grad()
    return {"losses": losses, "errors": errors, "dtype": str(next(model.parameters()).dtype)}


def check_bf16(world_size: int, device: str, recompute: bool) -> None:
    for result in run_ranks(world_size, train_bf16, device, recompute, init={"device": device}):
        assert result["dtype"] == "torch.bfloat16"
        for ours, theirs in result["losses"]:
            assert ours == pytest.approx(theirs, rel=BF16_LOSS)
        errors = {k: v for k, v in result["errors"].items() if not k.endswith(MOVED_BY_NOISE)}
        assert max(errors.values()) <= BF16_GRAD, errors
        assert result["losses"][-1][0] < result["losses"][0][0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bf16_training_follows_a_bf16_reference(world_size: int) -> None:
    check_bf16(world_size, "cpu", recompute=world_size != 1)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bf16_training_on_gpus_follows_a_bf16_reference(world_size: int, recompute: bool) -> None:
    check_bf16(world_size, "cuda", recompute)
