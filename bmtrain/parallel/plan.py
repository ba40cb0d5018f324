"""Splits the layers of an ordinary model over the tensor-parallel group, as a plan says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from math import gcd
from types import MethodType
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import nn

from ..context import context
from ..errors import ConfigurationError
from ..shard import DistributedParameter
from ..shard.flat import flat_of
from ..shard.slices import Split, own_slice
from .embedding import VPEmbedding, split_in_place, why_not_split
from .functional import Copy, apply_over
from .group import slice_of, tensor_group
from .tensor import ColumnParallelLinear, RowParallelLinear

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Style(NamedTuple):
    """How a layer is split.

    Attributes:
        along: its output features ("columns"), or its input features or an embedding's rows ("rows"); None: it is not,
            but the gradients of what it makes of this rank's features are summed.
        whole: whether its output is joined, or its input comes whole.
        packed: whether parts follow each other in its output.
        parts: their relative lengths; None where the plan does not say.
    """

    along: Literal["columns", "rows"] | None
    whole: bool = False
    packed: bool = False
    parts: tuple[int, ...] | None = None


_STYLES = {
    "colwise": _Style("columns"),
    "colwise_rep": _Style("columns", whole=True),
    "colwise_gather_output": _Style("columns", whole=True),
    "packed_colwise": _Style("columns", packed=True),
    "rowwise": _Style("rows"),
    "rowwise_rep": _Style("rows", whole=True),
    "rowwise_split_input": _Style("rows", whole=True),
    "embedding_rowwise": _Style("rows"),
    "replicated_with_grad_allreduce": _Style(None),
}
"""Words of plans, those of Hugging Face's models among them, and what they mean."""

_HEADS = re.compile(r"(.*_)?n?heads?(_(q|k|v|kv|local|total))?")
_OF_ONE_HEAD = (
    "d_k",
    "d_v",
    "d_kv",
    "head_width",
    "key_value_proj_dim",
    "head_dim",
    "head_size",
    "dim_head",
    "d_head",
    "attention_head_size",
    "dim_per_head",
)


class _Columns(ColumnParallelLinear, nn.Linear):  # type: ignore[misc] # weight and bias of either
    """What takes an ``nn.Linear``'s place is one to code that looks for them, as for groups of weight decay."""

    reset_parameters: Any = None  # of a slice, it would go by the slice's sizes


class _Rows(RowParallelLinear, nn.Linear):  # type: ignore[misc]
    reset_parameters: Any = None


class _Layer(NamedTuple):
    name: str
    parent: nn.Module
    own_name: str
    module: nn.Module
    style: _Style

    @property
    def split(self) -> Split:
        """Of its weight."""
        dim = 1 if self.style.along == "rows" and isinstance(self.module, nn.Linear) else 0
        return Split(dim, self.style.parts or (1,))


def parallelize_module(
    module: ModuleT,
    plan: Mapping[str, object] | None = None,
    divide: Collection[str] | None = None,
    heads: Collection[str | int] = (),
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
            ``torch.distributed.tensor.parallel``, ColwiseParallel and RowwiseParallel.  ("packed_colwise", 3) splits a
            layer whose output is three equal parts, one behind the other (queries, keys and values), so that each rank
            has its share of every part; ("packed_colwise", [4, 1, 1]) gives the parts' lengths, all or relative to each
            other, and "packed_colwise" finds out their number where the "rowwise" layer behind it leaves no doubt.  A
            module that is not split, but sees this rank's share of the features (a norm of each head), is
            "replicated_with_grad_allreduce".  None takes the plan that a model of Hugging Face transformers brings
            along.
        divide: the attributes that count heads, of the modules that hold split layers: each is divided by the size of
            the group.  Empty if their forward goes by the size of what it is given.
        heads: such attributes that stay as they are, because the forward goes by the size of what it is given: only
            whether they can be divided is looked at, so that no head is cut.  "config.n_head" is one of an attribute,
            and 12 such a number itself.

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
    layers = [layer._replace(style=layer.style._replace(parts=_parts(layer, layers, ready))) for layer in layers]
    _with_tied(module, layers)
    parents = {id(layer.parent): layer.parent for layer in layers}
    if heads and divide is None:
        divide = ()
    counts = [] if ready else [found for parent in parents.values() for found in _counts(parent, divide, size)]
    for parent in parents.values():
        _require_divisible(parent, heads, size)
    for layer in layers:
        _require_whole_heads(layer)
    kept: dict[tuple[int, Split | None], DistributedParameter] = {}
    context().building += 1  # what is made here is sharded with the model
    try:
        for layer in layers:
            setattr(layer.parent, layer.own_name, _split(layer, kept))
    finally:
        context().building -= 1
    for parent, name in counts:
        setattr(parent, name, getattr(parent, name) // size)
    return module


def _layers(module: nn.Module, plan: Mapping[str, object]) -> Iterator[_Layer]:
    modules = dict(module.named_modules(remove_duplicate=False))
    for pattern, given in plan.items():
        style, words = _style(pattern, given), pattern.split(".")
        found = [name for name in modules if name and _matches(name.split("."), words)]
        if not found:
            raise ConfigurationError(f"{pattern!r} in the plan is the name of no module of {type(module).__name__}.")
        for name in found:
            layer, (prefix, _, own_name) = modules[name], name.rpartition(".")
            if type(layer) is not nn.Linear and not isinstance(layer, nn.Embedding) and style.along is not None:
                raise ConfigurationError(
                    f"{name} is {type(layer).__name__}, and only nn.Linear and nn.Embedding can be split. Leave it out "
                    "of the plan."
                )
            _require_splittable(name, layer, style)
            yield _Layer(name, modules[prefix], own_name, layer, style)


def _require_splittable(name: str, layer: nn.Module, style: _Style) -> None:
    why = None
    if isinstance(layer, nn.Embedding) and style.along == "columns":
        why = 'an embedding, which can be split "rowwise" only'
    elif isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse or layer.scale_grad_by_freq):
        why = "an embedding with max_norm, sparse or scale_grad_by_freq, which cannot be split"
    elif style.along is None and any(True for _ in layer.children()):
        why = "more than one module; name those that hold parameters"
    elif layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        why = "a layer with hooks, which would be lost; register them afterwards"
    elif any(flat_of(parameter) is not None for parameter in layer.parameters()):
        why = (
            "sharded already. Call bmt.parallelize_module before bmt.BMTrainModelWrapper, or, in a DistributedModule, "
            "at the end of __init__ with self"
        )
    elif isinstance(layer, nn.Embedding) and style.along == "rows":
        why = why_not_split(layer, max(2, tensor_group().world_size))
    if why is not None:
        raise ConfigurationError(f"{name} is {why}.")


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


def _style(name: str, given: Any) -> _Style:
    parts: Any = None
    word = given
    if isinstance(given, (tuple, list)) and len(given) == 2 and given[0] == "packed_colwise":
        word, parts = given
    found = _STYLES.get(word) if isinstance(word, str) else None
    if parts is not None:
        lengths = (1,) * parts if type(parts) is int else tuple(parts) if isinstance(parts, (tuple, list)) else ()
        if not lengths or any(type(length) is not int or length < 1 for length in lengths):
            raise ConfigurationError(
                f"{name!r} is to be split as {given!r}; the parts of its output are a number, or a list of lengths: "
                '("packed_colwise", 3), ("packed_colwise", [4, 1, 1]).'
            )
        return _Style("columns", packed=True, parts=tuple(length // gcd(*lengths) for length in lengths))
    kind = type(given)
    if kind.__module__.startswith("torch.distributed.tensor") and kind.__name__ in (
        "ColwiseParallel",
        "RowwiseParallel",
    ):
        (takes,), (gives,) = given.input_layouts, given.output_layouts
        if kind.__name__ == "ColwiseParallel" and takes.is_replicate() and (gives.is_shard(-1) or gives.is_replicate()):
            found = _Style("columns", whole=gives.is_replicate())
        elif kind.__name__ == "RowwiseParallel" and gives.is_replicate():
            found = _Style("rows", takes.is_replicate()) if takes.is_shard(-1) or takes.is_replicate() else None
    if found is None:
        raise ConfigurationError(
            f"{name!r} is to be split as {given!r}, which is not supported. There are {', '.join(_STYLES)}, and "
            "torch's ColwiseParallel and RowwiseParallel of whole inputs or outputs."
        )
    return found


def _parts(layer: _Layer, layers: list[_Layer], ready: bool) -> tuple[int, ...]:
    """Of the output of ``layer``, by the layers behind it if the plan does not say.  ``ready``: it came along."""
    style, module = layer.style, layer.module
    if style.parts is not None or style.along != "columns" or style.whole or not isinstance(module, nn.Linear):
        return style.parts or (1,)
    if ready:  # whoever wrote it knows the model; packed means a gate and what it is for
        return (1, 1) if style.packed else (1,)
    features, behind = module.out_features, list(_taken_behind(layer, layers))
    if not style.packed:
        if behind and features > max(behind):
            raise ConfigurationError(
                f"{layer.name} gives {features} features, and what is behind it takes {max(behind)}: it is several "
                'layers in one. If their parts follow each other, say how many there are, ("packed_colwise", 3), or '
                'how long they are, ("packed_colwise", [4, 1, 1]); if those of each head stand together, '
                '("packed_colwise", 1).'
            )
        return (1,)
    number, rest = divmod(features, behind[0]) if len(set(behind)) == 1 else (0, 0)
    heads = any(_HEADS.fullmatch(name) or name in _OF_ONE_HEAD for name in vars(layer.parent))
    # Two may be queries, and half as many keys and values.
    if rest or (number != 3 and (number != 2 or heads)):
        raise ConfigurationError(
            f"Into which parts the {features} features that {layer.name} gives are to be cut cannot be told. Say how "
            'many equal ones, ("packed_colwise", 3), or how long they are, ("packed_colwise", [4, 1, 1]).'
        )
    return (1,) * number


def _taken_behind(layer: _Layer, layers: list[_Layer]) -> Iterator[int]:
    """How many features the layers take that may be behind ``layer``."""
    for other in layers:
        if other.parent is layer.parent and other.style == _STYLES["rowwise"] and isinstance(other.module, nn.Linear):
            yield other.module.in_features


def _with_tied(module: nn.Module, layers: list[_Layer]) -> None:
    """Add the embeddings that share a weight with a layer that is split along the same dimension."""
    split: dict[int, Split] = {}
    for layer in layers:
        if layer.style.along is not None and split.setdefault(id(layer.module.weight), layer.split) != layer.split:
            raise ConfigurationError(
                f"{layer.name}.weight is also the weight of another layer, which the plan splits otherwise. Name both "
                "in the plan, along the same dimension, or neither."
            )
    chosen = {id(layer.module) for layer in layers}
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, other in modules.items():
        for own_name, parameter in other._parameters.items():
            if id(parameter) not in split or id(other) in chosen:
                continue
            if not isinstance(other, nn.Embedding) or split[id(parameter)] != Split(0):
                raise ConfigurationError(
                    f"{name}.{own_name} is also the weight of a layer that the plan splits, so that it must be split, "
                    "too. Name both in the plan, along the same dimension, or neither."
                )
            _require_splittable(name, other, _STYLES["rowwise"])
            prefix, _, own = name.rpartition(".")
            layers.append(_Layer(name, modules[prefix], own, other, _STYLES["rowwise"]))
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


def _require_divisible(parent: nn.Module, heads: Collection[str | int], size: int) -> None:
    for path in heads:
        value: Any = path if isinstance(path, int) else parent
        for name in path.split(".") if isinstance(path, str) else ():
            value = getattr(value, name, None)
        if type(value) is int and value % size:
            name = f"{path} is {value}" if isinstance(path, str) else f"forward cuts features into {value} heads"
            raise ConfigurationError(
                f"{type(parent).__name__}.{name}: so many heads cannot be divided over {size} tensor-parallel ranks. "
                "Take another tp_size, or leave its layers out of the plan."
            )


def _require_whole_heads(layer: _Layer) -> None:
    module, style = layer.module, layer.style
    if style.along is None:
        return
    if isinstance(module, nn.Embedding):
        slice_of(module.num_embeddings, f"The number of rows of {layer.name}")
        return
    assert isinstance(module, nn.Linear)
    columns, parts = style.along == "columns", layer.split.parts
    what = "out_features" if columns else "in_features"
    features = module.out_features if columns else module.in_features
    if features % sum(parts):
        raise ConfigurationError(f"{layer.name}.{what} is {features}, which has no parts like {list(parts)}.")
    for length in layer.split.lengths(features):
        own = slice_of(length, f"{'A part of ' if len(parts) > 1 else ''}{layer.name}.{what}")
        for name in _OF_ONE_HEAD:
            width = getattr(layer.parent, name, None)
            if type(width) is int and width > 1 and not (columns and style.whole) and own % width:
                raise ConfigurationError(
                    f"{layer.name} has {length // width} heads of {width} features, which cannot be divided over "
                    f"{tensor_group().world_size} tensor-parallel ranks."
                )


def _split(layer: _Layer, kept: dict[tuple[int, Split | None], DistributedParameter]) -> nn.Module:
    module, style = layer.module, layer.style
    made: nn.Module
    if style.along is None:
        module.forward = MethodType(_with_summed_gradients, module)
        return module
    if isinstance(module, nn.Embedding):
        if type(module) is not nn.Embedding:
            module.weight = _slice(cast(nn.Parameter, module.weight), layer.split, kept)
            return split_in_place(module)
        rows, width, dtype = module.num_embeddings, module.embedding_dim, module.weight.dtype
        made = VPEmbedding(rows, width, dtype, padding_idx=module.padding_idx)
    else:
        assert isinstance(module, nn.Linear)
        sizes = module.in_features, module.out_features, module.bias is not None, module.weight.dtype
        if style.along == "columns":
            made = _Columns(*sizes, gather_output=style.whole, gather_input=False)
        else:
            made = _Rows(*sizes, split_input=style.whole, all_reduce_output=True)
    splits = {"weight": layer.split, "bias": layer.split if style.along == "columns" else None}
    for name, parameter in module.named_parameters(recurse=False):
        setattr(made, name, _slice(parameter, splits[name], kept))
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
    whole: nn.Parameter, split: Split | None, kept: dict[tuple[int, Split | None], DistributedParameter]
) -> DistributedParameter:
    """This rank's of the group's first rank's values; of one parameter always the same one."""
    key = id(whole), split
    if key not in kept:
        ctx = context()
        values = whole.detach().to(ctx.device.torch_device).contiguous()
        ctx.tensor_group.broadcast(values.view(-1).view(torch.uint8), 0)
        values = own_slice(ctx, values.to(whole.device), split).clone()
        init_method, group = getattr(whole, "_init_method", None), getattr(whole, "_group", None)
        dim, parts = split or (-1, (1,))
        kept[key] = DistributedParameter(
            values, whole.requires_grad, init_method, group, split is not None, tp_split_dim=dim, tp_parts=parts
        )
    return kept[key]
