"""A list of blocks cut into stages, each on ranks of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..autograd import outside_of_compiled_code
from ..context import Context, context
from ..errors import ConfigurationError
from ..shard.engine import engine
from ..topology import share
from .block import Block
from .block_list import TransformerBlockList
from .pipeline_call import PipelineCall
from .record import record_of
from .sharded import ShardedModule, become


class PipelineTransformerBlockList(TransformerBlockList):
    """A TransformerBlockList whose blocks are spread over the stages of a pipeline (``init_distributed(pipe_size=)``).

    Each stage has a contiguous part of the blocks, the first stages one more where they cannot be equal, and keeps
    their parameters for itself, sharded over its ranks; state dicts and checkpoints are whole as ever.  A model may
    have several such lists, anywhere.  Without ``pipe_size`` it is a TransformerBlockList with the same call.

    Blocks run once for each micro-batch (see ``pipeline_call.count_of``).  What a block changes in itself in its
    forward, such as running statistics, would then differ from what a whole batch gives, so that batch norms are
    refused.  Blocks that were not told (``use_checkpoint=None``) are recomputed.

    Args:
        modules: Blocks with ``mode="PIPE"``, or what becomes such Blocks.
        num_hidden: how many of the positional arguments each block replaces by its results.

    Raises ConfigurationError where elements are no Blocks for pipelines, or fewer than stages.
    """

    _has_run = False
    _is_cut = False  # whether it is known which element belongs to which stage

    def __init__(self, modules: Iterable[nn.Module] = (), num_hidden: int = 1) -> None:
        ctx = context()
        super().__init__(modules, num_hidden=num_hidden)
        if ctx.topology.pipe_size > 1:
            self._cut(ctx)

    def _as_block(self, module: nn.Module) -> nn.Module:
        if context().topology.pipe_size == 1:
            return super()._as_block(module)
        if self._is_cut:
            raise ConfigurationError(
                "The blocks of a bmt.PipelineTransformerBlockList are cut into stages when it is made: give it all of "
                "them then."
            )
        if not isinstance(module, nn.Module) or type(module).forward is nn.Module.forward:
            raise ConfigurationError(
                f"A pipeline runs its elements one after the other; a {type(module).__name__} cannot be run. Put "
                "groups of modules into a module with a forward."
            )
        made: nn.Module = module if isinstance(module, Block) else Block(module, mode="PIPE")
        return made

    def _cut(self, ctx: Context) -> None:
        stages = ctx.topology.pipe_size
        elements: list[nn.Module] = list(self._modules.values())
        if len(elements) < stages:
            raise ConfigurationError(
                f"A pipeline of {stages} stages needs as many blocks at least, not {len(elements)}. Use a smaller "
                "pipe_size, or a bmt.TransformerBlockList."
            )
        if len({id(element) for element in elements}) < len(elements):
            raise ConfigurationError("A block may be in a pipeline once: stages share no parameters.")
        for element in elements:
            _check_element(element)
        for stage in range(stages):
            for index in share(len(elements), stages, stage):
                for inner in elements[index].modules():
                    if isinstance(inner, ShardedModule):
                        become(inner, ShardedModule).stage = stage
        self._is_cut = True
        if not ctx.building:
            for element in elements:
                engine().shard(element)

    def forward(
        self,
        *args: Any,
        batch_related: Sequence[int | str] | None = None,
        return_hidden_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run all blocks: ``for block in list: hidden = block(hidden, *args, **kwargs)``.

        All ranks of a pipeline call it with hidden values and related arguments of the same shapes (B, ...).

        Args:
            args: the hidden values, as many as ``num_hidden``, and what else each block gets.
            batch_related: which others go with the batch, (B, ...), and are cut into micro-batches like it: positions
                behind the hidden values, or keywords.  None: all tensors whose first size is B.  What is not cut is to
                be the same on all ranks.
            return_hidden_states: also give the inputs of every block, stacked: (out, (L, B, ...)).

        Raises ConfigurationError where the batch cannot be cut so, and RankDivergenceError on all ranks of the pipeline
        where they call with different things.
        """
        if context().topology.pipe_size == 1:
            return super().forward(*args, return_hidden_states=return_hidden_states, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return outside_of_compiled_code(
                self.forward, *args, batch_related=batch_related, return_hidden_states=return_hidden_states, **kwargs
            )
        call = PipelineCall(self, args, kwargs, batch_related, return_hidden_states, is_first=not self._has_run)
        out = call.engine.forward(None, False, call, (), {})
        self._has_run = True
        return out


def _check_element(element: nn.Module) -> None:
    record = record_of(element)
    if record is None or not record.pipes:
        raise ConfigurationError(
            f'The elements of a bmt.PipelineTransformerBlockList are Blocks made with mode="PIPE"; a '
            f"{type(element).__name__} is not."
        )
    for name, inner in element.named_modules():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm) and inner.track_running_stats:
            raise ConfigurationError(
                f"{name or 'An element'} of a pipeline is a {type(inner).__name__}: its running statistics would "
                "follow micro-batches, on one stage only. Use a norm without them, or put it outside of the pipeline."
            )
