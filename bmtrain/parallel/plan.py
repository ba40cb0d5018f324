"""Splits the layers of an ordinary model over the tensor-parallel group, as a plan says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..context import context
from ..errors import ConfigurationError
from ..shard import DistributedParameter
from ..shard.flat import flat_of
from ..shard.slices import own_slice
from .embedding import VPEmbedding
from .functional import Copy, apply_over
from .group import slice_of, tensor_group
from .tensor import ColumnParallelLinear, RowParallelLinear

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_STYLES = {
    "colwise": "column",
    "colwise_rep": "column, gathered",
    "colwise_gather_output": "column, gathered",
    "rowwise": "row",
    "rowwise_rep": "row of whole input",
    "rowwise_split_input": "row of whole input",
    "embedding_rowwise": "row",
    "replicated_with_grad_allreduce": "summed",
}
"""Words of plans, those of Hugging Face's models among them, and what they mean."""

_HEADS = re.compile(r"(.*_)?n?heads?(_(q|k|v|kv|local|total))?")
_OF_ONE_HEAD = ("head_dim", "head_size", "dim_head", "d_head", "attention_head_size", "dim_per_head")


class _Layer(NamedTuple):
    name: str
    parent: nn.Module
    own_name: str
    module: nn.Module
    style: str


def parallelize_module(
    module: ModuleT, plan: Mapping[str, Any] | None = None, divide: Collection[str] | None = None
) -> ModuleT:
    """Split ``nn.Linear`` and ``nn.Embedding`` layers of ``module`` over the tensor-parallel group.  Collective.

        bmt.init_distributed(tp_size=2)
        model = bmt.parallelize_module(GPT(), {
            "layers.*.attention.[qkv]": "colwise", "layers.*.attention.out": "rowwise",
            "layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise",
        }, divide=["n_head"])
        model = bmt.BMTrainModelWrapper(model)

    Each rank keeps its slice of the group's first rank's values.  To be called before the model is sharded: before
    BMTrainModelWrapper, or, in a DistributedModule, at the end of ``__init__`` with ``self``.  The layers are replaced
    in place; state dicts stay those of the whole model.  Changes nothing without ``tp_size``.

    Args:
        plan: by name, where ``*`` stands for any one part of it, how a layer is split: "colwise" (each rank has its
            share of the output features), "rowwise" (of the input features, which come as shares; the output is summed;
            of an embedding, its share of the rows), "colwise_gather_output", "rowwise_split_input"; or objects of
            ``torch.distributed.tensor.parallel``, ColwiseParallel and RowwiseParallel.  A module that is not split, but
            sees this rank's share of the features (a norm of each head), is "replicated_with_grad_allreduce".  None
            takes the plan that a model of Hugging Face transformers brings along.
        divide: the attributes that count heads, of the modules that hold split layers: each is divided by the size of
            the group.  Empty if their forward goes by the size of what it is given.

    Returns ``module``.  Raises ConfigurationError, before anything has changed, where a layer cannot be split so, where
    a head would be cut, and where heads are counted and ``divide`` does not say which.
    """
    ready = plan is None
    if plan is None:
        plan = getattr(module, "_tp_plan", None) or {}
        if not plan:
            raise ConfigurationError(
                f"{type(module).__name__} brings no plan along. Say which layers to split: "
                'bmt.parallelize_module(model, {"layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise"}).'
            )
    layers = list(_layers(module, plan))
    size = context().topology.tp_size
    if size == 1:
        return module
    _with_tied(module, layers)
    parents = {id(layer.parent): layer.parent for layer in layers}
    counts = [] if ready else [found for parent in parents.values() for found in _counts(parent, divide, size)]
    for layer in layers:
        _require_whole_heads(layer)
    kept: dict[tuple[int, int], DistributedParameter] = {}
    context().building += 1  # what is made here is sharded with the model
    try:
        for layer in layers:
            setattr(layer.parent, layer.own_name, _split(layer, kept))
    finally:
        context().building -= 1
    for parent, name in counts:
        setattr(parent, name, getattr(parent, name) // size)
    return module


def _layers(module: nn.Module, plan: Mapping[str, Any]) -> Iterator[_Layer]:
    modules = dict(module.named_modules(remove_duplicate=False))
    for pattern, given in plan.items():
        style, parts = _style(pattern, given), pattern.split(".")
        found = [name for name in modules if name and _matches(name.split("."), parts)]
        if not found:
            raise ConfigurationError(f"{pattern!r} in the plan is the name of no module of {type(module).__name__}.")
        for name in found:
            layer, (prefix, _, own_name) = modules[name], name.rpartition(".")
            if type(layer) not in (nn.Linear, nn.Embedding) and style != "summed":
                raise ConfigurationError(
                    f"{name} is {type(layer).__name__}, and only nn.Linear and nn.Embedding can be split. Leave it out "
                    "of the plan."
                )
            _require_splittable(name, layer, style)
            yield _Layer(name, modules[prefix], own_name, layer, style)


def _require_splittable(name: str, layer: nn.Module, style: str) -> None:
    why = None
    if isinstance(layer, nn.Embedding) and style not in ("row", "row of whole input"):
        why = 'an embedding, which can be split "rowwise" only'
    elif isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq):
        why = "an embedding with max_norm, sparse or scale_grad_by_freq, which cannot be split"
    elif style == "summed" and any(True for _ in layer.children()):
        why = "more than one module; name those that hold parameters"
    elif layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        why = "a layer with hooks, which would be lost; register them afterwards"
    elif any(flat_of(parameter) is not None for parameter in layer.parameters()):
        why = (
            "sharded already. Call bmt.parallelize_module before bmt.BMTrainModelWrapper, or, in a DistributedModule, "
            "at the end of __init__ with self"
        )
    if why is not None:
        raise ConfigurationError(f"{name} is {why}.")


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


def _style(name: str, given: Any) -> str:
    found = _STYLES.get(given) if isinstance(given, str) else None
    kind = type(given)
    if kind.__module__.startswith("torch.distributed.tensor") and kind.__name__ in (
        "ColwiseParallel",
        "RowwiseParallel",
    ):
        (takes,), (gives,) = given.input_layouts, given.output_layouts
        if kind.__name__ == "ColwiseParallel" and takes.is_replicate():
            found = "column" if gives.is_shard(-1) else "column, gathered" if gives.is_replicate() else None
        elif kind.__name__ == "RowwiseParallel" and gives.is_replicate():
            found = "row" if takes.is_shard(-1) else "row of whole input" if takes.is_replicate() else None
    if found is None:
        raise ConfigurationError(
            f"{name!r} is to be split as {given!r}, which is not supported. There are {', '.join(_STYLES)}, and "
            "torch's ColwiseParallel and RowwiseParallel of whole inputs or outputs."
        )
    return found


def _split_dim(layer: _Layer) -> int:
    """Of its weight."""
    return 1 if layer.style.startswith("row") and isinstance(layer.module, nn.Linear) else 0


def _with_tied(module: nn.Module, layers: list[_Layer]) -> None:
    """Add the embeddings that share a weight with a layer that is split along the same dimension."""
    split = {(id(layer.module.weight), _split_dim(layer)) for layer in layers if layer.style != "summed"}
    chosen = {id(layer.module) for layer in layers}
    weights = {number for number, _ in split}
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, other in modules.items():
        for own_name, parameter in other._parameters.items():
            if id(parameter) not in weights or id(other) in chosen:
                continue
            if type(other) is not nn.Embedding or (id(parameter), 0) not in split:
                raise ConfigurationError(
                    f"{name}.{own_name} is also the weight of a layer that the plan splits, so that it must be split, "
                    "too. Name both in the plan, along the same dimension, or neither."
                )
            prefix, _, own = name.rpartition(".")
            layers.append(_Layer(name, modules[prefix], own, other, "row"))
            chosen.add(id(other))


def _counts(parent: nn.Module, divide: Collection[str] | None, size: int) -> Iterator[tuple[nn.Module, str]]:
    """The attributes of ``parent`` that are to be divided."""
    for name, value in vars(parent).items():
        if type(value) is not int:
            continue
        if name in (divide or ()):
            if value % size:
                raise ConfigurationError(
                    f"{name} is {value}, which cannot be divided over {size} tensor-parallel ranks."
                )
            yield parent, name
        elif divide is None and _HEADS.fullmatch(name):
            raise ConfigurationError(
                f"{type(parent).__name__}.{name} is {value}, and each of {size} ranks has its share of the features. "
                f'Say bmt.parallelize_module(..., divide=["{name}"]) if its forward cuts features by that number, '
                "or divide=[] if not."
            )


def _require_whole_heads(layer: _Layer) -> None:
    module = layer.module
    if layer.style == "summed":
        return
    if isinstance(module, nn.Embedding):
        slice_of(module.num_embeddings, f"The number of rows of {layer.name}")
        return
    assert isinstance(module, nn.Linear)
    column = layer.style.startswith("column")
    features = module.out_features if column else module.in_features
    own = slice_of(features, f"{layer.name}.{'out' if column else 'in'}_features")
    for name in _OF_ONE_HEAD:
        width = getattr(layer.parent, name, None)
        if type(width) is int and width > 1 and "gathered" not in layer.style and own % width:
            raise ConfigurationError(
                f"{layer.name} has {features // width} heads of {width} features, which cannot be divided over "
                f"{tensor_group().world_size} tensor-parallel ranks."
            )


def _split(layer: _Layer, kept: dict[tuple[int, int], DistributedParameter]) -> nn.Module:
    module, style = layer.module, layer.style
    made: nn.Module
    if style == "summed":
        module.forward = MethodType(_with_summed_gradients, module)
        return module
    if isinstance(module, nn.Embedding):
        rows, width, dtype = module.num_embeddings, module.embedding_dim, module.weight.dtype
        made = VPEmbedding(rows, width, dtype, padding_idx=module.padding_idx)
    else:
        assert isinstance(module, nn.Linear)
        sizes = module.in_features, module.out_features, module.bias is not None, module.weight.dtype
        if style.startswith("column"):
            made = ColumnParallelLinear(*sizes, gather_output="gathered" in style, gather_input=False)
        else:
            made = RowParallelLinear(*sizes, split_input="whole" in style, all_reduce_output=True)
    dims = {"weight": _split_dim(layer), "bias": 0 if style.startswith("column") else None}
    for name, parameter in module.named_parameters(recurse=False):
        setattr(made, name, _slice(parameter, dims[name], kept))
    return made.train(module.training)


def _with_summed_gradients(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module whose parameters see this rank's share of the features."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    shown: dict[str, Any] = {name: apply_over(Copy, parameter, tensor_group()) for name, parameter in own.items()}
    module._parameters.update(shown)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        module._parameters.update(own)


def _slice(
    whole: nn.Parameter, dim: int | None, kept: dict[tuple[int, int], DistributedParameter]
) -> DistributedParameter:
    """This rank's of the group's first rank's values; of one parameter always the same one."""
    key = id(whole), -1 if dim is None else dim
    if key not in kept:
        ctx = context()
        values = whole.detach().to(ctx.device.torch_device).contiguous()
        ctx.tensor_group.broadcast(values.view(-1).view(torch.uint8), 0)
        values = own_slice(ctx, values.to(whole.device), dim).clone()
        init_method, group = getattr(whole, "_init_method", None), getattr(whole, "_group", None)
        kept[key] = DistributedParameter(
            values, whole.requires_grad, init_method, group, tp_mode=dim is not None, tp_split_dim=key[1]
        )
    return kept[key]
