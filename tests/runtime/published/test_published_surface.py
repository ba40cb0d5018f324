"""Every name of the published library that scripts use, and what it is called with."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any

import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import CommunicationError, ConfigurationError

# Published name -> published parameters.  "?" stands for whatever follows, None for what is not called.
SIGNATURES: dict[str, str | None] = {
    "init_distributed": "init_method seed pipe_size num_micro_batches tp_size",
    "init.init_distributed": "init_method seed pipe_size num_micro_batches tp_size",
    "init.is_initialized": "",
    "init.topology": "config",
    "rank": "", "world_size": "", "global_var.rank": "", "global_var.world_size": "",
    "config": None, "global_var.config": None,
    "synchronize": "", "wait_loader": "", "sum_loss": "loss comm", "gather_result": "result",
    "synchronize.gather_result": "result", "synchronize.sum_loss": "loss comm", "synchronize.synchronize": "",
    "DistributedParameter": "data requires_grad init_method group tp_mode tp_split_dim",
    "parameter.DistributedParameter": "data requires_grad init_method group tp_mode tp_split_dim",
    "ParameterInitializer": "func", "param_init.ParameterInitializer": "func",
    "DistributedModule": "?", "layer.DistributedModule": "?",
    "init_parameters": "model", "param_init.init_parameters": "model",
    "grouped_parameters": "model", "param_init.grouped_parameters": "model",
    "Block": "inner_module use_checkpoint zero_level initialized mode",
    "CheckpointBlock": "inner_module use_checkpoint zero_level initialized mode",
    "block_layer.Block": "inner_module use_checkpoint zero_level initialized mode",
    "block_layer.CheckpointBlock": "inner_module use_checkpoint zero_level initialized mode",
    "TransformerBlockList": "modules num_hidden", "block_layer.TransformerBlockList": "modules num_hidden",
    "PipelineTransformerBlockList": "modules num_hidden",
    "pipe_layer.PipelineTransformerBlockList": "modules num_hidden",
    "BMTrainModelWrapper": "model", "wrapper.BMTrainModelWrapper": "model",
    "block_layer.CheckpointBlockContext": "block", "block_layer.round_up": "x d",
    "block_layer.storage_type_cuda": "storage_type",
    "zero_context.ZeroContext": "block", "checkpointing.checkpoint": "func",
    "checkpointing.CheckpointBlockContext": "block",
    "hook_func.zero_pre_forward": "module inputs", "hook_func.zero_post_forward": "module inputs outputs",
    "hook_func.zero_pre_backward": "module grad_inputs", "hook_func.zero_post_backward": "module grad_inputs",
    "optim.AdamOptimizer": "params lr betas eps weight_decay hold_steps",
    "optim.AdamOffloadOptimizer": "params lr betas eps weight_decay hold_steps record_delta",
    "optim.OptimManager":
        "loss_scale loss_scale_factor loss_scale_steps min_loss_scale max_loss_scale grad_scale",
    "optim.optim_manager.OptimManager":
        "loss_scale loss_scale_factor loss_scale_steps min_loss_scale max_loss_scale grad_scale",
    "optim.clip_grad_norm": "param_groups max_norm scale norm_type eps", "optim_step": "optim lr_scheduler",
    "optim.AdamOptimizer.step": "self closure scale", "optim.AdamOptimizer.zero_grad": "self set_to_none",
    "optim.AdamOptimizer.load_state_dict": "self state_dict", "optim.AdamOptimizer.state_dict": "self",
    "optim.AdamOptimizer._on_justify_scale": "self old_scale new_scale",
    "optim.AdamOptimizer._bmtrain_optimizer": None,
    "optim.AdamOffloadOptimizer.state_dict": "self gather", "optim.AdamOffloadOptimizer.get_avg_delta": "self",
    "optim.AdamOffloadOptimizer.get_var_delta": "self",
    "optim.OptimManager.add_optimizer": "self optimizer lr_scheduler", "optim.OptimManager.backward": "self loss",
    "optim.OptimManager.scale_loss": "self loss", "optim.OptimManager.zero_grad": "self",
    "optim.OptimManager.step": "self", "optim.OptimManager.state_dict": "self gather_opt",
    "optim.OptimManager.load_state_dict": "self state_dict",
    "optim.OptimManager.clip_grad_norm": "self param_groups max_norm norm_type eps",
    "loss.FusedCrossEntropy": "weight ignore_index reduction label_smoothing parallel",
    "loss._function.has_inf_nan": "g_half out", "loss._function.fused_sumexp": "logits max_logits",
    "loss._function.fused_softmax_inplace": "logits max_logits sum_exp_logits",
    "loss._function.cross_entropy_forward": "m n input target softmax output ignore_index",
    "loss._function.cross_entropy_backward_inplace": "m n grad_output target x ignore_index",
    **{f"lr_scheduler.{n}": "optimizer start_lr warmup_iter end_iter num_iter"
       for n in ("WarmupLRScheduler", "NoDecay", "Noam", "Linear", "Cosine", "warmup.WarmupLRScheduler")},
    "lr_scheduler.Exponential": "optimizer start_lr warmup_iter end_iter num_iter gamma",
    **{f"lr_scheduler.WarmupLRScheduler.{n}": a for n, a in {
        "step": "self num_iter", "get_lr": "self", "get_lr_warmup": "self num_iter", "get_lr_decay": "self num_iter",
        "state_dict": "self", "load_state_dict": "self state_dict", "current_lr": None}.items()},
    "distributed.all_gather": "x comm", "distributed.all_reduce": "x op comm",
    "distributed.reduce_scatter": "x op comm", "distributed.broadcast": "src root comm",
    "distributed.send_activations": "hidden_state next_rank comm",
    "distributed.recv_activations": "prev_rank comm",
    "distributed.ops.ncclSend": "src peer comm", "distributed.ops.ncclRecv": "dst peer comm",
    "distributed.ops.all_gather": "x comm", "distributed.ops.all_reduce": "x op comm",
    "save": "model file_name non_blocking", "load": "model file_name strict",
    "store.save": "model file_name non_blocking", "store.load": "model file_name strict",
    "store.allgather_objects": "obj", "store.allgather_object": "obj comm",
    "store.broadcast_object": "obj comm src",
    "store.DistributedStateDictWrapper": "state_dict", "store.DistributedTensorWrapper": "tensor shape",
    "store._save_to_rank0": "model destination prefix", "store._save_to_local_rank0": "model destination prefix",
    "store._save_to_infer_model": "model infer_model destination prefix",
    "store.async_save_to_file": "state_dict file_path",
    "inspect.inspect_model": "model param_name prefix", "inspect.format_summary": "summary",
    "inspect.inspect_tensor": "", "inspect.record_tensor": "x name group", "inspect.InspectTensor": "",
    "inspect.InspectTensor.get_summary": "self", "inspect.InspectTensor.get_tensor": "self name group index",
    "inspect.tensor.record_tensor": "x name group",
    "nn.Linear": "in_features out_features bias dtype", "nn.OpLinear.apply": "input weight bias",
    "nn.ColumnParallelLinear":
        "in_features out_features bias dtype gather_output gather_input async_gather_chunks",
    "nn.RowParallelLinear": "in_features out_features bias dtype split_input all_reduce_output async_chunks",
    "nn.OpParallelLinear.apply": "input weight bias gather_input gather_output split_input reduce_type",
    "nn.VPEmbedding": "vocab_size embedding_size dtype init_mean init_std",
    "nn.VPEmbedding.forward": "self x projection",
    "nn.Projection": "vocab_size embedding_size dtype init_mean init_std",
    "nn.VPProjection": "vocab_size embedding_size dtype init_mean init_std",
    "benchmark.all_gather": "", "benchmark.reduce_scatter": "", "benchmark.send_recv": "",
    "nccl.NCCLCommunicator": None, "nccl.getUniqueId": "", "nccl.commInitRank": "unique_id world_size rank",
    "nccl.commDestroy": "comm", "nccl.commCount": "comm", "nccl.commRank": "comm",
    "nccl.allReduce": "src dst op comm", "nccl.broadcast": "src dst root comm",
    "nccl.reduce": "src dst op root comm", "nccl.allGather": "src dst comm",
    "nccl.reduceScatter": "src dst op comm", "nccl.send": "src peer comm", "nccl.recv": "dst peer comm",
    "nccl.groupStart": "", "nccl.groupEnd": "", "nccl.dtype2nccl": "dtype", "nccl.op2nccl": "op",
    "print_rank": "", "print_dict": "title content file", "print_block": "title content file",
    "see_memory": "message detail", "load_nccl_pypi": "",
    "utils.print_rank": "", "utils.print_dict": "title content file", "utils.see_memory": "message detail",
    "utils.load_nccl_pypi": "", "utils.round_up": "x d", "utils.check_torch_version": "?",
    "utils.tp_split_tensor": "tensor split_dim", "utils.AverageRecorder": "alpha start_value",
    "utils.AverageRecorder.record": "self v", "utils.AverageRecorder.value": None,
    "debug.set": "key value", "debug.get": "key default", "debug.append": "key value", "debug.extend": "key value",
    "debug.clear": "?",
}  # fmt: skip


def reached(name: str) -> Any:
    """The object of this published name: of the module that is imported by the longest part of it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["bmtrain", *parts[: length - 1]]))
        except ModuleNotFoundError:
            continue
        for part in parts[length - 1 :]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def difference(name: str, parameters: str | None) -> str | None:
    """How what is here differs from what was published, if it does."""
    try:
        found = reached(name)
    except (AttributeError, ImportError) as error:
        return f"absent: {error}"
    if parameters is None or parameters == "?":
        return None
    own = [p for p in inspect.signature(found).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    wanted, have = parameters.split(), [p.name for p in own]
    if have[: len(wanted)] != wanted:
        return f"called with {have}, published {wanted}"
    more = [p.name for p in own[len(wanted) :] if p.default is p.empty]
    return f"asks for {more}, too" if more else None


def test_every_published_name_is_reached_and_called_as_it_was() -> None:
    differences = {n: d for n, p in SIGNATURES.items() if (d := difference(n, p)) is not None}
    assert differences == {}


def test_published_modules_are_imported_and_reached_alike() -> None:
    for name in bmt.published._MODULES:
        found = bmt
        for part in name.split("."):
            found = getattr(found, part)  # what `import bmtrain.name` leaves
        assert found is importlib.import_module(f"bmtrain.{name}"), name


def test_a_table_that_would_not_notice_is_no_test() -> None:
    assert difference("no_such_name", None) is not None
    assert difference("store.no_such_name", None) is not None
    assert difference("Block", "module") is not None
    assert difference("store.allgather_object", "obj comm more") is not None


# tp_size is 1, unless the launch says another by BMTRAIN_TP_SIZE.
DEFAULTS: dict[str, dict[str, Any]] = {
    "init_distributed":
        {"init_method": "env://", "seed": 0, "pipe_size": -1, "num_micro_batches": None, "tp_size": None},
    "DistributedParameter":
        {"requires_grad": True, "init_method": None, "group": None, "tp_mode": False, "tp_split_dim": -1},
    "Block": {"initialized": False, "mode": "BLOCK"},
    "TransformerBlockList": {"num_hidden": 1}, "PipelineTransformerBlockList": {"num_hidden": 1},
    "optim.AdamOptimizer": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "hold_steps": 0},
    "optim.AdamOffloadOptimizer": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "hold_steps": 0,
                                   "record_delta": False},
    "optim.OptimManager": {"loss_scale": None, "loss_scale_factor": 2, "loss_scale_steps": 1024, "min_loss_scale": 1,
                           "max_loss_scale": float("inf"), "grad_scale": None},
    "optim.OptimManager.clip_grad_norm": {"norm_type": 2, "eps": 1e-6},
    "loss.FusedCrossEntropy": {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0,
                               "parallel": False},
    "lr_scheduler.Noam": {"num_iter": 0}, "lr_scheduler.Exponential": {"num_iter": 0, "gamma": 0.95},
    "distributed.all_reduce": {"op": "sum", "comm": None}, "distributed.reduce_scatter": {"op": "sum", "comm": None},
    "save": {"non_blocking": False}, "load": {"strict": True}, "store.broadcast_object": {"src": 0},
    "store._save_to_rank0": {"destination": None, "prefix": ""}, "inspect.inspect_model": {"prefix": ""},
    "nn.Linear": {"bias": True, "dtype": None},
    "nn.ColumnParallelLinear": {"bias": True, "dtype": None, "gather_output": False, "gather_input": True,
                                "async_gather_chunks": 2},
    "nn.RowParallelLinear": {"bias": True, "dtype": None, "split_input": False, "all_reduce_output": False,
                             "async_chunks": 2},
    "nn.VPEmbedding": {"dtype": torch.half}, "nn.VPEmbedding.forward": {"projection": False},
    "print_rank": {"rank": 0}, "see_memory": {"detail": False},
    "utils.AverageRecorder": {"alpha": 0.9, "start_value": 0},
}  # fmt: skip


def test_what_is_left_out_is_what_it_was() -> None:
    for name, wanted in DEFAULTS.items():
        parameters = inspect.signature(reached(name)).parameters
        assert {p: parameters[p].default for p in wanted} == wanted, name


INSTANCES = {
    "manager": "loss_scale loss_scale_enabled optimizers lr_schedulers grad_scale steps_since_last_scale "
    "loss_scale_factor loss_scale_steps min_loss_scale max_loss_scale",
    "schedule": "start_lr warmup_iter end_iter num_iter current_lr",
    "parameter": "_original_shape _start_partition _end_partition _init_method _in_block _group _tp_mode _zero_comm "
    "_tp_split_dim _tp_original_shape group gather gather_all tp_gather _copy_data",
    "block": "_module _storage_params _storage_info _param_info grouped_parameters init_parameters set_pre_module "
    "pre_module next_module release_next_module release reference pre_hook post_hook",
    "topology": "rank stages stage_id pipe_idx tp_id tp_idx pp_zero_id pp_zero_idx tp_zero_id tp_zero_idx "
    "pp_tp_zero_id pp_tp_zero_idx zero_id zero_idx get_group_id get_group_rank",
    "comm": "rank world_size",
    "inspector": "summary get_summary get_tensor",
    "recorder": "record value",
}
CONFIG = """
    initialized rank local_rank world_size local_size pipe_size pipe_enabled tp_size topology zero_rank zero_size
    tp_rank tp_zero_rank tp_zero_size calc_stream load_stream tp_comm_stream pp_comm_stream barrier_stream load_event
    save_param_to_cpu comm zero_comm micros pipe_comm pp_zero_comm tp_comm tp_zero_comm pp_tp_zero_comm finish_save
    save_thread
"""


@on_ranks(1, 2)
def test_attributes_of_instances() -> None:
    block = bmt.Block(nn.Linear(2, 2))
    optimizer = bmt.optim.AdamOptimizer(block.parameters())
    instances = {
        "manager": bmt.optim.OptimManager(), "schedule": bmt.lr_scheduler.NoDecay(optimizer, 1.0, 0, 1),
        "parameter": block.weight, "block": block, "topology": bmt.init.topology(bmt.config),
        "comm": bmt.config["comm"], "inspector": bmt.inspect.inspect_tensor(),
        "recorder": bmt.utils.AverageRecorder(),
    }  # fmt: skip
    absent = [f"{k}.{n}" for k, names in INSTANCES.items() for n in names.split() if not hasattr(instances[k], n)]
    assert absent == []
    assert optimizer._bmtrain_optimizer is True


def names_of_config() -> list[str]:
    config = bmt.config
    absent = [key for key in CONFIG.split() if key not in config]
    with pytest.raises(ConfigurationError, match="tp_comm"):
        config["tp_comm"] = "mine"
    config["load_event"].synchronize()
    assert config["tp_comm"].world_size == config["pipe_comm"].world_size == 1
    assert config["pp_zero_comm"] is config["tp_zero_comm"] is config["pp_tp_zero_comm"] is config["comm"]
    assert config["micros"] == 1 and config["pipe_size"] == 1 and config["tp_size"] == 1
    return absent


def test_config() -> None:
    assert run_ranks(1, names_of_config) == [[]]
    assert run_ranks(2, names_of_config) == [[], []]


@on_ranks(1, 2)
def test_topology() -> None:
    rank = bmt.rank()
    for here in (bmt.init.topology(bmt.config), bmt.config["topology"]):
        assert (here.rank, here.stages, here.stage_id, here.pipe_idx) == (rank, 1, 0, rank)
        assert (here.tp_id, here.tp_idx, here.zero_id, here.zero_idx) == (0, rank, rank, 0)
        for kind in ("pp_zero", "tp_zero", "pp_tp_zero"):
            assert (getattr(here, f"{kind}_id"), getattr(here, f"{kind}_idx")) == (rank, 0), kind
        ids = {kind: here.get_group_id(kind) for kind in ("pipe", "zero", "tp_zero", "tp")}
        ranks = {kind: here.get_group_rank(kind) for kind in ids}
        assert ids == {"pipe": rank, "zero": 0, "tp_zero": 0, "tp": rank}
        assert ranks == {"pipe": 0, "zero": rank, "tp_zero": rank, "tp": 0}
        with pytest.raises(ConfigurationError, match="there are pipe"):
            here.get_group_id("stage")


@on_ranks(4, init={"pipe_size": 2, "num_micro_batches": 8})
def test_topology_of_stages() -> None:
    here, config = bmt.config["topology"], bmt.config
    pipeline, stage = divmod(bmt.rank(), 2)
    assert (here.stages, here.stage_id, here.pipe_idx, here.tp_id) == (2, stage, pipeline, 0)
    for kind in ("pp_zero", "pp_tp_zero"):
        assert (getattr(here, f"{kind}_id"), getattr(here, f"{kind}_idx")) == (pipeline, stage), kind
    assert (here.tp_zero_id, here.tp_zero_idx, here.zero_id) == (bmt.rank(), 0, bmt.rank())
    assert (here.get_group_id("pipe"), here.get_group_rank("pipe")) == (pipeline, stage)
    for name, rank in (("pipe_comm", stage), ("pp_zero_comm", pipeline), ("pp_tp_zero_comm", pipeline)):
        assert (config[name].rank, config[name].world_size) == (rank, 2), name
    assert config["pipe_enabled"] and config["pipe_size"] == 2 and config["micros"] == 8
    assert config["zero_comm"].world_size == config["tp_zero_comm"].world_size == config["zero_size"] == 4


# ---- communicators of a script's own ---------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
def test_communicators_of_a_scripts_own() -> None:
    from bmtrain import nccl

    rank, size = bmt.rank(), bmt.world_size()
    with pytest.raises(ConfigurationError, match="does not exist"):
        nccl.commInitRank(nccl.getUniqueId(), 1, 1)
    with pytest.raises(ConfigurationError, match="shutdown"):
        nccl.commDestroy(bmt.config["comm"])
    name = bmt.store.broadcast_object(nccl.getUniqueId())
    assert isinstance(name, bytes) and len(name) == 128 and nccl.getUniqueId() != nccl.getUniqueId()
    if rank > 0 or size == 1:  # all but the first rank
        few = max(size - 1, 1)
        comm = nccl.commInitRank(name, few, max(rank - 1, 0))
        assert (nccl.commCount(comm), nccl.commRank(comm)) == (few, max(rank - 1, 0))
        bmt.config["sp_comm"] = comm
        summed = bmt.distributed.all_reduce(torch.tensor([1.0 + rank]), "sum", bmt.config["sp_comm"])
        assert summed.item() == {1: 1.0, 2: 2.0, 3: 5.0}[size]
        nccl.commDestroy(comm)
        if few > 1:
            with pytest.raises(CommunicationError, match=r"left|closed"):
                comm.barrier()
        del bmt.config["sp_comm"]


def test_ncclss_numbers() -> None:
    from bmtrain import nccl

    assert [nccl.dtype2nccl(d) for d in (torch.uint8, torch.int32, torch.half, torch.float, torch.bfloat16)] == [
        1, 2, 6, 7, 9,
    ]  # fmt: skip
    assert [nccl.op2nccl(op) for op in ("sum", "prod", "max", "min", "avg")] == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigurationError, match="complex"):
        nccl.dtype2nccl(torch.complex64)
    with pytest.raises(ConfigurationError, match="median"):
        nccl.op2nccl("median")


@on_ranks(2)
def test_activations_from_rank_to_rank() -> None:
    sent = torch.randn(2, 3, 4, dtype=torch.half)
    if bmt.rank() == 0:
        bmt.distributed.send_activations(sent, 1, bmt.config["comm"])
    else:
        found = bmt.distributed.recv_activations(0, bmt.config["comm"])
        assert found.dtype == torch.half and torch.equal(found.cpu(), sent)


@on_ranks(1, 2)
def test_distributed_gradients_are_the_published_ones() -> None:
    """Sum: as it is; average: divided; maximum: where this rank has it; product: times the others'."""
    rank, size = bmt.rank(), bmt.world_size()
    for op, expected in {"sum": 1.0, "avg": 1 / size, "max": float(rank == size - 1), "min": float(rank == 0),
                         "prod": {1: 1.0, 2: float(3 - rank - 1)}[size]}.items():  # fmt: skip
        x = torch.tensor([1.0 + rank], requires_grad=True)
        bmt.distributed.all_reduce(x, op).sum().backward()  # type: ignore[arg-type]
        assert x.grad is not None and x.grad.item() == expected, op
    x = torch.tensor([1.0 + rank], requires_grad=True)
    gathered = bmt.distributed.all_gather(x)
    assert gathered.shape == (size, 1)
    (gathered * torch.arange(1.0, size + 1)[:, None]).sum().backward()
    assert x.grad is not None and x.grad.item() == 1.0 + rank
    x = torch.tensor([1.0], requires_grad=True)
    bmt.distributed.broadcast(x, 0).sum().backward()
    assert x.grad is not None and x.grad.item() == size
    assert copy.copy(bmt.sum_loss(torch.tensor(1.0 + rank))).item() == (1 + size) / 2
