"""Recordings without a GPU: operations are logged while Python runs, and done again into the same memory without it.

What a CUDA graph does, as far as results go: Python that would not run again does not, numbers that it would freeze are
frozen, and memory that it would write is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bmtrain.block.graphs.recording import Recording
from bmtrain.context import context


class _Log(TorchDispatchMode):
    """What is done to tensors while it is on, and how to undo what that does to those that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in _WAIT:
            raise RuntimeError("operation not permitted when stream is capturing")
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                address = tensor.untyped_storage().data_ptr()
                if address not in self._made and (func._schema.is_mutable or "batch_norm" in func._opname):
                    self._before.setdefault(address, (tensor, tensor.clone()))
        out = func(*args, **kwargs)
        results = [leaf.detach() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._made.update(result.untyped_storage().data_ptr() for result in results if not func.is_view)
        if "empty" not in func._opname:  # what lies there is another's
            self._done.append((func, args, kwargs, results))
        return out

    def undo(self) -> None:
        for tensor, value in self._before.values():
            tensor.copy_(value)

    def redo(self) -> None:
        with (
            torch.enable_grad(),  # an LSTM asks whether that is on
            torch._C._AutoDispatchBelowAutograd(),
            torch._C.DisableTorchFunctionSubclass(),
            torch.autocast("cpu", enabled=False),
        ):
            for func, args, kwargs, results in self._done:
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
                for result, value in zip(results, again, strict=True):
                    if result.numel() and result.data_ptr() != value.data_ptr():
                        with torch.inference_mode(result.is_inference()):
                            result.copy_(value)


class Recorder:
    """Stands in for ``bmtrain.device.Recorder`` of a GPU."""

    is_real = True

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        log, numbers = _Log(), torch.get_rng_state()
        try:
            with log:
                work()
        finally:
            torch.set_rng_state(numbers)
            with torch.no_grad():
                log.undo()
        return log.redo


_WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")


class _Waits(TorchDispatchMode):
    """Notes what a host needs values for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool]
        if func._opname in _WAIT or (func._opname.startswith(("index", "_index_put")) and masks):
            self.found.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextmanager
def _host_waits() -> Iterator[list[str]]:
    with _Waits() as waits:
        yield waits.found


@contextmanager
def replayed() -> Iterator[None]:
    """What blocks record inside the ``with`` is replayed so."""

    def place_for(recording: Any, tensor: torch.Tensor) -> torch.Tensor:
        place: torch.Tensor = empty_place_for(recording, tensor)
        place.data.copy_(tensor.detach())  # the log computes with it; a GPU would not
        return place

    empty_place_for = Recording._place_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context().device, "recorder", Recorder)
        patch.setattr(context().device, "host_waits", _host_waits)
        patch.setattr(Recording, "_place_for", place_for)
        yield


def replays() -> AbstractContextManager[None]:
    """What is recorded inside the ``with`` runs without its Python, on a GPU as CUDA graphs."""
    return nullcontext() if context().device.is_cuda else replayed()
