"""Optimizers, managers, losses and layers as published scripts use them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ConfigurationError

WIDTH = 4


def plain_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)).to(dtype)


def sharded_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return bmt.BMTrainModelWrapper(plain_model(dtype))


def batch(step: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))


def share(x: torch.Tensor) -> torch.Tensor:
    rows = len(x) // bmt.world_size()
    return x[bmt.rank() * rows : (bmt.rank() + 1) * rows]


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()  # type: ignore[no-any-return]


@on_ranks(1, 2)
def test_our_optimizers_on_plain_modules() -> None:
    """Replicated parameters, whose gradients are averaged; with a loss scale, a clip, a schedule and a saved state."""
    for kind, loss_scale in (
        (bmt.optim.AdamOptimizer, None), (bmt.optim.AdamOptimizer, 1024.0), (bmt.optim.AdamOffloadOptimizer, None),
        (torch.optim.SGD, 1024.0),
    ):  # fmt: skip
        model, reference = plain_model(), plain_model()
        if bmt.rank():  # every rank gets rank 0's values
            with torch.no_grad():
                next(model.parameters()).add_(1.0)
        optimizer = kind(model.parameters(), lr=0.05)
        if kind is torch.optim.SGD and bmt.rank():
            model.load_state_dict(reference.state_dict())
        theirs: torch.optim.Optimizer = (
            torch.optim.SGD(reference.parameters(), lr=0.05)
            if kind is torch.optim.SGD else torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=0.0)
        )  # fmt: skip
        manager = bmt.optim.OptimManager(loss_scale=loss_scale)
        manager.add_optimizer(optimizer, bmt.lr_scheduler.NoDecay(optimizer, 0.05, 0, 10))
        for step in range(3):
            manager.zero_grad()
            manager.backward(loss_of(model, share(batch(step))))
            norm = manager.clip_grad_norm(optimizer.param_groups, 0.1)
            manager.step()
            theirs.zero_grad()
            loss_of(reference, batch(step)).backward()
            expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            theirs.step()
            assert float(norm) == pytest.approx(float(expected), rel=1e-4), (kind, step)
        for name, value in reference.state_dict().items():
            assert torch.allclose(model.state_dict()[name], value, atol=1e-5), (kind, name)
        state = copy.deepcopy(manager.state_dict())
        manager.load_state_dict(state)
        assert manager.lr_schedulers[0].num_iter == 3


@on_ranks(1, 2)
def test_plain_modules_and_sharded_ones_in_one_optimizer() -> None:
    sharded, plain, reference = sharded_model(), nn.Linear(2, 1), (plain_model(), nn.Linear(2, 1))
    reference[1].load_state_dict(plain.state_dict())
    optimizer = bmt.optim.AdamOptimizer([*sharded.parameters(), *plain.parameters()], lr=0.05)
    theirs = torch.optim.AdamW([p for m in reference for p in m.parameters()], lr=0.05, weight_decay=0.0)
    manager = bmt.optim.OptimManager(loss_scale=256)
    manager.add_optimizer(optimizer)
    if bmt.world_size() > 1:
        plain.load_state_dict(bmt.store.broadcast_object(plain.state_dict()))
        reference[1].load_state_dict(plain.state_dict())
    for step in range(2):
        manager.zero_grad()
        manager.backward(plain(sharded(share(batch(step)))).square().mean())
        manager.step()
        theirs.zero_grad()
        reference[1](reference[0](batch(step))).square().mean().backward()
        theirs.step()
    assert torch.allclose(plain.weight, reference[1].weight, atol=1e-5)
    assert torch.allclose(sharded.state_dict()["0.weight"], reference[0].state_dict()["0.weight"], atol=1e-5)


@on_ranks(1, 2)
def test_hold_steps() -> None:
    """The moments build up while the parameters stay."""
    for kind in (bmt.optim.AdamOptimizer, bmt.optim.AdamOffloadOptimizer):
        model, reference = sharded_model(), plain_model()
        optimizer = kind(model.parameters(), lr=0.1, hold_steps=2)
        theirs = torch.optim.AdamW(reference.parameters(), lr=0.0, weight_decay=0.0)
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(optimizer)
        before = {n: v.clone() for n, v in model.state_dict().items()}
        for step in range(3):
            theirs.param_groups[0]["lr"] = 0.1 if step == 2 else 0.0
            manager.zero_grad()
            manager.backward(loss_of(model, share(batch(step))))
            manager.step()
            theirs.zero_grad()
            loss_of(reference, batch(step)).backward()
            theirs.step()
            now = model.state_dict()
            assert all(torch.equal(now[n], before[n]) for n in now) is (step < 2), step
        for name, value in reference.state_dict().items():
            assert torch.allclose(now[name], value, atol=1e-5), name
        assert optimizer.state_dict()["state"][0]["exp_avg"].any()


@on_ranks(1, 2)
def test_what_the_offload_optimizer_records() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = sharded_model(dtype)
        silent = bmt.optim.AdamOffloadOptimizer(model.parameters())
        with pytest.raises(ConfigurationError, match="record_delta=True"):
            silent.get_avg_delta()
        optimizer = bmt.optim.AdamOffloadOptimizer(model.parameters(), lr=0.1, record_delta=True)
        assert (optimizer.get_avg_delta(), optimizer.get_var_delta()) == (0.0, 0.0)
        manager = bmt.optim.OptimManager(loss_scale=256)
        manager.add_optimizer(optimizer)
        for step in range(2):
            before = optimizer.state_dict()["state"] if dtype != torch.float32 else {}
            values = [p.gather().detach().float().cpu() for p in model.parameters()]  # type: ignore[operator]
            values = [before[i]["master"] if i in before else v for i, v in enumerate(values)]
            manager.zero_grad()
            manager.backward(loss_of(model, share(batch(step))))
            manager.step()
            after = optimizer.state_dict()["state"]
            now = [p.gather().detach().float().cpu() for p in model.parameters()]  # type: ignore[operator]
            now = [after[i].get("master", v) for i, v in enumerate(now)]
            change = torch.cat([(b - a).double().reshape(-1) for a, b in zip(values, now, strict=True)])
            assert optimizer.get_avg_delta() == pytest.approx(float(change.mean()), rel=1e-4, abs=1e-9)
            assert optimizer.get_var_delta() == pytest.approx(float(change.var(unbiased=False)), rel=1e-4)
        assert copy.deepcopy(optimizer).get_avg_delta() == 0.0
        manager.zero_grad()
        manager.backward(loss_of(model, share(batch(5))) * float("inf"))  # an overflow: the step is skipped
        manager.step()
        assert (optimizer.get_avg_delta(), optimizer.get_var_delta()) == (0.0, 0.0)


@on_ranks(1, 2)
def test_a_state_says_whether_it_is_whole() -> None:
    model = sharded_model()
    optimizer = bmt.optim.AdamOffloadOptimizer(model.parameters(), lr=0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    manager.backward(loss_of(model, share(batch(0))))
    manager.step()
    whole, part = optimizer.state_dict(gather=True), optimizer.state_dict(gather=False)
    assert (whole["is_whole"], part["is_whole"]) == (True, False)
    assert whole["state"][0]["exp_avg"].shape == (6, WIDTH)
    for state in (whole, part, {"state": whole["state"], "param_groups": whole["param_groups"]}):
        optimizer.load_state_dict(state)
        assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], whole["state"][0]["exp_avg"])
    reference = plain_model()
    theirs = torch.optim.AdamW(reference.parameters())
    theirs.load_state_dict(whole)
    assert torch.equal(theirs.state_dict()["state"][0]["exp_avg"], whole["state"][0]["exp_avg"])
    assert manager.state_dict(gather_opt=True)["optimizers"][0]["is_whole"] is True


@on_ranks(1, 2)
def test_a_missing_gradient_is_zero_to_inspect_model() -> None:
    model = sharded_model()
    for p in list(model.parameters())[:2]:
        p.requires_grad_(False)
    for entry in bmt.inspect.inspect_model(model, "*"):
        assert (entry["grad_std"], entry["grad_mean"]) == (0.0, 0.0)
    loss_of(model, share(batch(0))).backward()
    for entry in bmt.inspect.inspect_model(model, "*"):
        assert (entry["grad_std"] == 0.0) is entry["name"].startswith("0."), entry
    assert "0.0000" in bmt.inspect.format_summary(bmt.inspect.inspect_model(model, "0.weight"))
    plain = bmt.inspect.inspect_model(plain_model(), "0.*", prefix="")
    assert [entry["grad_std"] for entry in plain] == [0.0, 0.0]


# ---- layers over one tensor-parallel rank ----------------------------------------------------------------------------


class Layers(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = bmt.nn.VPEmbedding(8, WIDTH, dtype=torch.float32)
        self.column = bmt.nn.ColumnParallelLinear(WIDTH, 6, gather_output=True)
        self.row = bmt.nn.RowParallelLinear(6, WIDTH, split_input=True, all_reduce_output=True)
        self.linear = bmt.nn.Linear(WIDTH, WIDTH)
        self.project = bmt.nn.Projection(8, WIDTH, dtype=torch.float32)
        self.vp_project = bmt.nn.VPProjection(8, WIDTH, dtype=torch.float32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.row(torch.tanh(self.column(self.embedding(tokens)))))
        return self.project(x) + self.vp_project(x) + self.embedding(x, projection=True)  # type: ignore[no-any-return]


@on_ranks(1, 2)
def test_parallel_layers_of_one_tensor_parallel_rank() -> None:
    torch.manual_seed(0)
    model = Layers()
    bmt.init_parameters(model)
    device = torch.get_default_device()
    values = {n: v.to(device, copy=True).requires_grad_() for n, v in model.state_dict().items()}
    tokens = torch.arange(8).view(2, 4)
    rows = tokens[bmt.rank() : bmt.rank() + 1] if bmt.world_size() == 2 else tokens
    loss = bmt.loss.FusedCrossEntropy(parallel=True)(model(rows).view(-1, 8), rows.reshape(-1))
    bmt.optim.OptimManager().backward(loss)
    x = F.embedding(tokens, values["embedding.weight"])
    for name, act in (("column", torch.tanh), ("row", lambda x: x), ("linear", lambda x: x)):
        x = act(F.linear(x, values[f"{name}.weight"], values[f"{name}.bias"]))
    logits = sum(F.linear(x, values[f"{n}.weight"]) for n in ("project", "vp_project", "embedding"))
    F.cross_entropy(logits.view(-1, 8), tokens.reshape(-1)).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        grad = bmt.gather_grad(parameter)
        assert grad is not None and torch.allclose(grad.cpu(), values[name].grad, atol=1e-5), name  # type: ignore[arg-type]
    assert "8" in repr(model)
    assert bmt.nn.Projection(8, WIDTH).weight.dtype == torch.half
