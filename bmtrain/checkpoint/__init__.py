"""Saving and loading."""

from ..objects import allgather_objects, broadcast_object
from .checkpointer import Checkpointer
from .data import ResumableLoader
from .files import background_writer, load, save, save_checkpoint, write
from .preemption import PREEMPTED
from .sharded import (
    Sharded,
    copy_sharded,
    load_sharded,
    load_state_dict,
    newest,
    remove_sharded,
    rename_sharded,
    save_sharded,
)

__all__ = [
    "PREEMPTED", "Checkpointer", "ResumableLoader", "Sharded", "allgather_objects", "background_writer",
    "broadcast_object", "copy_sharded", "load", "load_sharded", "load_state_dict", "newest", "remove_sharded",
    "rename_sharded", "save", "save_checkpoint", "save_sharded", "write",
]  # fmt: skip
