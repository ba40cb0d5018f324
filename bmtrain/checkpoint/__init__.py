"""Saving and loading."""

from .files import load, save, save_checkpoint
from ..objects import allgather_objects, broadcast_object

__all__ = ["allgather_objects", "broadcast_object", "load", "save", "save_checkpoint"]
