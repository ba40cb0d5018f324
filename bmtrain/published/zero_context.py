"""Whole parameters by hand, under the published module name."""

from .block_layer import CheckpointBlockContext

__all__ = ["ZeroContext"]

ZeroContext = CheckpointBlockContext
