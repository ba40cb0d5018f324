"""Saving and loading."""

from ..objects import allgather_objects, broadcast_object
from .files import load, save, save_checkpoint

__all__ = ["allgather_objects", "broadcast_object", "load", "save", "save_checkpoint"]
