"""``context``'s functions under the published module name."""

from ..context import init_distributed, is_initialized

__all__ = ["init_distributed", "is_initialized"]
