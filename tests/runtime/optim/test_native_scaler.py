"""``bmt.optim.NativeScaler`` does on shards what timm's does on whole parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import CheckpointError, ConfigurationError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


def build() -> Net:
    torch.manual_seed(3)
    return Net()


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(step))


def norm_of_units(x: torch.Tensor) -> torch.Tensor:
    return x.norm() if x.ndim < 2 else x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def clip_by_units(parameters: list[Any], share: float) -> None:
    for p in parameters:
        most = norm_of_units(p.detach()).clamp(min=1e-3) * share
        norm = norm_of_units(p.grad)
        p.grad = torch.where(norm < most, p.grad, p.grad * (most / norm.clamp(min=1e-6)))


CLIPS: dict[str, Callable[[list[Any], float], Any]] = {
    "norm": nn.utils.clip_grad_norm_,
    "value": nn.utils.clip_grad_value_,
    "agc": clip_by_units,
}


def plainly(mode: str | None, limit: float, accumulated: int) -> dict[str, torch.Tensor]:
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, eps=1e-3)
    for step in range(6):
        net(batch(step)).square().mean().backward()
        if (step + 1) % accumulated == 0:
            if mode is not None:
                CLIPS[mode](list(net.parameters()), limit)
            optimizer.step()
            optimizer.zero_grad()
    return net.state_dict()


CASES = [(None, 0.0, 1), ("norm", 0.1, 1), ("value", 0.01, 1), ("agc", 0.02, 1), ("agc", 0.02, 2), ("norm", 0.1, 3)]


@pytest.mark.parametrize(("mode", "limit", "accumulated"), CASES)
@on_ranks(1, 2)
def test_steps_as_timms(mode: str | None, limit: float, accumulated: int) -> None:
    net = bmt.BMTrainModelWrapper(build())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, eps=1e-3)
    scaler = bmt.optim.NativeScaler()
    for step in range(6):
        own = batch(step).chunk(bmt.world_size())[bmt.rank()]
        ends = (step + 1) % accumulated == 0
        given = {} if mode is None else {"clip_grad": limit, "clip_mode": mode, "parameters": net.parameters()}
        scaler(net(own).square().mean(), optimizer, need_update=ends, **given)
        if ends:
            optimizer.zero_grad()
    wanted = plainly(mode, limit, accumulated)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, wanted[name.removeprefix("module.")], rtol=1e-5, atol=1e-6)


@on_ranks(1)
def test_its_state_is_that_of_a_grad_scaler() -> None:
    scaler = bmt.optim.NativeScaler("cpu")
    kind = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert scaler.state_dict().keys() == kind.state_dict().keys()
    kind.load_state_dict({**kind.state_dict(), "scale": 512.0, "_growth_tracker": 7})
    scaler.load_state_dict(kind.state_dict())  # before it knows of an optimizer, as in a resumed run
    assert scaler.state_dict() == kind.state_dict()
    scaler.load_state_dict({})  # of a run without one
    assert scaler.state_dict()["scale"] == 512.0
    with pytest.raises(CheckpointError, match="no state of a loss scale"):
        scaler.load_state_dict({"loss_scale": 2.0})
    without = bmt.optim.OptimManager(loss_scale=None)
    without.load_scaler_state_dict(kind.state_dict())
    assert without.scaler_state_dict() == {}


@pytest.mark.parametrize("given", [{"clip_grad": 1.0}, {"clip_grad": 1.0, "clip_mode": "units"}])
@on_ranks(1)
def test_says_how_to_clip(given: dict[str, Any]) -> None:
    net = bmt.BMTrainModelWrapper(build())
    if "clip_mode" in given:
        given["parameters"] = net.parameters()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="clip_grad needs parameters"):
        bmt.optim.NativeScaler()(net(batch(0)).mean(), optimizer, **given)
