"""The optimizers that OptimManager drives: those that know shards, and torch's, which ``adapt`` makes step on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch

from .loss_scale import Overflow


class ShardOptimizer(Protocol):
    """An optimizer that steps on shards by itself.  It says so by ``_bmtrain_optimizer``, the published mark."""

    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], float] | None = None, scale: float = 1.0) -> float | None:
        """Update from the reduced gradients divided by ``scale``.  Collective."""

    def state_dict(self, gather: bool = False) -> dict[str, Any]:
        """Whole states (collective) or this rank's shards."""


class SkippingOptimizer(Protocol):
    """One that also leaves out a step on the device's word.  It says so by ``skips_on_device``."""

    def step(
        self,
        closure: Callable[[], float] | None = None,
        scale: float | torch.Tensor | None = None,
        overflow: Overflow | None = None,
    ) -> float | None:
        """The same; after an ``overflow`` nothing changes.  Neither it nor a scale on the device is waited for."""


@runtime_checkable
class CheckingOptimizer(Protocol):
    """One that can say of a state whether it would load it."""

    def check_state(self, state_dict: object) -> None:
        """Raises CheckpointError on every rank if it cannot be loaded.  Collective."""


def knows_shards(optimizer: object) -> TypeGuard[ShardOptimizer]:
    """Whether ``optimizer`` steps on shards by itself."""
    return bool(getattr(optimizer, "_bmtrain_optimizer", False))


def skips_on_device(optimizer: object) -> TypeGuard[SkippingOptimizer]:
    """Whether it also leaves out a step on the device's word."""
    return bool(getattr(optimizer, "skips_on_device", False))
