"""Parameters that no distributed module holds: every rank keeps them whole, and their gradients are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch

from ..alike import follow_rank_0
from ..context import Context, context
from ..errors import ConfigurationError
from ..log import warn
from ..shard.engine import engine
from ..shard.layout import Layout, make_layout

_LARGE = 2**24
"""Elements from which somebody may have meant to shard them."""


class Replicated:
    """One such parameter, as a flat shard of which this rank keeps all.

    Complex numbers are laid out as pairs of real ones.  Made when it is needed: it keeps nothing itself.

    Attributes:
        key, remainder, version: as a FlatShard's.  Writes are not noticed, so that no version equals one seen before.
    """

    remainder: torch.Tensor | None = None

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter, self.key = parameter, id(parameter)
        self.params = [parameter]
        self.dtype = parameter.dtype.to_real() if parameter.is_complex() else parameter.dtype
        self.version = float("nan")
        self.gradient = ReplicatedGradient(self)

    @cached_property
    def layout(self) -> Layout:
        """One slot, of one rank."""
        return make_layout((tuple(self.shard.shape),), 1)

    @cached_property
    def shard(self) -> torch.Tensor:
        """(n,) the values."""
        if not self.parameter.is_contiguous():
            self.parameter.data = self.parameter.data.contiguous()
        return _real(self.parameter.detach()).view(-1)

    def local(self, shard_like: torch.Tensor, index: int) -> torch.Tensor:
        """All of a tensor laid out like ``shard``."""
        return shard_like

    def local_part(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        """The same from a tensor of the parameter's shape."""
        return _real(whole).reshape(-1)

    def whole(self, shard_like: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape from one laid out like ``shard``."""
        if self.parameter.is_complex():
            return torch.view_as_complex(shard_like.view(*self.parameter.shape, 2))
        return shard_like.view(self.parameter.shape)

    def count_change(self, indices: Iterable[int] | None = None) -> None:
        """No version equals another."""

    def keep_writes(self) -> None:
        """Writes are where they belong already."""

    def clear_grad(self) -> None:
        """Forget the gradient."""
        self.parameter.grad = None


class ReplicatedGradient:
    """The gradient of a Replicated; the mean over ranks once ``average`` was called."""

    factor: torch.Tensor | None = None
    weight = 1.0

    def __init__(self, home: Replicated) -> None:
        self._home = home
        self.dtype = torch.float32 if home.dtype in (torch.float16, torch.bfloat16) else home.dtype

    @property
    def present(self) -> bool:
        """Whether there is one."""
        return self._home.parameter.grad is not None

    def used(self) -> list[bool]:
        """The same for each parameter; ``average`` gives one to all ranks if any has one."""
        return [self.present]

    def values(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(n,) the gradient, and that no factor is pending."""
        grad = self._home.parameter.grad
        assert grad is not None
        if grad.is_sparse:
            grad = self._home.parameter.grad = grad.to_dense()
        return _real(grad).reshape(-1), None

    def settled(self) -> torch.Tensor:
        """(n,) the gradient in the dtype of sums."""
        return self.values()[0].to(self.dtype)

    def scale_(self, factor: torch.Tensor) -> None:
        """Multiply by ``factor``."""
        if self._home.parameter.grad is not None:
            self._home.parameter.grad.mul_(factor)


def adopt(homes: Sequence[Replicated]) -> None:
    """Before the first step: give every rank rank 0's values.  Collective."""
    ctx = context()
    if ctx.world_size == 1 or not homes:
        return
    if ctx.gradient_divisor != ctx.topology.data_size:
        raise ConfigurationError(
            "This optimizer has parameters that no distributed module holds. Every rank keeps them, and their "
            'gradients are averaged, which does not fit bmt.init_distributed(gradients="sum").'
        )
    engine().of_no_module.drive([home.parameter for home in homes], _average_grads)
    values = {f"number {n}": home.parameter.data for n, home in enumerate(homes)}
    differing = follow_rank_0(ctx, "The optimizer", values)
    numel = sum(home.parameter.numel() for home in homes)
    if ctx.rank == 0 and differing:
        warn(
            f"{len(differing)} parameters that no distributed module holds had other values on other ranks; rank 0's "
            "are used on all.",
            stacklevel=4,
        )
    if ctx.rank == 0 and numel >= _LARGE:
        warn(
            f"Every rank keeps {numel:,} parameters of this optimizer whole, since no distributed module holds them. "
            "To shard them, let their module's class derive from bmt.DistributedModule, or call "
            "bmt.BMTrainModelWrapper(model), before the optimizer is made.",
            stacklevel=4,
        )


def average(homes: Iterable[Replicated]) -> None:
    """Make gradients their mean over ranks; what is a mean already stays.  Collective.

    A rank without a gradient counts as zeros, unless no rank has one.
    """
    _average_grads([home.parameter for home in homes])


@torch.no_grad()
def _average_grads(params: Sequence[torch.Tensor]) -> None:
    ctx = context()
    if ctx.world_size == 1 or not params:
        return
    present = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device="cpu")
    ctx.control.all_reduce(present, "max")
    alike: dict[tuple[torch.dtype, str], list[torch.Tensor]] = {}
    for parameter, there in zip(params, present.tolist(), strict=True):
        if not there:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
        real = _real(parameter.grad)
        alike.setdefault((real.dtype, real.device.type), []).append(real)
    for grads in alike.values():
        _average(ctx, grads)


def _average(ctx: Context, grads: list[torch.Tensor]) -> None:
    """Average tensors of one dtype and device in one exchange."""
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    communicator = ctx.world if flat.device.type == ctx.device.torch_device.type else ctx.control
    communicator.all_reduce(flat, "avg")
    for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
