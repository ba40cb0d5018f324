"""One object that drives a training step: loss scale, backward, clipping, optimizers, schedules."""

from __future__ import annotations

from typing import Any

import torch

from ..context import context
from ..errors import ConfigurationError
from .adam import clear_grads
from .adapt import adapt
from .norm import clip_, overflowed, scale_grads_
from .pieces import all_params, params_of


class OptimManager:
    """Drives optimizers and their learning-rate schedules.

    Args:
        loss_scale: initial loss scale for fp16; None trains without one.
        loss_scale_factor, loss_scale_steps: the scale is divided by the factor when a gradient overflows, and
            multiplied by it after so many good steps.
        min_loss_scale, max_loss_scale: its bounds.
        grad_scale: losses are divided by this; None means the world size, so that gradients are means over ranks.

        optim_manager = bmt.optim.OptimManager()
        optim_manager.add_optimizer(optimizer, lr_scheduler)
        ...
        optim_manager.zero_grad()
        optim_manager.backward(loss)
        norm = optim_manager.clip_grad_norm(optimizer.param_groups, 1.0)
        optim_manager.step()
    """

    def __init__(
        self,
        loss_scale: float | None = None,
        loss_scale_factor: float = 2,
        loss_scale_steps: int = 1024,
        min_loss_scale: float = 1,
        max_loss_scale: float = float("inf"),
        grad_scale: float | None = None,
    ) -> None:
        if loss_scale is not None and loss_scale <= 0:
            raise ConfigurationError(f"loss_scale must be positive or None, not {loss_scale}.")
        self.loss_scale_enabled = loss_scale is not None
        self.loss_scale = 1.0 if loss_scale is None else float(loss_scale)
        self.loss_scale_factor, self.loss_scale_steps = loss_scale_factor, loss_scale_steps
        self.min_loss_scale, self.max_loss_scale = min_loss_scale, max_loss_scale
        self.grad_scale = context().world_size if grad_scale is None else grad_scale
        self.steps_since_last_scale = 0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.lr_schedulers: list[Any] = []

    def add_optimizer(self, optimizer: torch.optim.Optimizer, lr_scheduler: Any = None) -> None:
        """Drive ``optimizer``, and ``lr_scheduler`` after each of its steps (leave it out if you step it yourself)."""
        adapt(optimizer)
        self.optimizers.append(optimizer)
        self.lr_schedulers.append(lr_scheduler)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call ``backward`` on: times the loss scale, divided by ``grad_scale``."""
        return loss * (self.loss_scale / self.grad_scale)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the mean of every rank's ``loss``, added to what is there.  Collective."""
        self.scale_loss(loss).backward()  # type: ignore[no-untyped-call]
        context().engine.finish_backward()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            clear_grads(optimizer)

    @torch.no_grad()
    def clip_grad_norm(
        self, param_groups: Any, max_norm: float, norm_type: float | str = 2, eps: float = 1e-6
    ) -> torch.Tensor:
        """Scale gradients so that their norm is at most ``max_norm``.  Collective; between backward and step.

        Args:
            param_groups: an optimizer's ``param_groups``, or parameters.
            norm_type: a number, or "inf".

        Returns the norm before clipping, of the unscaled gradients: a 0-d tensor, equal on all ranks.
        """
        return clip_(params_of(param_groups), max_norm, float(norm_type), self.loss_scale, eps)

    def step(self) -> None:
        """Update every optimizer and schedule.  After an overflow, only lower the loss scale and drop the gradients."""
        context().engine.finish_backward()
        if self.loss_scale_enabled and overflowed([p for o in self.optimizers for p in all_params(o.param_groups)]):
            self._rescale(self.loss_scale / self.loss_scale_factor)
            self.zero_grad()
            return
        for optimizer, schedule in zip(self.optimizers, self.lr_schedulers, strict=True):
            if getattr(optimizer, "_bmtrain_optimizer", False):
                optimizer.step(scale=self.loss_scale)  # type: ignore[call-overload]
            else:
                if self.loss_scale != 1.0:
                    scale_grads_(all_params(optimizer.param_groups), 1.0 / self.loss_scale)
                optimizer.step()
            if schedule is not None:
                schedule.step()
        self.steps_since_last_scale += 1
        if self.loss_scale_enabled and self.steps_since_last_scale >= self.loss_scale_steps:
            self._rescale(self.loss_scale * self.loss_scale_factor)

    def _rescale(self, wanted: float) -> None:
        self.steps_since_last_scale = 0
        self.loss_scale = min(max(wanted, self.min_loss_scale), self.max_loss_scale)

    def state_dict(self, gather_opt: bool = False) -> dict[str, Any]:
        """Everything needed to go on: optimizers, schedules, loss scale.

        Args:
            gather_opt: whole optimizer states, loadable at any world size (collective); False gives this rank's
                shards where the optimizer has that form.
        """
        optimizers = [
            o.state_dict(gather=gather_opt) if getattr(o, "_bmtrain_optimizer", False) else o.state_dict()  # type: ignore[call-arg]
            for o in self.optimizers
        ]
        return {
            "optimizers": optimizers,
            "lr_schedulers": [None if s is None else s.state_dict() for s in self.lr_schedulers],
            "loss_scale": self.loss_scale,
            "loss_scale_enabled": self.loss_scale_enabled,
            "steps_since_last_scale": self.steps_since_last_scale,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``.  Raises ConfigurationError when it holds another number of optimizers."""
        if len(state_dict["optimizers"]) != len(self.optimizers):
            raise ConfigurationError(
                f"The state holds {len(state_dict['optimizers'])} optimizers, this manager has {len(self.optimizers)}; "
                "add them first."
            )
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for schedule, state in zip(self.lr_schedulers, state_dict["lr_schedulers"], strict=True):
            if schedule is not None and state is not None:
                schedule.load_state_dict(state)
        self.loss_scale = state_dict["loss_scale"]
        self.loss_scale_enabled = state_dict["loss_scale_enabled"]
        self.steps_since_last_scale = state_dict.get("steps_since_last_scale", 0)

