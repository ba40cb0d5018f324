"""How fast this machine's ranks talk to each other: every function is collective and prints a table on rank 0."""

from .bandwidth import all_gather, reduce_scatter, send_recv

__all__ = ["all_gather", "reduce_scatter", "send_recv"]
