"""Differentiable collectives over all ranks, or over the communicator given.

Tensors may be on the compute device or on the CPU.  ``op`` is "sum", "avg", "max", "min" or "prod".
"""

from .ops import all_gather, all_reduce, broadcast, recv_activations, reduce_scatter, send_activations

__all__ = ["all_gather", "all_reduce", "broadcast", "recv_activations", "reduce_scatter", "send_activations"]
