"""Classes with other bases beside the module, and what Python tells of them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import pytest
import torch
from oracle import WIDTH
from ranks import on_ranks
from torch import nn

import bmtrain as bmt


class _Scores(Protocol):
    def score(self, x: torch.Tensor) -> torch.Tensor: ...


class _Abstract(ABC):
    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...


Kind = TypeVar("Kind")


@on_ranks(2)
def test_abstract_generic_and_protocol_classes() -> None:
    """Classes that have other bases beside the module, as ``class M(nn.Module, Other)`` allows."""

    class Scorer(bmt.DistributedModule, _Abstract, _Scores, Generic[Kind]):
        def __init__(self, width: int, bias: bool = True) -> None:
            super().__init__()
            self.inner = nn.Linear(width, width, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(x)

        def score(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model = Scorer[int](WIDTH)
    assert isinstance(model, bmt.DistributedModule) and isinstance(model, _Abstract)
    assert model.inner.weight.untyped_storage().nbytes() < model.inner.weight.numel() * 4  # it is sharded
    assert model(torch.ones(2, WIDTH)).shape == (2, WIDTH)
    assert str(inspect.signature(Scorer)) == "(width: 'int', bias: 'bool' = True) -> 'None'"
    with pytest.raises(TypeError, match="abstract"):
        type("Unfinished", (_Abstract, bmt.DistributedModule), {})()
