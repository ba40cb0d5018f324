"""The manager against the same steps in plain torch: clipping, loss scale, schedules, several optimizers."""

from __future__ import annotations

from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ConfigurationError


class Tiny(nn.Module):
    """So small that the last rank's shard is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def pair() -> tuple[Any, Any, bmt.optim.OptimManager]:
    plain, model = Tiny(), bmt.BMTrainModelWrapper(Tiny())
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    return plain, model, manager


@on_ranks(1, 2, 3)
def test_clipping_is_torchs() -> None:
    for kind in (2, 1, 3.0, "inf", float("inf")):
        for limit in (0.01, 1e6):
            plain, model, manager = pair()
            oracle.mean(plain(oracle.inputs(0))).backward()
            manager.backward(oracle.mean(model(models.share(oracle.inputs(0)))))
            theirs = torch.nn.utils.clip_grad_norm_(plain.parameters(), limit, float(kind))
            ours = manager.clip_grad_norm(manager.optimizers[0].param_groups, limit, norm_type=kind)
            assert ours.dim() == 0
            oracle.assert_close(ours, theirs, f"norm {kind}")
            oracle.assert_same_grads(model, plain)
    plain, model, manager = pair()
    assert float(manager.clip_grad_norm(model.parameters(), 1.0)) == 0.0  # no gradient at all
    assert float(manager.clip_grad_norm(model.parameters(), 1.0, "inf")) == 0.0


@pytest.mark.parametrize("loss_scale", [None, 2.0**4])
@on_ranks(1, 2)
def test_a_step_without_an_optimizer_is_refused(loss_scale: float | None) -> None:
    model = bmt.BMTrainModelWrapper(Tiny())
    manager = bmt.optim.OptimManager(loss_scale=loss_scale)
    manager.zero_grad()
    manager.backward(oracle.mean(model(models.share(oracle.inputs(0)))))
    assert float(manager.clip_grad_norm(model.parameters(), 1.0)) > 0
    with pytest.raises(bmt.errors.ConfigurationError, match="add_optimizer"):
        manager.step()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    before = model.state_dict()
    manager.step()
    assert not torch.equal(before["weight"], model.state_dict()["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@on_ranks(1, 2)
def test_an_overflow_skips_the_step_and_lowers_the_scale(dtype: torch.dtype) -> None:
    model = bmt.BMTrainModelWrapper(Tiny()).to(dtype)
    manager = bmt.optim.OptimManager(loss_scale=2.0**10, loss_scale_steps=2, max_loss_scale=2.0**11)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=0.1)
    schedule = bmt.lr_scheduler.NoDecay(optimizer, 0.1, 0, 10)
    manager.add_optimizer(optimizer, schedule)
    plain = Tiny()
    scales = []
    for step in range(5):
        before = model.state_dict()["weight"]
        x = torch.ones(1, 6, dtype=dtype)
        if step == 1 and bmt.rank() == 0:  # one rank overflows: all of them skip the step
            x = x * float("inf")
        manager.zero_grad()
        manager.backward(model(x).float().sum())
        if step != 1:
            norm = float(manager.clip_grad_norm(optimizer.param_groups, 1e6))
            assert norm == pytest.approx(6**0.5, rel=1e-3), "the norm is of the unscaled gradient"
        manager.step()
        unchanged = torch.equal(model.state_dict()["weight"], before)
        assert unchanged == (step == 1)
        scales.append(manager.loss_scale)
    assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**10, 2.0**10]
    assert schedule.num_iter == 4, "a skipped step does not count"
    assert plain.weight.shape == model.weight.shape


@on_ranks(1, 2)
def test_torch_optimizers_see_unscaled_gradients() -> None:
    plain, model = Tiny(), bmt.BMTrainModelWrapper(Tiny())
    manager = bmt.optim.OptimManager(loss_scale=2.0**8)
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.5)
    for step in range(3):
        sgd.zero_grad()
        manager.zero_grad()
        oracle.mean(plain(oracle.inputs(step))).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        sgd.step()
        manager.backward(oracle.mean(model(models.share(oracle.inputs(step)))))
        manager.clip_grad_norm(model.parameters(), 0.1)
        manager.step()
    oracle.assert_same_weights(model, plain, limit=1e-4)


@on_ranks(1, 2)
def test_state_of_several_optimizers() -> None:
    def parts(model: Any) -> list[list[Any]]:
        return [list(model[0].parameters()), list(model[1].parameters()), list(model[2].parameters())]

    def make() -> tuple[Any, bmt.optim.OptimManager]:
        torch.manual_seed(0)
        model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 3)))
        one, two, three = parts(model)
        manager = bmt.optim.OptimManager(loss_scale=16.0)
        adam = bmt.optim.AdamOptimizer(one, lr=1e-2)
        manager.add_optimizer(adam, bmt.lr_scheduler.Cosine(adam, 1e-2, 2, 20))
        manager.add_optimizer(torch.optim.SGD(two, lr=1e-2, momentum=0.9))
        manager.add_optimizer(bmt.optim.AdamOffloadOptimizer(three, lr=1e-3))
        return model, manager

    def run(model: Any, manager: bmt.optim.OptimManager, first: int, last: int) -> None:
        for step in range(first, last):
            manager.zero_grad()
            manager.backward(oracle.mean(model(models.share(oracle.inputs(step)))))
            manager.step()

    straight, manager = make()
    run(straight, manager, 0, 6)
    for gather in (True, False):
        model, manager = make()
        run(model, manager, 0, 3)
        weights, state = model.state_dict(), manager.state_dict(gather_opt=gather)
        model, manager = make()
        model.load_state_dict(weights)
        manager.load_state_dict(state)
        run(model, manager, 3, 6)
        oracle.assert_same_weights(model, straight, exact=True)
    with pytest.raises(ValueError, match="3 optimizers"):
        bmt.optim.OptimManager().load_state_dict(state)


@on_ranks(1, 2, 3)
def test_accumulate_then_clip() -> None:
    plain, model, manager = pair()
    for micro in range(4):
        (oracle.mean(plain(oracle.inputs(micro))) / 4).backward()
        manager.backward(oracle.mean(model(models.share(oracle.inputs(micro)))) / 4)
    oracle.assert_same_grads(model, plain)
    norm = manager.clip_grad_norm(model.parameters(), 0.01)
    oracle.assert_close(norm, torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01), "norm")
    manager.backward(oracle.mean(model(models.share(oracle.inputs(9)))))  # after clipping, added to what was clipped
    oracle.mean(plain(oracle.inputs(9))).backward()
    oracle.assert_same_grads(model, plain)


def bare_backward() -> float:
    """Without the manager a backward gives the mean over ranks, unless the published sum was asked for."""
    model = bmt.BMTrainModelWrapper(Tiny())
    model(torch.full((1, 6), 1.0 + bmt.rank())).sum().backward()
    found = bmt.gather_grad(model.weight)
    assert found is not None
    return float(found[0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_bare_backward_is_the_mean_over_ranks(world_size: int) -> None:
    total = sum(range(1, world_size + 1))
    assert run_ranks(world_size, bare_backward) == [total / world_size] * world_size
    assert run_ranks(world_size, bare_backward, init={"gradients": "sum"}) == [total] * world_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_ranks(3)
def test_ranks_may_use_different_parameters_of_a_block(dtype: torch.dtype) -> None:
    """Some parameters get gradients on some ranks only, one on none."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ParameterList([nn.Parameter(torch.full((6,), i + 1.0)) for i in range(4)])

        def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
            return x * self.experts[which]

    plain, model = Experts().to(dtype), bmt.BMTrainModelWrapper(Experts()).to(dtype)
    manager = bmt.optim.OptimManager()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2, weight_decay=0.1)
    manager.add_optimizer(optimizer)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        manager.zero_grad()
        adam.zero_grad()
        x = torch.ones(2, 6, dtype=dtype)
        manager.backward(model(x, bmt.rank()).sum())
        sum(plain(x, rank).sum() / bmt.world_size() for rank in range(bmt.world_size())).backward()  # type: ignore[union-attr]
        manager.step()
        adam.step()
    oracle.assert_same_weights(model, plain, limit=1e-5 if dtype == torch.float32 else 2e-2)
    assert len(optimizer.state_dict()["state"]) == bmt.world_size(), "an unused expert does not decay"


@on_ranks(2)
def test_fp32_overflow_is_found() -> None:
    model = bmt.BMTrainModelWrapper(Tiny())
    manager = bmt.optim.OptimManager(loss_scale=4.0, loss_scale_steps=1000, min_loss_scale=2.0)
    manager.add_optimizer(bmt.optim.AdamOptimizer(model.parameters(), lr=0.1))
    for _ in range(3):
        manager.backward(model(torch.full((1, 6), float("nan"))).sum())
        manager.step()
    assert manager.loss_scale == 2.0
    assert not model.state_dict()["weight"].isnan().any(), "fp32 gradients are checked too"


@on_ranks(1)
def test_several_optimizers_at_once_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, device=context().device.torch_device))
    one, other = (torch.optim.SGD([parameter], lr=0.1) for _ in range(2))
    for several in ([one, other], (one, other), {"a": one}, []):
        with pytest.raises(ConfigurationError, match=r"one optimizer, not a \w+\. Call it once for each"):
            bmt.optim.OptimManager().add_optimizer(several)  # type: ignore[arg-type]
