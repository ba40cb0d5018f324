"""ZeRO-3 training for ordinary PyTorch models: ``import bmtrain as bmt``."""

from . import debug, distributed, inspect, loss, lr_scheduler, nn, optim
from .block import BMTrainModelWrapper, Block, CheckpointBlock, TransformerBlockList, compile
from .checkpoint import load, save, save_checkpoint
from .context import init_distributed, is_initialized, rank, shutdown, world_size
from .data import shard_batch, shard_loader
from .global_var import config
from .legacy import optim_step
from .shard import (
    DistributedModule, DistributedParameter, ParameterInitializer, gather_grad, gathered, grouped_parameters, init_parameters,
)  # fmt: skip
from .synchronize import gather_result, sum_loss, synchronize, wait_loader
from .utils import load_nccl_pypi, print_block, print_dict, print_rank, see_memory

__version__ = "2.0.0.dev0"
