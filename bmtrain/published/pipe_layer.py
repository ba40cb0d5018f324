"""The pipelined list of blocks under the published module name."""

from __future__ import annotations

from ..block.pipeline import PipelineTransformerBlockList

__all__ = ["PipelineTransformerBlockList"]
