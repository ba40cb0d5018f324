"""ZeRO-3 training for ordinary PyTorch models: ``import bmtrain as bmt``."""

from .block import BMTrainModelWrapper, Block, CheckpointBlock, TransformerBlockList
from .context import init_distributed, is_initialized, rank, shutdown, synchronize, world_size
from .shard import (
    DistributedModule, DistributedParameter, ParameterInitializer, gather_grad, gathered, grouped_parameters, init_parameters,
)  # fmt: skip

__version__ = "2.0.0.dev0"
