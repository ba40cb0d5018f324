"""Modules that switch autocast off inside: what they compute there has full precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import Names
from ranks import on_ranks
from torch import nn

from bmtrain.block.autocast_switches import switches_autocast

WIDTH = oracle.WIDTH


def precise(layer: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())  # type: ignore[no-any-return]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.on = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


class On(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return super().forward(x)


class Keyword(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.b(self.a(x.float()))  # type: ignore[no-any-return]


class OfFlag(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.amp.autocast(x.device.type, enabled=self.on):
            return self.b(self.a(x.float()))  # type: ignore[no-any-return]


class Positional(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, False):
            return self.b(self.a(x.float()))  # type: ignore[no-any-return]


class Decorated(Plain):
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x.float()))  # type: ignore[no-any-return]


class InMethod(Plain):
    def last(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.b(x.float())  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.a(x))


class InFunction(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return precise(self.b, self.a(x))


class InClosure(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def last() -> torch.Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return self.b(x.float())  # type: ignore[no-any-return]

        return last()


class Values(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.a.weight.float())


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.inner(x.float())  # type: ignore[no-any-return]


SWITCHES = [Keyword, OfFlag, Positional, Decorated, InMethod, InFunction, InClosure, Values, Around]


@pytest.mark.parametrize("cls", [Plain, On, nn.Linear, nn.TransformerEncoderLayer])
def test_others_are_gathered_as_autocast_casts(cls: type[nn.Module]) -> None:
    assert not switches_autocast(cls)


@pytest.mark.parametrize("cls", SWITCHES)
def test_who_switches_autocast_off_is_found(cls: type[nn.Module]) -> None:
    assert switches_autocast(cls)


def _model(cls: type[nn.Module]) -> Callable[[Names], Any]:
    def build(names: Names) -> Any:
        class Model(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.stack = names.stack([cls(), Plain()])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for block in self.stack:
                    x = block(x)
                return x

        return Model()

    return build


@on_ranks(1, 2)
def test_numbers_are_autocasts() -> None:
    for cls in SWITCHES:

        def run(model: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return oracle.mean(model(x))

        oracle.matches(_model(cls), run, steps=2, limit=2e-2)


@on_ranks(2)
def test_full_precision_is_full() -> None:
    """To fp32's last digits, where bf16 weights would differ in the third."""

    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return oracle.mean(model(x))

    def build(names: Names) -> Any:
        class Model(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.stack = names.stack([Values(), Values()])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for block in self.stack:
                    x = block(x)
                return x

        return Model()

    oracle.matches(build, run, steps=2)
