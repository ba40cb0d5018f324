"""What a job is, in a few lines: said once, by rank 0, when the first step is through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils._pytree import tree_leaves

from .. import kernels
from ..context import Context
from ..precision import Precision
from ..shard.unit import ShardUnit
from ..topology import Mesh

_MIB = 2**20


def summary(
    ctx: Context, units: Iterable[ShardUnit], state_bytes: int, forwards: int, inputs: Sequence[object]
) -> Iterator[str]:
    """Parameters, bytes per rank, ranks, their mesh, the batch, precision, and what is decided about memory.

    Args:
        state_bytes: what the states of the optimizer that has stepped take on this rank.
        forwards: how many the first step ran here.
        inputs: what the last of them got.
    """
    every = list(units)
    flats = [flat for unit in every for flat in unit.flats]
    total = sum(parameter.numel() for flat in flats for parameter in flat.params)
    trained = sum(parameter.numel() for flat in flats for parameter in flat.params if parameter.requires_grad)
    device = ctx.device.torch_device
    ranks = f"{ctx.world_size} rank{'s' * (ctx.world_size != 1)}, {ctx.topology.local_size} on this host"
    yield f"{counts(total, trained, len(every))}; {ranks}{_mesh(ctx.topology.mesh)}, on {device.type}"
    shards = sum(flat.shard.nbytes for flat in flats)
    gradients = sum(flat.shard.numel() * flat.gradient.dtype.itemsize for flat in flats if flat.trainable)
    largest = max((unit.whole_bytes() for unit in every), default=0)
    yield (
        f"each rank holds {shards / _MIB:,.1f} MiB of parameters, {gradients / _MIB:,.1f} of gradients and "
        f"{state_bytes / _MIB:,.1f} of optimizer states, and while a block runs it whole: at most "
        f"{largest / _MIB:,.1f} MiB each"
    )
    batch = _batch(ctx, forwards, inputs)
    if batch:
        yield batch
    memory = ctx.memory if isinstance(ctx.memory, str) else f"at most {ctx.memory:g} GiB"
    measured = ctx.device.measures_memory and ctx.memory != "lean"
    otherwise = "activations are kept from the third step on" if ctx.memory == "auto" else "nothing is kept"
    plan = "to be decided in the first steps" if measured else otherwise
    ops = ("compiled" if kernels.compiled() else "not compiled") if ctx.device.is_cuda else "torch's on a CPU"
    yield f"precision {words(ctx.precision)}; memory {memory}: {plan}; kernels: {ops}"


def _batch(ctx: Context, forwards: int, inputs: Sequence[object]) -> str:
    """What the first step has trained on, by the first tensor that each forward got; "" where that tells nothing."""
    first = [first_tensor(given) for given in inputs]
    shapes = {tuple(tensor.shape) for tensor in first if tensor is not None}
    if len(shapes) != 1:
        return ""
    (shape,), ranks = shapes, ctx.topology.data_size
    times = f"{forwards} times " if forwards > 1 else ""
    rows = f", {shape[0] * forwards * ranks:,} rows on all ranks if theirs are as large" if ranks > 1 else ""
    return f"the first step took {times}{' x '.join(map(str, shape))} here{rows}"


def first_tensor(given: object) -> torch.Tensor | None:
    """What is taken for the batch in a forward's arguments: the first that has rows, and is no time or noise level."""
    return next((leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)


def counts(total: int, trained: int, units: int) -> str:
    """How large a model is."""
    return f"{total:,} parameters, {trained:,} train, in {units} unit{'s' * (units != 1)}"


def _mesh(mesh: Mesh) -> str:
    """Its dimensions, where there are others than that of the shards."""
    sizes = {name: size for name, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True) if size > 1}
    return f", {' x '.join(f'{name} {size}' for name, size in sizes.items())}" if sizes.keys() - {"shard"} else ""


def words(precision: Precision) -> str:
    """What a policy asks for."""
    named = [(name, getattr(precision, name)) for name in ("param", "reduce", "output")]
    said = [f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in named if dtype is not None]
    return ", ".join(said) or "as the model and autocast have it"
