"""Parameter initialisation and grouping under the published module name."""

from ..shard import ParameterInitializer, grouped_parameters, init_parameters

__all__ = ["ParameterInitializer", "grouped_parameters", "init_parameters"]
