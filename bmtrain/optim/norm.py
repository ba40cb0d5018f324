"""Norms and scaling of gradients that lie in shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import kernels
from ..context import context
from ..shard.flat import FlatShard
from .loss_scale import Overflow
from .pieces import Chosen, Piece


def _by_weight(found: Sequence[Piece]) -> dict[float, list[torch.Tensor]]:
    """The gradients of pieces by what they are to be multiplied with; mostly one weight."""
    groups: dict[float, list[torch.Tensor]] = {}
    for piece in found:
        groups.setdefault(piece.flat.gradient.weight, []).append(piece.grad)
    return groups


def _sum_of_powers(found: Sequence[Piece], norm_type: float) -> torch.Tensor:
    """What the gradients' norm is the root of, or their largest entry for the infinity norm: 0-d float64."""
    device = context().device.torch_device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for weight, grads in _by_weight(found).items():
        if norm_type == float("inf"):
            peak = torch.stack([g.abs().max().double() for g in grads]).max() * weight
            total = torch.maximum(total, peak.to(device))
        elif norm_type == 2.0:
            total += kernels.sum_of_squares(grads).to(device) * weight**2
        else:
            for grad in grads:
                total += grad.abs().double().pow(norm_type).sum().to(device) * weight**norm_type
    return total


@torch.no_grad()
def global_norm(chosen: Chosen, norm_type: float = 2.0, spoils: torch.Tensor | None = None) -> torch.Tensor:
    """Norm of all gradients of ``chosen`` over all ranks: a 0-d fp32 tensor, equal on all ranks.  Collective.

    ``spoils``, 0-d, is 0, or NaN on a rank that wants no rank's norm to be finite.
    """
    ctx = context()
    for flat in chosen.flats:
        if flat.gradient.present and flat.gradient.factor is not None:
            flat.gradient.settled()
    found = chosen.present
    sharded = _sum_of_powers(
        [piece for piece in found if isinstance(piece.flat, FlatShard) and piece.flat.is_counted], norm_type
    )
    replicated = _sum_of_powers([piece for piece in found if not isinstance(piece.flat, FlatShard)], norm_type)
    if spoils is not None:
        sharded += spoils
    if norm_type == float("inf"):
        if ctx.model_group.world_size > 1:
            sharded.nan_to_num_(nan=float("inf"), posinf=float("inf"))  # a maximum over ranks may lose a NaN
        ctx.model_group.all_reduce(sharded, "max")
        return torch.maximum(sharded, replicated).float()
    ctx.model_group.all_reduce(sharded, "sum")
    total = sharded + replicated
    return total.pow(1.0 / norm_type).float()


@torch.no_grad()
def clip_(
    chosen: Chosen,
    max_norm: float,
    norm_type: float,
    loss_scale: float | torch.Tensor,
    eps: float,
    spoils: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply gradients by ``max_norm / (norm + eps)``, at most 1; returns ``norm``.  Collective.

    Gradients carry the loss scale and ``norm`` does not; the factor is the same for both.
    """
    chosen.finish_gradients()
    norm = global_norm(chosen, norm_type, spoils) / loss_scale
    scale_grads_(chosen, (max_norm / (norm + eps)).clamp(max=1.0))
    return norm


@torch.no_grad()
def scale_grads_(chosen: Chosen, factor: float | torch.Tensor) -> None:
    """Multiply every gradient of ``chosen`` by ``factor``; a whole flat one when it is next read."""
    factor = torch.as_tensor(factor, dtype=torch.float32, device=context().device.torch_device)
    for flat in chosen.flats:
        indices = chosen.indices_in(flat)
        if not flat.gradient.present:
            continue
        if indices is None:
            flat.gradient.scale_(factor)
            continue
        part = flat.gradient.settled()
        flat.gradient.note_write()
        for index in indices:
            flat.local(part, index).mul_(factor)
    for home in chosen.replicated:
        home.gradient.scale_(factor)


@torch.no_grad()
def find_overflow(chosen: Chosen) -> Overflow:
    """Whether any rank has an infinite or NaN gradient.  Collective."""
    ctx = context()
    grads = [piece.grad for piece in chosen.present]
    flag = torch.zeros((), device=ctx.device.torch_device)
    if grads:
        flag.copy_(kernels.has_inf_or_nan(grads))
    ctx.world.all_reduce(flag, "max")
    return Overflow(ctx, flag)
