"""Which unit each parameter belongs to: its innermost Block's, or the root's when several share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ..alike import follow_rank_0
from ..errors import ConfigurationError
from ..log import warn
from ..shard.flat import flat_of
from ..shard.parameter import DistributedParameter, as_distributed, init_method_of, split_of
from ..shard.pools import Pools
from ..shard.unit import ShardUnit, unit_of_flat
from .autocast_switches import switches_autocast
from .linear import LandingLinear, land_gradients
from .meta import make_buffers, materialise
from .one_memory import tie
from .record import record_of, unit_of
from .sharded import ShardedModule, become
from .used_rows import use_rows_alike


@dataclass
class Group:
    """Parameters that become one unit of ``owner``."""

    owner: nn.Module
    name: str
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    autocasts: list[bool] = field(default_factory=list)


def shard_module(pools: Pools, root: nn.Module) -> list[ShardUnit]:
    """Give every parameter of ``root`` that has none a unit, and move buffers to this process's device.

    Where ranks made different values, of parameters or buffers, all take rank 0's.

    Returns the new units.  Raises ConfigurationError if ranks built different models.  Collective.
    """
    _refuse_placed(root)
    tie(root, pools.ctx.rank)
    groups = plan_units(root)
    for group in groups:
        _check_stage(group.owner)
    device, kind = pools.ctx.device.torch_device, type(root).__name__
    # Of those that are initialised later no one expects that they are equal now.
    later = {n for g in groups for n, p in zip(g.names, g.parameters, strict=True) if init_method_of(p) is not None}
    slices = {n for g in groups for n, p in zip(g.names, g.parameters, strict=True) if split_of(p) is not None}
    differing = follow_rank_0(pools.ctx, kind, _initial_values(root, groups), slices)
    make_buffers(root)
    units = []
    for group in groups:
        whole = materialise(root, group.owner, group.parameters, group.names, device)
        made = {n: new for n, new, old in zip(group.names, whole, group.parameters, strict=True) if new is not old}
        if made:
            differing += follow_rank_0(pools.ctx, kind, made, slices)
        group.parameters = []  # the whole values are freed as soon as the unit has its shard
        parameters = [as_distributed(p) for p in whole]
        record = become(group.owner, ShardedModule)
        unit = ShardUnit(
            pools.of_stage(record.stage), group.name, parameters, group.names, group.autocasts, record.precision
        )
        record.unit = unit
        unit.keep, unit.is_block = record.keep, record.is_block
        units.append(unit)
    _warn_of_different_starts(pools.ctx.rank, kind, [name for name in differing if name not in later])
    _note_borrowed(root)
    _note_blocks(root)
    land_gradients(root)
    use_rows_alike(root)
    pools.ctx.device.empty_cache()  # what the whole parameters took is needed for buffers of other sizes
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
    return units


def _initial_values(root: nn.Module, groups: list[Group]) -> dict[str, torch.Tensor]:
    """Parameters that ``groups`` shard, and buffers of the modules they belong to, under their names."""
    values: dict[str, torch.Tensor] = {n: p for g in groups for n, p in zip(g.names, g.parameters, strict=True)}
    new = {id(group.owner) for group in groups}  # the buffers of others may have parted on purpose, as statistics do
    for owner, (_, prefix), module in _walk(root, root, "", ""):
        if id(owner) in new or id(module) in new:
            for name, buffer in module._buffers.items():
                if buffer is not None and not nn.parameter.is_lazy(buffer) and buffer.layout == torch.strided:
                    values[prefix + name] = buffer
    return values


def _warn_of_different_starts(rank: int, kind: str, names: list[str]) -> None:
    if names and rank == 0:
        warn(
            f"The ranks built {kind} with different values ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''}); "
            "rank 0's are used on all. Seed alike on every rank until the model is built.",
            stacklevel=2,
        )


def _note_borrowed(root: nn.Module) -> None:
    """Let every block's unit know the units of parameters that the block shares with others."""
    for owner, _, module in _walk(root, root, "", ""):
        unit = unit_of(owner)
        if unit is None or owner is root:
            continue
        for parameter in module._parameters.values():
            flat = flat_of(parameter)
            if flat is None or flat.unit is unit:
                continue
            if unit.stage is not None or flat.unit.pools.stage is not None:
                _refuse_shared(flat.names[0])
            if flat.unit not in unit.borrows:
                unit.borrows.append(unit_of_flat(flat))


def _note_blocks(root: nn.Module) -> None:
    """Let every owner of a unit know whether there are others inside it."""
    for module in root.modules():
        record = record_of(module)
        if record is not None:
            record.has_blocks = any(unit_of(inner) is not None for inner in module.modules() if inner is not module)


def plan_units(root: nn.Module) -> list[Group]:
    """Groups in the order of their owners in the tree, the root's last (its parameters frame the blocks').

    Raises ConfigurationError for parameters that cannot be sharded.
    """
    owners: dict[int, Group] = {}
    places: dict[int, tuple[nn.Parameter, str, list[int]]] = {}
    for owner, prefix, module in _walk(root, root, "", ""):
        group = owners.setdefault(id(owner), Group(owner, prefix[0]))
        for name, parameter in module._parameters.items():
            if parameter is None or flat_of(parameter) is not None:
                continue
            _, _, used_by = places.setdefault(id(parameter), (parameter, prefix[1] + name, []))
            if id(group.owner) not in used_by:
                used_by.append(id(group.owner))
    for parameter, name, used_by in places.values():
        # Shared between units: the root's is whole whenever any of them runs.
        if len(used_by) > 1 and any(_stage_of(owners[owner].owner) is not None for owner in used_by):
            _refuse_shared(name)
        group = owners[used_by[0] if len(used_by) == 1 else id(root)]
        group.names.append(name)
        group.parameters.append(parameter)
    spare = _spare_owners(root, owners)
    ordered = [g for g in owners.values() if g.owner is not root] + [owners[id(root)]]
    groups = [g for g in ordered if unit_of(g.owner) is None] + spare
    casts = _cast_by_autocast(root)
    for group in groups:
        _check(group)
        group.autocasts = [id(p) in casts for p in group.parameters]
    return groups


def _stage_of(owner: nn.Module) -> int | None:
    record = record_of(owner)
    return None if record is None else record.stage


def _refuse_shared(name: str) -> None:
    raise ConfigurationError(
        f"Parameter {name!r}, or one beside it, is shared between a block of a pipeline and another module. Only one "
        "stage has the block, so it has parameters of its own: share those of modules outside of the pipeline."
    )


def _check_stage(owner: nn.Module) -> None:
    record = record_of(owner)
    if record is not None and record.pipes and record.stage is None:
        raise ConfigurationError(
            f'A {type(owner).__name__} was made a Block with mode="PIPE", but is in no '
            "bmt.PipelineTransformerBlockList, which says what stage it is in. Put it into one, or leave "
            'mode="PIPE" out.'
        )


def _spare_owners(root: nn.Module, owners: dict[int, Group]) -> list[Group]:
    """Modules added to an owner that was sharded before: each becomes an owner of its own."""
    spare: dict[int, Group] = {}
    for group in owners.values():
        if unit_of(group.owner) is None or not group.parameters:
            continue
        wanted = {id(p) for p in group.parameters}
        for name, module in group.owner.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in wanted:
                    wanted.discard(id(parameter))
                    if unit_of(module) is not None:
                        raise ConfigurationError(
                            f"Parameter {key!r} was added to {name or 'a module'} after it had been sharded. Put it "
                            "into a new submodule and call bmt.BMTrainModelWrapper(model) again."
                        )
                    extra = spare.setdefault(id(module), Group(module, name))
                    extra.names.append(f"{name}.{key}")
                    extra.parameters.append(parameter)
        group.parameters = []
    return list(spare.values())


def _walk(
    module: nn.Module, owner: nn.Module, owner_name: str, prefix: str
) -> Iterator[tuple[nn.Module, tuple[str, str], nn.Module]]:
    if isinstance(module, ShardedModule):
        owner, owner_name = module, prefix.rstrip(".")
    yield owner, (owner_name, prefix), module
    for name, child in module.named_children():
        yield from _walk(child, owner, owner_name, f"{prefix}{name}.")


_AUTOCAST_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def _cast_by_autocast(root: nn.Module) -> set[int]:
    """Ids of the parameters that autocast casts whenever they are used: only layers of matrix products hold them, and
    not below a module that switches autocast off.
    """
    cast: set[int] = set()
    other: set[int] = set()
    switching = {cls for cls in {type(module) for module in root.modules()} if switches_autocast(cls)}
    for module in root.modules():
        own = {id(p) for p in module._parameters.values() if p is not None}
        (cast if type(module) in (*_AUTOCAST_LAYERS, LandingLinear) else other).update(own)
        if type(module) in switching:
            other.update(id(p) for p in module.parameters())
    return cast - other


def _refuse_placed(root: nn.Module) -> None:
    """Raise ConfigurationError for what transformers' ``device_map`` has spread over devices or left on a disk."""
    for module in root.modules():
        places = {str(place) for place in (getattr(module, "hf_device_map", None) or {}).values()}
        if len(places) > 1 or "disk" in places:
            raise ConfigurationError(
                f"{type(module).__name__} was loaded with a device_map, which put it on {', '.join(sorted(places))}. "
                "Load it without device_map: it comes from its files when it is sharded, and each rank keeps its part."
            )


def _check(group: Group) -> None:
    for name, parameter in zip(group.names, group.parameters, strict=True):
        if nn.parameter.is_lazy(parameter):
            raise ConfigurationError(
                f"Parameter {name!r} has no shape yet (a lazy module). Run the module once on a sample before it is "
                "sharded."
            )
        if type(parameter) not in (nn.Parameter, DistributedParameter):
            raise ConfigurationError(
                f"Parameter {name!r} is a {type(parameter).__name__}; only plain torch.nn.Parameter can be sharded."
            )
