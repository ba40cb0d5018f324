"""Saving and exchanging objects under the published module name."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch

from ..block import TransformerBlockList, whole_state
from ..checkpoint import load, save, write
from ..context import context
from ..errors import ConfigurationError
from ..objects import allgather_objects, broadcast_object

__all__ = [
    "DistributedStateDictWrapper", "DistributedTensorWrapper", "allgather_object", "allgather_objects",
    "async_save_to_file", "broadcast_object", "load", "save",
]  # fmt: skip

allgather_object = allgather_objects


class DistributedTensorWrapper:
    """A tensor that rank 0 has; ``broadcast()`` gives it to all.

    Args:
        tensor: rank 0's; the others' gives the dtype, and the shape unless ``shape`` says it.
        shape: of rank 0's.
    """

    def __init__(self, tensor: torch.Tensor, shape: Any = None) -> None:
        self._tensor = tensor
        self.shape = torch.Size(tensor.shape if shape is None else shape)
        self.dtype, self.device = tensor.dtype, tensor.device

    def broadcast(self) -> torch.Tensor:
        """Rank 0's tensor as a new one on every rank, on the device of what it was made with.  Collective."""
        ctx = context()
        if ctx.rank == 0 and self._tensor.shape != self.shape:
            raise ConfigurationError(f"The tensor has shape {tuple(self._tensor.shape)}, not {tuple(self.shape)}.")
        sent = torch.empty(self.shape, dtype=self.dtype, device=ctx.device.torch_device)
        if ctx.rank == 0:
            sent.copy_(self._tensor)
        if sent.numel():
            ctx.world.broadcast(sent.view(-1).view(torch.uint8), 0)
        return sent.to(self.device)

    def copy(self) -> torch.Tensor:
        """This rank's own tensor, as a new one."""
        return self._tensor.detach().clone()

    def numel(self) -> int:
        """Elements."""
        return self.shape.numel()


class DistributedStateDictWrapper(OrderedDict[str, Any]):
    """Rank 0's state dict on every rank, for ``model.load_state_dict``; what the others pass does not matter.
    Collective.
    """

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        own = {k: v.copy() if isinstance(v, DistributedTensorWrapper) else v for k, v in state_dict.items()}
        super().__init__(broadcast_object(own if context().rank == 0 else None))


def _save_to_rank0(
    model: torch.nn.Module, destination: MutableMapping[str, Any] | None = None, prefix: str = ""
) -> MutableMapping[str, Any]:
    """The model's whole state dict on rank 0 and an empty one elsewhere, added to ``destination``.  Collective.

    A model's own ``state_dict`` method may be made of it; it calls none.
    """
    return _save_where(context().rank == 0, model, destination, prefix)


def _save_to_local_rank0(
    model: torch.nn.Module, destination: MutableMapping[str, Any] | None = None, prefix: str = ""
) -> MutableMapping[str, Any]:
    """The same on the first rank of every node."""
    return _save_where(context().topology.local_rank == 0, model, destination, prefix)


def _save_where(
    here: bool, model: torch.nn.Module, destination: MutableMapping[str, Any] | None, prefix: str
) -> MutableMapping[str, Any]:
    whole = whole_state(model, prefix, keep=here)
    if destination is None:
        destination = whole if here else OrderedDict()
    elif here:
        destination.update(whole)
    return destination


def _save_to_infer_model(model: torch.nn.Module, infer_model: Any, destination: Any = None, prefix: str = "") -> None:
    """Hand the model's whole values to ``infer_model.load_layer_state_dict(state)`` on the first rank of every node.

    Block by block for a TransformerBlockList and child by child for the rest, on this process's device, so that no
    more than one is whole beside the model.  ``infer_model`` may be None on the other ranks.  Collective.
    """
    if destination is not None:
        raise ConfigurationError("The values go to infer_model, piece by piece; leave destination out.")

    def hand_over(child: torch.nn.Module, name: str) -> None:
        state = _save_to_local_rank0(child, None, name)
        if context().topology.local_rank == 0 and state:
            infer_model.load_layer_state_dict(state)

    with _on_device():
        own = OrderedDict((prefix + n, t) for n, t in _own_values(model))
        if context().topology.local_rank == 0 and own:
            infer_model.load_layer_state_dict(own)
        for name, child in model.named_children():
            if isinstance(child, TransformerBlockList):
                for number, block in child.named_children():
                    hand_over(block, f"{prefix}{name}.{number}.")
            else:
                hand_over(child, f"{prefix}{name}.")


def _own_values(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What ``model`` holds outside of its children."""
    for name, parameter in model.named_parameters(recurse=False):
        whole: Callable[[], torch.Tensor] = getattr(parameter, "gather", parameter.clone)
        yield name, whole().detach()
    for name, buffer in model.named_buffers(recurse=False):
        if name not in model._non_persistent_buffers_set:
            yield name, buffer


@contextmanager
def _on_device() -> Iterator[None]:
    ctx = context()
    before, ctx.save_param_to_cpu = ctx.save_param_to_cpu, False
    try:
        yield
    finally:
        ctx.save_param_to_cpu = before


def async_save_to_file(state_dict: Mapping[str, Any], file_path: str | os.PathLike[str]) -> None:
    """``torch.save`` by this process alone; the file appears complete or not at all.

    What a script runs in a thread of its own.  ``bmt.save(model, path, non_blocking=True)`` makes the thread, and
    reports its errors on every rank.
    """
    write(state_dict, file_path)
    print(f"finish save state_dict to {file_path}")
