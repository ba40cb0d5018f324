"""Blocks, and when their parameters are whole."""

from . import engine as _engine  # noqa: F401 - completes the context
from .block import Block, CheckpointBlock
from .block_list import TransformerBlockList
from .compile import compile
from .sharded import save_pretrained, whole_state
from .wrapper import BMTrainModelWrapper

__all__ = [
    "BMTrainModelWrapper",
    "Block",
    "CheckpointBlock",
    "TransformerBlockList",
    "compile",
    "save_pretrained",
    "whole_state",
]
