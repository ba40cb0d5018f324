"""Parameters in shards: layout, flat buffers, the parameter users see, the module that holds it."""

from . import rules as _rules  # noqa: F401 - what torch functions do with sharded parameters
from . import sharded_functions as _sharded_functions  # noqa: F401 - and with their parts
from .gathered import gather_grad, gathered, grouped_parameters, init_parameters
from .module import DistributedModule
from .parameter import DistributedParameter, ParameterInitializer

__all__ = [
    "DistributedModule", "DistributedParameter", "ParameterInitializer", "gather_grad", "gathered",
    "grouped_parameters", "init_parameters",
]  # fmt: skip
