"""``DistributedModule`` under the published module name."""

from ..shard import DistributedModule

__all__ = ["DistributedModule"]
