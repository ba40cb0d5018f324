"""Saving and loading."""

from ..objects import allgather_objects, broadcast_object
from .checkpointer import Checkpointer
from .data import ResumableLoader
from .files import background_writer, load, save, save_checkpoint, write
from .preemption import PREEMPTED

__all__ = [
    "PREEMPTED", "Checkpointer", "ResumableLoader", "allgather_objects", "background_writer", "broadcast_object",
    "load", "save", "save_checkpoint", "write",
]  # fmt: skip
