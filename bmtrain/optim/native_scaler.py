"""timm's ``NativeScaler``, by which one call makes the backward, clips and steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..autograd import never_compiled
from ..errors import ConfigurationError
from ..shard.sharded_tensor import ShardedTensor
from .manager import OptimManager


class NativeScaler:
    """What ``timm.utils.NativeScaler`` is to a plain script: an OptimManager with a loss scale, behind one call.

    It drives every optimizer that it is called with, and its state is that of a GradScaler.
    """

    state_dict_key = "amp_scaler"

    def __init__(self, device: str | torch.device = "cuda") -> None:
        """``device`` is timm's, and not looked at: it is the rank's."""
        self._manager = OptimManager(loss_scale=2**16)

    @never_compiled
    def __call__(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[torch.Tensor] | torch.Tensor | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> None:
        """Backward, and if ``need_update`` clip ``parameters`` and step.  Collective.

        Args:
            loss: 0-d; gradients are the mean over ranks of each rank's.
            clip_grad, clip_mode: None, or the largest norm ("norm"), value ("value"), or share of the norm of a unit's
                weights ("agc").

        Raises ConfigurationError for another ``clip_mode``, and to clip without ``parameters``.
        """
        if clip_grad is not None and (parameters is None or clip_mode not in ("norm", "value", "agc")):
            raise ConfigurationError(
                f'clip_grad needs parameters, and a clip_mode of "norm", "value" or "agc", not {clip_mode!r}.'
            )
        if optimizer not in self._manager.optimizers:
            self._manager.add_optimizer(optimizer)
        if create_graph:
            self._manager.scale_loss(loss).backward(create_graph=True)  # type: ignore[no-untyped-call]
        else:
            self._manager.backward(loss)
        if not need_update:
            return
        if clip_grad is not None and parameters is not None:
            chosen = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            if clip_mode == "norm":
                self._manager.clip_grad_norm(chosen, clip_grad)
            else:
                self._manager.unscale(optimizer)
                clip = torch.nn.utils.clip_grad_value_ if clip_mode == "value" else _clip_by_units
                clip(chosen, clip_grad)
        self._manager.step(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale, as a GradScaler's state."""
        return self._manager.scaler_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the loss scale of ``state_dict()``, or of a GradScaler's."""
        self._manager.load_scaler_state_dict(state_dict)


@torch.no_grad()
def _clip_by_units(parameters: list[torch.Tensor], share: float) -> None:
    """Clip the gradient of each unit, a row of a weight or a whole vector, at ``share`` of its weights' norm."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        weights, whole = _whole(parameter.detach()), _whole(gradient)
        most = _norm_of_units(weights).clamp_(min=1e-3).mul_(share)
        norm = _norm_of_units(whole)
        gradient.copy_(torch.where(norm < most, whole, whole * (most / norm.clamp(min=1e-6))))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, ShardedTensor) else tensor


def _norm_of_units(whole: torch.Tensor) -> torch.Tensor:
    dims = tuple(range(1, whole.ndim)) or None
    norm: torch.Tensor = torch.linalg.vector_norm(whole, dim=dims, keepdim=dims is not None)
    return norm
