"""Python objects between ranks, over CPU memory: for small facts, not for weights in a training loop."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from .comm import Communicator
from .context import context
from .errors import UnsupportedError
from .wire import from_bytes, to_bytes

T = TypeVar("T")


def allgather_objects(obj: T, comm: Communicator | None = None) -> list[T]:
    """Every rank's ``obj``, rank 0's first.  Collective.

    ``comm`` is the world (also None), or a group on CPU tensors.

    Raises UnsupportedError, on every rank, when some rank's object is of a class that is not sent (``wire``).
    """
    here = context()
    control = here.control if comm is None or comm is here.world else comm
    payload, problem = _payload(obj)
    facts = torch.empty(2 * control.world_size, dtype=torch.int64, device="cpu")
    control.all_gather(torch.tensor([payload.numel(), problem is not None], device="cpu"), facts)
    sizes, refused = facts.view(-1, 2).unbind(1)
    if bool(refused.any()):
        raise UnsupportedError(problem or f"Rank {int(refused.argmax())} has an object that is not sent to others.")
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device="cpu")
    padded[: payload.numel()] = payload
    whole = torch.empty(control.world_size * padded.numel(), dtype=torch.uint8, device="cpu")
    control.all_gather(padded, whole)
    rows = whole.view(control.world_size, -1)
    return [from_bytes(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]


def broadcast_object(obj: object, comm: Communicator | None = None, src: int = 0) -> Any:
    """Rank ``src``'s ``obj`` on every rank; on the others the argument does not matter.  Collective.

    ``comm`` is the group; the world's ranks if it is None.

    Raises UnsupportedError, on every rank, for an object of a class that is not sent (``wire``).
    """
    here = context()
    if comm is None or comm is here.world:
        comm, device = here.control, torch.device("cpu")  # saves the way through the GPU's memory
    else:
        device = here.device.torch_device
    sends = comm.rank == src
    payload, problem = _payload(obj) if sends and comm.world_size > 1 else (torch.empty(0, device="cpu"), None)
    size = torch.tensor([-1 if problem else payload.numel()], device=device)
    comm.broadcast(size, src)
    if int(size) < 0:
        raise UnsupportedError(problem or f"Rank {src} has an object that is not sent to others; its error says more.")
    if comm.world_size == 1:
        return obj
    buffer = payload.to(device) if sends else torch.empty(int(size), dtype=torch.uint8, device=device)
    comm.broadcast(buffer, src)
    return obj if sends else from_bytes(buffer.cpu().numpy().tobytes())


def _payload(obj: object) -> tuple[torch.Tensor, str | None]:
    """The bytes to send, or why there are none."""
    try:
        return torch.frombuffer(bytearray(to_bytes(obj)), dtype=torch.uint8), None
    except Exception as error:  # pickling may raise anything, and the others wait for the verdict
        return torch.empty(0, dtype=torch.uint8, device="cpu"), str(error)
