"""torch's default process group, for code that calls ``torch.distributed`` itself."""

from __future__ import annotations

import atexit
from contextlib import suppress

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ..context import context


def register_process_group() -> None:
    """Make torch's default process group of this job's ranks, unless there is one.  Collective.

    For ``torch.distributed.all_gather(...)`` and the like in code that is not converted.  It is gloo's, for tensors on
    a GPU NCCL's, and has the timeout of ``init_distributed``.  Its collectives are not watched by bmtrain.
    """
    here = context()
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if here.device.is_cuda else "gloo"
    store = PrefixStore("torch", here.store)
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=here.timeout)
    atexit.register(_leave)


def _leave() -> None:
    with suppress(Exception):  # at exit, where the others may have gone
        if dist.is_initialized():
            dist.destroy_process_group()
