"""A BERT, a GPT, a T5 and a Llama in the published style: trained, saved, resumed and fine-tuned like plain torch's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published_models import LENGTH, MODELS, VOCABULARY, init_plain, names
from ranks import on_ranks
from torch import nn

import bmtrain as bmt

ROWS, LR = 12, 0.02


def tokens(step: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def made(kind: str, dtype: torch.dtype, lora: int = 0) -> tuple[Any, Any]:
    """The model in the published style and the plain one, initialised alike."""
    model, reference = MODELS[kind](names(True, dtype, lora)), MODELS[kind](names(False, dtype, lora))
    torch.manual_seed(7)
    bmt.init_parameters(model)
    torch.manual_seed(7)
    init_plain(reference)
    return model, reference


class Plain:
    """What the script does with plain torch: AdamW on fp32 masters, the norm clipped, Noam's rate."""

    def __init__(self, model: nn.Module, trained: list[nn.Parameter]) -> None:
        self.model, self.trained, self.step_number = model, trained, 0
        self.masters = [p.detach().float().clone().requires_grad_() for p in trained]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, weight_decay=0.01)

    def step(self, data: torch.Tensor) -> tuple[float, float]:
        for p in self.trained:
            p.grad = None
        logits = self.model(data[:, :-1]).float()
        loss = F.cross_entropy(logits.view(-1, VOCABULARY), data[:, 1:].reshape(-1))
        (loss * 1024).backward()
        for master, p in zip(self.masters, self.trained, strict=True):
            master.grad = None if p.grad is None else p.grad.float() / 1024
        norm = nn.utils.clip_grad_norm_(self.masters, 0.5)
        self.optimizer.param_groups[0]["lr"] = LR * min(max(self.step_number, 1) ** -0.5, self.step_number * 2**-1.5)
        self.optimizer.step()
        self.step_number += 1
        with torch.no_grad():
            for master, p in zip(self.masters, self.trained, strict=True):
                p.copy_(master)
        return loss.item(), float(norm)


class Published:
    """The same in the published style."""

    def __init__(self, model: Any, dtype: torch.dtype, trained: list[nn.Parameter]) -> None:
        self.model, self.loss_func = model, bmt.loss.FusedCrossEntropy(ignore_index=-100)
        self.optimizer = bmt.optim.AdamOffloadOptimizer(trained, weight_decay=0.01)
        schedule = bmt.lr_scheduler.Noam(self.optimizer, start_lr=LR, warmup_iter=2, end_iter=100, num_iter=0)
        self.manager = bmt.optim.OptimManager(loss_scale=None if dtype == torch.float32 else 1024.0)
        self.manager.add_optimizer(self.optimizer, schedule)

    def step(self, data: torch.Tensor) -> tuple[float, float]:
        rows = len(data) // bmt.world_size()
        data = data[bmt.rank() * rows : (bmt.rank() + 1) * rows]
        self.manager.zero_grad()
        logits = self.model(data[:, :-1])
        loss = self.loss_func(logits.view(-1, VOCABULARY), data[:, 1:].reshape(-1))
        self.manager.backward(loss)
        norm = self.manager.clip_grad_norm(self.optimizer.param_groups, 0.5, norm_type=2)
        self.manager.step()
        return bmt.sum_loss(loss).item(), float(norm)


def close(kind: str, dtype: torch.dtype, found: tuple[float, float], expected: tuple[float, float]) -> None:
    limit = 1e-4 if dtype == torch.float32 else 0.05
    assert found == pytest.approx(expected, rel=limit), (kind, dtype)


def live(kind: str, dtype: torch.dtype, folder: Path) -> None:
    """Train, save through the model's own ``state_dict``, load, resume, and fine-tune with LoRA."""
    model, reference = made(kind, dtype)
    expected = reference.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ours, theirs = Published(model, dtype, list(model.parameters())), Plain(reference, list(reference.parameters()))
    bmt.synchronize()
    for step in range(3):
        close(kind, dtype, ours.step(tokens(step)), theirs.step(tokens(step)))

    path, state_path = os.path.join(folder, "model.pt"), os.path.join(folder, "state.pt")
    bmt.save(model, path)
    state = ours.manager.state_dict(gather_opt=True)
    if bmt.rank() == 0:
        torch.save(state, state_path)
    bmt.synchronize()
    read = torch.load(path, weights_only=True)
    assert list(read) == list(reference.state_dict())
    MODELS[kind](names(False, dtype)).load_state_dict(read)  # plain torch reads the file
    expected_after = [ours.step(tokens(step)) for step in (3, 4)]

    again = MODELS[kind](names(True, dtype))
    bmt.init_parameters(again)
    bmt.load(again, path)
    resumed = Published(again, dtype, list(again.parameters()))
    resumed.manager.load_state_dict(torch.load(state_path, weights_only=False))
    assert [resumed.step(tokens(step)) for step in (3, 4)] == expected_after

    tuned, plain = made(kind, dtype, lora=2)
    bmt.load(tuned, path, strict=False)
    plain.load_state_dict(read, strict=False)
    for net in (tuned, plain):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("lora_" in name)
    ours = Published(tuned, dtype, [p for p in tuned.parameters() if p.requires_grad])
    theirs = Plain(plain, [p for p in plain.parameters() if p.requires_grad])
    assert ours.optimizer.param_groups[0]["params"]
    for step in range(5, 8):
        close(kind, dtype, ours.step(tokens(step)), theirs.step(tokens(step)))
    after = bmt.store.broadcast_object(tuned.state_dict())
    for name, value in read.items():
        assert torch.equal(after[name], value), name  # frozen
    assert any(value.any() for name, value in after.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", MODELS)
@on_ranks(1, 2)
def test_in_fp32(kind: str, tmp_path: Path) -> None:
    live(kind, torch.float32, tmp_path)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("bert", torch.float32),
        *(pytest.param(kind, torch.float32, marks=pytest.mark.long) for kind in MODELS if kind != "bert"),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.long),
    ],
)
@on_ranks(2, init={"pipe_size": 2})
def test_in_stages(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    live(kind, dtype, tmp_path)


@on_ranks(1, 2)
def test_in_half_precision(tmp_path: Path) -> None:
    live("t5", torch.half, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
@on_ranks(1, 2)
def test_in_low_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    live(kind, dtype, tmp_path)


@pytest.mark.long
@on_ranks(3, 4)
def test_on_more_ranks(tmp_path: Path) -> None:
    live("bert", torch.float32, tmp_path)
    live("t5", torch.float32, tmp_path)


@on_ranks(1, 2)
def test_adapters_that_are_added_to_a_model_that_is_sharded() -> None:
    """As adapter libraries do: a child more in every layer, behind the published module's back."""
    model, _ = made("gpt", torch.float32)
    data = tokens(0)[:, :-1]
    before = model(data).detach()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.encoder:
        linear = block.ffn.w_in
        linear.adapter = nn.Linear(linear.weight.shape[1], linear.weight.shape[0], bias=False)
        nn.init.constant_(linear.adapter.weight, 0.0)
        linear.forward = lambda x, linear=linear: F.linear(x, linear.weight, linear.bias) + linear.adapter(x)
    bmt.BMTrainModelWrapper(model)
    assert torch.allclose(model(data), before, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2
    ours = Published(model, torch.float32, trained)
    losses = [ours.step(tokens(0))[0] for _ in range(6)]
    assert losses[-1] < losses[0]
    assert torch.isfinite(model(data)).all() and not torch.allclose(model(data), before)


def test_without_torchscript(tmp_path: Path) -> None:
    # Read when torch is imported, so that it needs a process of its own.
    here = Path(__file__).parent
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:3]\n"
        "import bmtrain as bmt; bmt.init_distributed(device='cpu')\n"
        "import test_published_models as tests; from pathlib import Path\n"
        "assert not torch.jit._state._enabled\n"
        "tests.live('t5', torch.float32, Path(sys.argv[3])); print('lived')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(here), str(here.parent), str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"PYTORCH_JIT": "0", "OMP_NUM_THREADS": "1"}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "lived" in done.stdout, done.stderr[-2000:]
