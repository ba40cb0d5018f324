"""Python objects between ranks.  Pickled, over CPU memory: for small facts, not for weights in a training loop."""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import torch

from .comm import Communicator
from .context import context

T = TypeVar("T")


def allgather_objects(obj: T) -> list[T]:
    """Every rank's ``obj``, rank 0's first.  Collective."""
    control = context().control
    payload = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
    sizes = torch.empty(control.world_size, dtype=torch.int64, device="cpu")
    control.all_gather(torch.tensor([payload.numel()], device="cpu"), sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device="cpu")
    padded[: payload.numel()] = payload
    whole = torch.empty(control.world_size * padded.numel(), dtype=torch.uint8, device="cpu")
    control.all_gather(padded, whole)
    rows = whole.view(control.world_size, -1)
    return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]


def broadcast_object(obj: Any, comm: Communicator | None = None, src: int = 0) -> Any:
    """Rank ``src``'s ``obj`` on every rank; on the others the argument does not matter.  Collective.

    ``comm`` is the group; the world's ranks if it is None.
    """
    here = context()
    if comm is None or comm is here.world:
        comm, device = here.control, torch.device("cpu")  # saves the way through the GPU's memory
    else:
        device = here.device.torch_device
    sends = comm.rank == src
    payload = torch.frombuffer(bytearray(pickle.dumps(obj) if sends else b"\0"), dtype=torch.uint8)
    size = torch.tensor([payload.numel()], device=device)
    comm.broadcast(size, src)
    buffer = payload.to(device) if sends else torch.empty(int(size), dtype=torch.uint8, device=device)
    comm.broadcast(buffer, src)
    return obj if sends else pickle.loads(buffer.cpu().numpy().tobytes())
