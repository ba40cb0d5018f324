"""Optimizers of other packages, which write to ``p.data`` as was usual before ``torch.no_grad``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks

import bmtrain as bmt
from bmtrain.checkpoint import Sharded, load_sharded, load_state_dict, save_sharded
from bmtrain.errors import ConfigurationError


class Lookahead(torch.optim.Optimizer):
    """Holds another one, and does not call ``super().__init__()``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", torch.zeros_like(p.data))
            slow += (p.data - slow) * 0.5
            p.data.copy_(slow)


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, written through ``.data``."""

    def __init__(self, params: Any, lr: float, name: str = "momentum") -> None:
        super().__init__(params, {"lr": lr})
        self.name = name

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault(self.name, torch.zeros_like(p.data))
                    momentum.mul_(0.9).add_(p.grad.data)
                    p.data.mul_(1 - 1e-3).addcmul_(momentum, torch.ones_like(p.data), value=-group["lr"])
                    p.data[p.data > 100] = 0


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, plain: torch.nn.Module, same: Any) -> None:
    """Three steps of each on the same batches."""
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    for step in range(3):
        batch = models.batch("gpt", step)
        model.zero_grad()
        plain.zero_grad()
        manager.backward(model(*batch))
        plain(*batch).backward()
        manager.step()
        same.step()
    oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_optimizers_that_write_data() -> None:
    model, plain = models.build("gpt", models.sharded()), models.build("gpt", models.plain())
    train(model, Momentum(model.parameters(), 0.1), plain, Momentum(plain.parameters(), 0.1))


@on_ranks(1, 3, long=(2,))
def test_a_momentum_may_have_the_name_of_a_number_of_torchs(tmp_path: Path) -> None:
    """As LARS's ``mu``, which ASGD has one of for a parameter.  What is saved goes on, from one file or in parts."""
    for name in ("mu", "eta", "step", "mu_product"):
        model, plain = models.build("gpt", models.sharded()), models.build("gpt", models.plain())
        own, same = (Momentum(m.parameters(), 0.1, name) for m in (model, plain))
        train(model, own, plain, same)
        save_sharded({"optimizer": Sharded(own)}, tmp_path / name)
        bmt.synchronize()
        for state in (own.state_dict(), same.state_dict(), load_sharded(tmp_path / name)["optimizer"]):
            again = Momentum(model.parameters(), 0.1, name)
            load_state_dict(again, state)
            for one, other in zip(
                again.state_dict()["state"].values(), same.state_dict()["state"].values(), strict=True
            ):
                torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@on_ranks(1, 2)
def test_one_that_torch_has_not_set_up() -> None:
    model, plain = models.build("gpt", models.sharded()), models.build("gpt", models.plain())
    own, reference = (Lookahead(torch.optim.SGD(m.parameters(), 1e-1)) for m in (model, plain))
    train(model, own, plain, reference)
    shapes = {number: tuple(state["slow"].shape) for number, state in own.state_dict()["state"].items()}
    assert shapes == {number: tuple(p.shape) for number, p in enumerate(plain.parameters())}


class Hooked(Lookahead):
    """The same with torch's hooks, by which a step that no manager drives is found out."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, {})
        super().__init__(optimizer)


@on_ranks(1, 2)
def test_one_whose_inner_optimizer_a_manager_drives_steps_by_itself() -> None:
    model, plain = models.build("gpt", models.sharded()), models.build("gpt", models.plain())
    inner = torch.optim.SGD(model.parameters(), 0.1)
    outer, same = Hooked(inner), Hooked(torch.optim.SGD(plain.parameters(), 0.1))
    bmt.optim.OptimManager(loss_scale=None).add_optimizer(inner)
    for step in range(3):
        batch = models.batch("gpt", step)
        model.zero_grad()
        plain.zero_grad()
        model(*batch).backward()
        plain(*batch).backward()
        outer.step()
        same.step()
    oracle.assert_same_weights(model, plain)


@on_ranks(2)
def test_one_whose_inner_optimizer_nobody_drives_is_refused() -> None:
    model = models.build("gpt", models.sharded())
    outer = Hooked(torch.optim.SGD(model.parameters(), 0.1))
    model(*models.batch("gpt", 0)).backward()
    with pytest.raises(ConfigurationError, match="OptimManager drives it"):
        outer.step()


class Around:
    """Has an optimizer's methods and is none, as apex's LARC."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optim, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    def step(self) -> None:
        self.optim.step()


class PassesOn(Around):
    """And answers for the one that it holds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optim"], name)


@on_ranks(2)
@pytest.mark.parametrize("kind", [Around, PassesOn])
def test_what_is_no_optimizer_is_named(kind: type[Around]) -> None:
    around: Any = kind(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match=rf"{kind.__name__} is no torch\.optim\.Optimizer: give add_optimizer"):
        bmt.optim.OptimManager().add_optimizer(around)
