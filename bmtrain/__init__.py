"""ZeRO-3 training for ordinary PyTorch models: ``import bmtrain as bmt``."""

from . import requirements as _requirements  # noqa: F401 # isort: skip - first: says in one line what is missing
from . import benchmark, checkpoint, debug, distributed, inspect, loss, lr_scheduler, optim, utils
from .block import Block, BMTrainModelWrapper, CheckpointBlock, TransformerBlockList, compile, save_pretrained
from .checkpoint import load, save, save_checkpoint
from .context import deterministic, init_distributed, is_initialized, mesh, own_random, rank, shutdown, world_size
from .data import shard_batch, shard_loader, skip_batches, to_device
from .loss import gather_batch, mean
from .meter import Meter
from .optim.interrupts import interrupted_together
from .parallel import parallelize_module
from .precision import Precision
from .published import (
    block_layer,
    checkpointing,
    global_var,
    hook_func,
    init,
    layer,
    nccl,
    nn,
    param_init,
    parameter,
    pipe_layer,
    store,
    wrapper,
    zero_context,
)
from .published.global_var import config
from .published.legacy import optim_step
from .published.pipe_layer import PipelineTransformerBlockList
from .shard import (
    DistributedModule,
    DistributedParameter,
    ParameterInitializer,
    gather_grad,
    gathered,
    grouped_parameters,
    init_parameters,
)
from .synchronize import agree, gather_result, gather_samples, rank_0_first, sum_loss, synchronize, total, wait_loader
from .utils import load_nccl_pypi, on_rank_0, print_block, print_dict, print_rank, see_memory
from .watch import Timeouts

__all__ = [
    "BMTrainModelWrapper",
    "Block",
    "CheckpointBlock",
    "DistributedModule",
    "DistributedParameter",
    "Meter",
    "ParameterInitializer",
    "PipelineTransformerBlockList",
    "Precision",
    "Timeouts",
    "TransformerBlockList",
    "agree",
    "benchmark",
    "block_layer",
    "checkpoint",
    "checkpointing",
    "compile",
    "config",
    "debug",
    "deterministic",
    "distributed",
    "gather_batch",
    "gather_grad",
    "gather_result",
    "gather_samples",
    "gathered",
    "global_var",
    "grouped_parameters",
    "hook_func",
    "init",
    "init_distributed",
    "init_parameters",
    "inspect",
    "interrupted_together",
    "is_initialized",
    "layer",
    "load",
    "load_nccl_pypi",
    "loss",
    "lr_scheduler",
    "mean",
    "mesh",
    "nccl",
    "nn",
    "on_rank_0",
    "optim",
    "optim_step",
    "own_random",
    "parallelize_module",
    "param_init",
    "parameter",
    "pipe_layer",
    "print_block",
    "print_dict",
    "print_rank",
    "rank",
    "rank_0_first",
    "save",
    "save_checkpoint",
    "save_pretrained",
    "see_memory",
    "shard_batch",
    "shard_loader",
    "shutdown",
    "skip_batches",
    "store",
    "sum_loss",
    "synchronize",
    "to_device",
    "total",
    "utils",
    "wait_loader",
    "world_size",
    "wrapper",
    "zero_context",
]

__version__ = "2.0.0.dev0"
