"""``OptimManager`` under the published module name."""

from .manager import OptimManager

__all__ = ["OptimManager"]
