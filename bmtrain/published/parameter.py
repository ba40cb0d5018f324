"""``DistributedParameter`` under the published module name."""

from ..shard import DistributedParameter

__all__ = ["DistributedParameter"]
