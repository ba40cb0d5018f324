"""Saving and loading."""

from ..objects import allgather_objects, broadcast_object
from .checkpointer import Checkpointer
from .data import ResumableLoader
from .files import load, save, save_checkpoint
from .preemption import PREEMPTED

__all__ = [
    "PREEMPTED", "Checkpointer", "ResumableLoader", "allgather_objects", "broadcast_object", "load", "save",
    "save_checkpoint",
]  # fmt: skip
