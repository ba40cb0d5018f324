"""Parameters in shards: layout, flat buffers, the parameter users see, the module that holds it."""

from .access import gather_grad, gathered, grouped_parameters, init_parameters
from .module import DistributedModule
from .parameter import DistributedParameter, ParameterInitializer

__all__ = [
    "DistributedModule", "DistributedParameter", "ParameterInitializer", "gather_grad", "gathered",
    "grouped_parameters", "init_parameters",
]  # fmt: skip
