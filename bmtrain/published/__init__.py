"""Module names of the published BMTrain, for scripts that import them.  Nothing else in the library does.

Each module here is reached under the name that it was published by: ``bmtrain.published.nn`` is ``bmtrain.nn``.
"""

import sys

from .. import optim
from ..distributed import nccl
from . import (
    block_layer,
    checkpointing,
    global_var,
    hook_func,
    init,
    layer,
    nn,
    optim_manager,
    param_init,
    parameter,
    pipe_layer,
    store,
    wrapper,
    zero_context,
)

_MODULES = {
    "block_layer": block_layer, "checkpointing": checkpointing, "global_var": global_var, "hook_func": hook_func,
    "init": init, "layer": layer, "nccl": nccl, "nn": nn, "optim.optim_manager": optim_manager,
    "param_init": param_init, "parameter": parameter, "pipe_layer": pipe_layer, "store": store, "wrapper": wrapper,
    "zero_context": zero_context,
}  # fmt: skip

for _name, _module in _MODULES.items():
    sys.modules[f"bmtrain.{_name}"] = _module
optim.optim_manager = optim_manager  # type: ignore[attr-defined]

__all__ = [
    "block_layer", "checkpointing", "global_var", "hook_func", "init", "layer", "nccl", "nn", "optim_manager",
    "param_init", "parameter", "pipe_layer", "store", "wrapper", "zero_context",
]  # fmt: skip
