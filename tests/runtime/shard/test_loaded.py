"""Models that a class method of a library loads: built without values, given them, and then sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block.sharded import owned_units


class Library(nn.Module):
    """Loads as libraries do: on the meta device, and every tensor of the file becomes the parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(width, width)
        self.register_buffer("positions", torch.arange(width), persistent=False)

    @classmethod
    def from_pretrained(cls, width: int, *args: Any, info: bool = False, **kwargs: Any) -> Any:
        """Of ones."""
        with torch.device("meta"):
            model = cls(width, *args, **kwargs)
        model.positions = torch.arange(width)
        for module in model.modules():
            for name, old in list(module._parameters.items()):
                if old is not None:
                    assert old.is_meta, "it is whole until it is loaded"
                    setattr(module, name, nn.Parameter(torch.ones(old.shape)))
        return (model, {"missing": []}) if info else model


class Tagger(Library, bmt.DistributedModule):
    def __init__(self, width: int, labels: int = 2) -> None:
        super().__init__(width)
        self.head = nn.Linear(width, labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x) + self.positions)
        return out


class Grown(Tagger):
    """Goes on after the library's method has loaded it."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(*args, **kwargs)
        with torch.no_grad():
            model.head.weight.mul_(2)
        model.more = nn.Linear(3, 3)
        return model


class Ordered(bmt.DistributedModule, Library):
    pass


class OfOwn(bmt.DistributedModule):
    """Copies values into what it has built, as a model does that takes another library's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    @classmethod
    def from_pretrained(cls, value: float) -> OfOwn:
        model = cls()
        with torch.no_grad():
            for value_of in model.state_dict().values():
                value_of.copy_(torch.full_like(value_of, value))
        return model


class Pair(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Tagger.from_pretrained(3), Tagger(3)


def _values(model: nn.Module) -> dict[str, list[float]]:
    return {name: value.flatten().unique().tolist() for name, value in model.state_dict().items()}


def load(kind: str) -> tuple[Any, bool, list[float]]:
    made: dict[str, Any] = {
        "tagger": lambda: Tagger.from_pretrained(3, labels=4),
        "told": lambda: Tagger.from_pretrained(3, labels=4, info=True),
        "grown": lambda: Grown.from_pretrained(3, labels=4),
    }
    model = made[kind]()
    if isinstance(model, tuple):
        model, info = model
        assert info == {"missing": []}
    sharded = all(not p.is_meta for p in model.parameters()) and bool(list(owned_units(model)))
    out = model(torch.ones(1, 3)).flatten().tolist()
    return {n: v for n, v in _values(model).items() if not n.startswith("more")}, sharded, out


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["tagger", "told", "grown"])
def test_is_whole_until_it_is_loaded(world_size: int, kind: str) -> None:
    twice = 2.0 if kind == "grown" else 1.0
    for values, sharded, out in run_ranks(world_size, load, kind):
        assert sharded
        assert values == {"body.weight": [1.0], "body.bias": [1.0], "head.weight": [twice], "head.bias": [1.0]}
        assert out == [15 * twice + 1] * 4


def load_of_own() -> tuple[dict[str, list[float]], bool]:
    model = OfOwn.from_pretrained(0.5)
    return _values(model), bool(list(owned_units(model)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_values_that_are_copied_stay(world_size: int) -> None:
    for values, sharded in run_ranks(world_size, load_of_own):
        assert sharded and values == {"linear.weight": [0.5], "linear.bias": [0.5]}


def load_inside() -> tuple[int, bool]:
    pair = Pair()
    ordered = Ordered.from_pretrained(3)
    return len(list(owned_units(pair))), bool(list(owned_units(ordered)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_that_another_loads_is_sharded_with_it(world_size: int) -> None:
    assert run_ranks(world_size, load_inside) == [(1, True)] * world_size
