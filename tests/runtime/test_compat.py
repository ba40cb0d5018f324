"""Names that scripts in the wild use: they must be there and do their thing."""

from __future__ import annotations

import importlib
import inspect
import os
from collections import OrderedDict
from typing import Any

import pytest
import torch
from ranks import run_ranks

import bmtrain as bmt
from bmtrain.errors import ConfigurationError, NotInitializedError

TOP_LEVEL = """
    BMTrainModelWrapper Block CheckpointBlock DistributedModule DistributedParameter ParameterInitializer
    TransformerBlockList benchmark config debug distributed gather_result grouped_parameters init init_distributed
    init_parameters inspect load load_nccl_pypi loss lr_scheduler nccl nn optim optim_step print_block print_dict
    print_rank rank save see_memory store sum_loss synchronize utils wait_loader world_size
    block_layer layer param_init parameter wrapper
    PipelineTransformerBlockList checkpointing global_var hook_func pipe_layer zero_context
"""
MODULES = {
    "benchmark": "all_gather reduce_scatter send_recv",
    "block_layer": "Block CheckpointBlock CheckpointBlockContext TransformerBlockList round_up storage_type_cuda",
    "distributed": "all_gather all_reduce broadcast recv_activations reduce_scatter send_activations",
    "distributed.ops": "ncclRecv ncclSend all_gather all_reduce broadcast",
    "global_var": "config",
    "init": "init_distributed is_initialized",
    "inspect.tensor": "InspectTensor inspect_tensor record_tensor",
    "layer": "DistributedModule",
    "loss._function": "cross_entropy_backward_inplace cross_entropy_forward fused_softmax_inplace fused_sumexp "
    "has_inf_nan",
    "lr_scheduler.warmup": "WarmupLRScheduler",
    "nccl": "NCCLCommunicator allGather allReduce broadcast commCount commRank groupEnd groupStart recv reduce "
    "reduceScatter send",
    "nn": "ColumnParallelLinear Linear OpLinear OpParallelLinear RowParallelLinear VPEmbedding",
    "param_init": "ParameterInitializer grouped_parameters init_parameters",
    "parameter": "DistributedParameter",
    "store": "DistributedStateDictWrapper _save_to_rank0 allgather_objects broadcast_object load save",
    "synchronize": "gather_result sum_loss synchronize wait_loader",
    "utils": "AverageRecorder check_torch_version print_dict round_up see_memory tp_split_tensor",
    "wrapper": "BMTrainModelWrapper",
}


def names_after_a_plain_import() -> list[str]:
    import bmtrain

    return dir(bmtrain)


def test_top_level_names() -> None:
    # In a process that has imported nothing else, as submodules appear by being imported.
    (names,) = run_ranks(1, names_after_a_plain_import, initialize=False, fresh=True)
    assert [name for name in TOP_LEVEL.split() if name not in names] == []


@pytest.mark.parametrize("module", MODULES)
def test_module_names(module: str) -> None:
    found = importlib.import_module(f"bmtrain.{module}")
    assert [name for name in MODULES[module].split() if not hasattr(found, name)] == []


def test_functions_that_share_a_modules_name_stay_functions() -> None:
    importlib.import_module("bmtrain.synchronize")
    assert callable(bmt.synchronize)
    assert "tp_size" in inspect.signature(bmt.init_distributed).parameters


def test_config_before_initialisation() -> None:
    assert bmt.config["initialized"] is False and bmt.config["rank"] == 0 and bmt.config["world_size"] == 1
    with pytest.raises(NotInitializedError, match="init_distributed"):
        bmt.config["comm"]
    with pytest.raises(KeyError):
        bmt.config["nonsense"]
    assert "nonsense" not in bmt.config


def read_config() -> dict[str, Any]:
    config = bmt.config
    config["sp_stream"] = "mine"
    config["rank"] = bmt.rank()  # saying what is true anyway is no harm
    with pytest.raises(ConfigurationError, match="world_size"):
        config["world_size"] = 7
    with pytest.raises(KeyError):
        config["nonsense"]
    assert config.get("nonsense", 3) == 3 and "comm" in config and "sp_stream" in list(config)
    names = (
        "initialized",
        "rank",
        "world_size",
        "pipe_enabled",
        "tp_size",
        "zero_size",
        "sp_stream",
    )
    values = {name: config[name] for name in names}
    assert config["local_rank"] == int(os.environ["LOCAL_RANK"])
    assert config["local_size"] == int(os.environ["LOCAL_WORLD_SIZE"])
    assert (bmt.init.is_initialized(), config["comm"].world_size, config["topology"].rank) == (True, 2, bmt.rank())
    assert "'rank'" in repr(config)
    del config["sp_stream"]
    assert "sp_stream" not in config
    return values


def test_config() -> None:
    for rank, values in enumerate(run_ranks(2, read_config)):
        assert values == {
            "initialized": True, "rank": rank, "world_size": 2,
            "pipe_enabled": False, "tp_size": 1, "zero_size": 2, "sp_stream": "mine",
        }  # fmt: skip


# ---- nccl's functions on storages ----------------------------------------------------------------------------------


def ring() -> torch.Tensor:
    """Every rank passes its tensor to the next, as ring attention does."""
    from bmtrain.nccl import commCount, commRank, groupEnd, groupStart

    from bmtrain.distributed.ops import ncclRecv, ncclSend

    comm = bmt.config["comm"]
    tensor = torch.arange(3.0) + 10 * bmt.rank()
    received = torch.empty_like(tensor)
    count, rank = commCount(comm), commRank(comm)
    groupStart()
    ncclSend(tensor.storage(), (rank + 1) % count, comm)
    ncclRecv(received.storage(), (rank - 1) % count, comm)
    groupEnd()
    return received


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_ring() -> None:
    for rank, received in enumerate(run_ranks(3, ring)):
        assert torch.equal(received, torch.arange(3.0) + 10 * ((rank - 1) % 3))


def flat_collectives() -> dict[str, list[float]]:
    from bmtrain import nccl

    comm, rank = bmt.config["comm"], bmt.rank()
    x = torch.arange(4.0) + rank
    summed, gathered, scattered, sent, reduced = (torch.zeros(n) for n in (4, 8, 2, 4, 4))
    nccl.allReduce(x.storage(), summed.storage(), "sum", comm)
    nccl.allGather(x.storage(), gathered.storage(), comm)
    nccl.reduceScatter(x.storage(), scattered.storage(), "max", comm)
    nccl.broadcast(x, sent, 1, comm)
    nccl.reduce(x, reduced, "avg", 1, comm)
    in_place = x.clone()
    nccl.allReduce(in_place.storage(), in_place.storage(), "min", comm)
    results = {"sum": summed, "gather": gathered, "scatter": scattered, "broadcast": sent, "reduce": reduced}
    assert torch.equal(x, torch.arange(4.0) + rank)
    return {name: value.tolist() for name, value in (results | {"in place": in_place}).items()}


def test_flat_collectives() -> None:
    first, second = run_ranks(2, flat_collectives)
    common = {
        "sum": [1, 3, 5, 7],
        "gather": [0, 1, 2, 3, 1, 2, 3, 4],
        "broadcast": [1, 2, 3, 4],
        "in place": [0, 1, 2, 3],
    }
    assert first == common | {"scatter": [1, 2], "reduce": [0, 0, 0, 0]}
    assert second == common | {"scatter": [3, 4], "reduce": [0.5, 1.5, 2.5, 3.5]}


# ---- saving, blocks, old optimizer calls ---------------------------------------------------------------------------


class Model(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(torch.nn.Linear(3, 3)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def exchange_state() -> tuple[bool, bool, bool]:
    torch.manual_seed(0)
    model = Model()
    whole = model.state_dict()
    on_rank_0 = bmt.store._save_to_rank0(model, prefix="m.")
    torch.manual_seed(1)
    other = Model()
    before = other.state_dict()
    # Only rank 0 has read the file.
    other.load_state_dict(bmt.store.DistributedStateDictWrapper(whole if bmt.rank() == 0 else {}))
    after = other.state_dict()
    expected = {f"m.{name}" for name in whole} if bmt.rank() == 0 else set()
    return (
        set(on_rank_0) == expected and isinstance(on_rank_0, OrderedDict),
        all(torch.equal(after[name], value) for name, value in whole.items()),
        any(not torch.equal(before[name], value) for name, value in whole.items()),
    )


def test_state_on_rank_0_only() -> None:
    assert run_ranks(2, exchange_state) == [(True, True, True)] * 2


def block_context() -> bool:
    from bmtrain.block_layer import CheckpointBlockContext

    torch.manual_seed(0)
    model = Model()
    block = model.layers[0]
    expected = model.state_dict()["layers.0.weight"]
    with CheckpointBlockContext(block, {}, 0, pipe=False):
        inside = torch.equal(block.weight.detach(), expected)
    manual = CheckpointBlockContext(block)
    manual.enter()
    again = torch.equal(block.weight.detach(), expected)
    manual.exit()
    manual.exit()
    return inside and again


def test_checkpoint_block_context() -> None:
    assert run_ranks(2, block_context) == [True, True]


def old_step() -> tuple[float, float]:
    torch.manual_seed(0)
    model = Model()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1.0)
    scheduler = bmt.lr_scheduler.NoDecay(optimizer, 0.1, 2, 10)
    model(torch.ones(1, 3)).sum().backward()
    before = model.state_dict()["layers.1.bias"].clone()
    with pytest.warns(DeprecationWarning, match="OptimManager"):
        bmt.optim_step(optimizer)
    unchanged = float((model.state_dict()["layers.1.bias"] - before).abs().max())  # the rate of step 0 is 0
    with pytest.warns(DeprecationWarning):
        bmt.optim_step(optimizer, scheduler)
    return unchanged, scheduler.current_lr


def test_optim_step() -> None:
    assert run_ranks(1, old_step) == [(0.0, 0.05)]


def test_storage_classes() -> None:
    from bmtrain.block_layer import storage_type_cuda

    assert storage_type_cuda(torch.HalfStorage) is torch.cuda.HalfStorage
    assert storage_type_cuda(torch.cuda.FloatStorage) is torch.cuda.FloatStorage
    with pytest.raises(ValueError, match="int"):
        storage_type_cuda(int)


def train_as_before_optim_manager() -> tuple[float, float]:
    class Net(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    model = Net()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=0.1, scale=1024.0)
    x = torch.full((2, 3), float(bmt.rank() + 1))
    with pytest.deprecated_call():
        optimizer.loss_scale(model(x).sum()).backward()
    with pytest.deprecated_call():
        norm = bmt.optim.clip_grad_norm(optimizer.param_groups, 0.5, scale=optimizer.scale, norm_type=2)
    before = model.state_dict()["linear.bias"].item()
    with pytest.deprecated_call():
        bmt.optim_step(optimizer)
    return norm.item(), before - model.state_dict()["linear.bias"].item()


def test_the_optimizer_may_hold_the_loss_scale() -> None:
    for norm, moved in run_ranks(2, train_as_before_optim_manager):
        # The mean over ranks of d(sum)/d(weight) is 2 * (1 + 2) / 2 = 3 for each of three weights, and 2 for the bias.
        assert norm == pytest.approx((3 * 3**2 + 2**2) ** 0.5, rel=1e-6)
        assert moved == pytest.approx(0.1, rel=1e-4)
