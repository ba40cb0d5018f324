"""Differentiable collectives over all ranks, or over the communicator given.

Tensors may be on the compute device or on the CPU.  ``op`` is "sum", "avg", "max", "min" or "prod".
"""

from .ops import all_gather, all_reduce, broadcast, recv_activations, reduce_scatter, send_activations
from .process_group import register_process_group

__all__ = [
    "all_gather",
    "all_reduce",
    "broadcast",
    "recv_activations",
    "reduce_scatter",
    "register_process_group",
    "send_activations",
]
