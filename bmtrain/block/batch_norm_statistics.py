"""Running statistics of batch and instance norms: each rank's are of its own share of the data.

Left alone they would make every rank evaluate another model, and decide otherwise what to keep, in a branch that may
hold a collective. So before a model is evaluated or saved, every rank gets their mean.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..comm import ops
from ..context import context
from ..log import warn
from .record import Record


def note_run(model: nn.Module, record: Record) -> None:
    """Before a whole model's forward: remember one that trains, level before one that does not."""
    if not model.training:
        level(model, record)
        return
    if record.has_statistics is None:
        record.has_statistics = bool(_statistics(model))
        _warn_of_lonely_sync(model)
        _warn_of_shares(model)
    record.trained = record.has_statistics


def _warn_of_lonely_sync(model: nn.Module) -> None:
    """SyncBatchNorm talks through torch's own process group, and without one it is silently an ordinary batch norm."""
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if synced and context().rank == 0 and not torch.distributed.is_initialized():
        warn(
            "nn.SyncBatchNorm sees each rank's share of the batch only, as torch has no process group here. Call "
            'torch.distributed.init_process_group("nccl") beside bmt.init_distributed().',
            stacklevel=2,
        )


def _warn_of_shares(model: nn.Module) -> None:
    """A batch norm that trains sees each rank's share of the batch, as under DDP."""
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.training
    ]
    if norms and context().rank == 0 and context().topology.data_size > 1:
        more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
        warn(
            f"The batch norm {norms[0]}{more} normalises by each rank's share of the batch alone, not by the whole "
            "batch. nn.SyncBatchNorm.convert_sync_batchnorm(model) before it is sharded, with a process group of "
            "torch's on GPUs, sees the whole; layer and group norms, and batch norms in eval(), do not ask.",
            stacklevel=2,
        )


def level(model: nn.Module, record: Record) -> None:
    """Give all ranks the mean of their running statistics, if they trained since the last time.  Collective."""
    if not record.trained:
        return
    record.trained = False
    values = _statistics(model)
    with torch.no_grad():
        flat = ops.all_reduce(torch.cat([value.flatten().float() for value in values]), "avg", context().world)
        start = 0
        for value in values:
            value.copy_(flat[start : start + value.numel()].view_as(value))
            start += value.numel()


def _statistics(model: nn.Module) -> list[torch.Tensor]:
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    values = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    return [value for value in values if value is not None]
