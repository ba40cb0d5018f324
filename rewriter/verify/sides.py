"""How the original model and the converted one train; everything else they do alike."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-4}
"""A large eps: Adam divides a gradient by its own size, so with a small one a parameter whose true gradient is zero
would move by rounding error at full speed."""


def seed_all(seed: int) -> None:
    """Seed every generator a model may draw from."""
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed)


class Side(Protocol):
    """One way of training."""

    def start(self, seed: int, device: str, meeting: str) -> None:
        """Before any model is built."""

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the mean over ranks of ``loss``."""

    def grad(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The whole gradient."""

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make AdamW for the coming steps."""

    def step(self, max_norm: float) -> float:
        """Clip, update, forget the gradients. Returns the norm before clipping."""

    def save(self, model: nn.Module, path: str) -> None:
        """Write a checkpoint."""

    def unsharded(self, model: nn.Module) -> list[str]:
        """Names of parameters that every rank holds whole."""

    def split(self, model: nn.Module) -> list[str]:
        """Names of parameters of which tensor-parallel ranks hold slices."""


class Original:
    """Plain torch on one process."""

    def start(self, seed: int, device: str, meeting: str) -> None:
        seed_all(seed)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def grad(self, parameter: nn.Parameter) -> torch.Tensor | None:
        return parameter.grad

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, **OPTIMIZER)

    def step(self, max_norm: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._parameters, max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def save(self, model: nn.Module, path: str) -> None:
        torch.save(model.state_dict(), path)

    def unsharded(self, model: nn.Module) -> list[str]:
        return []

    def split(self, model: nn.Module) -> list[str]:
        return []


class Converted:
    """bmtrain on as many ranks as there are, ``tp_size`` of which hold slices; each method is collective."""

    def __init__(self, tp_size: int = 1) -> None:
        self.tp_size = tp_size

    def start(self, seed: int, device: str, meeting: str) -> None:
        # By name: the rewriter does not depend on bmtrain; the converted code that runs here does.
        self._bmt: Any = importlib.import_module("bmtrain")
        # Ranks that get the same inputs are compared with one process, dropout and all.
        self._bmt.init_distributed(f"file://{meeting}", seed=seed, tp_size=self.tp_size, device=device, random="shared")
        self._manager = self._bmt.optim.OptimManager()

    def backward(self, loss: torch.Tensor) -> None:
        self._manager.backward(loss)

    def grad(self, parameter: nn.Parameter) -> torch.Tensor | None:
        gradient: torch.Tensor | None = self._bmt.gather_grad(parameter, join=True)
        return gradient

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer = self._bmt.optim.AdamOptimizer(list(parameters), **OPTIMIZER)
        self._manager = self._bmt.optim.OptimManager()
        self._manager.add_optimizer(self._optimizer)

    def step(self, max_norm: float) -> float:
        norm = self._manager.clip_grad_norm(self._optimizer.param_groups, max_norm)
        self._manager.step()
        self._manager.zero_grad()
        return float(norm)

    def save(self, model: nn.Module, path: str) -> None:
        self._bmt.save(model, path)

    def unsharded(self, model: nn.Module) -> list[str]:
        if self._bmt.world_size() == self.tp_size:
            return []  # nobody else has the same slices
        return [
            name
            for name, p in model.named_parameters()
            if p.numel() > 1 and p.untyped_storage().nbytes() >= p.numel() * p.element_size()
        ]

    def split(self, model: nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if getattr(p, "_tp_mode", False)]
