"""The pipelined list of blocks under the published module name, on the one stage that there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..block import TransformerBlockList
from ..context import context
from ..errors import ConfigurationError, UnsupportedError

__all__ = ["PipelineTransformerBlockList"]


class PipelineTransformerBlockList(TransformerBlockList):
    """A TransformerBlockList with the published call of a pipeline: ``list(hidden, *args, batch_related=...)``.

    On one stage the whole batch runs through all blocks at once, which gives what micro-batches give together.

    Args:
        modules: the elements, Blocks or what becomes Blocks.
        num_hidden: 1, as published.

    Raises UnsupportedError where ``pipe_size`` is above 1.
    """

    def __init__(self, modules: Iterable[torch.nn.Module] = (), num_hidden: int = 1) -> None:
        if context().topology.pipe_size > 1:
            raise UnsupportedError("Pipelines of several stages are not in this version; leave pipe_size out.")
        if num_hidden != 1:
            raise ConfigurationError(
                f"A pipeline carries one hidden value, not {num_hidden}; use bmt.TransformerBlockList(modules, "
                f"num_hidden={num_hidden})."
            )
        super().__init__(modules)

    def forward(  # type: ignore[override]
        self,
        hidden_state: torch.Tensor,
        *args: Any,
        batch_related: Sequence[int] = (),
        return_hidden_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run all blocks: ``for block in list: hidden = block(hidden, *args, **kwargs)``.

        Args:
            batch_related: which of ``args`` are cut into micro-batches with the hidden state.  On one stage none is.
            return_hidden_states: also give the inputs of every block, stacked: (out, (L, ...)).
        """
        return super().forward(hidden_state, *args, return_hidden_states=return_hidden_states, **kwargs)
