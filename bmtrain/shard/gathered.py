"""Whole values for user code outside a forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..alike import follow_rank_0
from ..autograd import of_no_graph
from ..context import Context, context
from ..errors import ConfigurationError
from ..log import warn
from .engine import engine
from .flat import FlatShard, flat_of
from .parameter import DistributedParameter, group_of, init_method_of, raw_data, split_of
from .slices import own_slice, whole_shape
from .unit import ShardUnit, unit_of_flat

Gatherable = nn.Module | nn.Parameter | Iterable[nn.Parameter]


def units_of(what: Gatherable) -> list[ShardUnit]:
    """The units that hold these parameters, each once, in order."""
    if isinstance(what, nn.Module):
        parameters: Iterable[nn.Parameter] = what.parameters()
    elif isinstance(what, torch.Tensor):
        parameters = [what]  # type: ignore[list-item]
    else:
        parameters = what
    found: dict[int, ShardUnit] = {}
    for parameter in parameters:
        flat = flat_of(parameter)
        if flat is not None:
            found[id(flat.unit)] = unit_of_flat(flat)
    return list(found.values())


@contextmanager
def gathered(what: Gatherable, write: bool = False) -> Iterator[None]:
    """Show whole parameters inside the ``with``.  Collective: every rank enters it.

    Args:
        what: a module (all its parameters), a parameter, or an iterable of parameters.
        write: keep what the body writes.  Where ranks write different values, all keep rank 0's, with a warning.
    """
    units = units_of(what)
    flats = [flat for unit in units for flat in unit.flats]
    if engine().idle and flats:
        engine().meet(f"bmt.gathered of {flats[0].names[0]}{' and others' if len(flats[0].names) > 1 else ''}")
    with engine().outside.pinned(units):
        for flat in flats:
            flat.keep_writes()  # of the forward that this may be part of
        try:
            with torch.autograd.graph.saved_tensors_hooks(_kept, _given):
                yield
            if write:
                _follow_rank_0(flats)
                for flat in flats:
                    flat.keep_whole_values()
        finally:
            for flat in flats:
                flat.forget_writes()
            if isinstance(what, nn.Module):
                _give_memory(what)


def _give_memory(module: nn.Module) -> None:
    """Let parameters and buffers that are views of whole values, as old weight norms make them, have their own."""
    for inner in module.modules():
        for made in (*inner._parameters.values(), *inner._buffers.values()):
            if made is not None and flat_of(made) is None and engine().whole_flat(made) is not None:
                made.data = made.data.clone()


def _follow_rank_0(flats: list[FlatShard]) -> None:
    if flats:
        written = {n: raw_data(p) for flat in flats for n, p in zip(flat.names, flat.params, strict=True)}
        slices = [name for flat in flats for name in flat.slices]
        keep_rank_0s(flats[0].unit.ctx, "What bmt.gathered(write=True) shows", written, slices)


def keep_rank_0s(ctx: Context, what: str, written: Mapping[str, torch.Tensor], slices: Collection[str] = ()) -> None:
    """Take rank 0's values of parameters, by name, where ``what`` differs between ranks, and warn.  Collective.

    ``slices`` as in ``alike.follow_rank_0``.
    """
    differing = follow_rank_0(ctx, what, written, slices)
    if differing and ctx.rank == 0:
        warn(
            f"The ranks wrote different values into {', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}; "
            "rank 0's are used on all. Seed alike on every rank before parameters are initialised.",
            stacklevel=2,
        )


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """What autograd may keep: parameters go when the block ends, so that a penalty on them needs copies."""
    base = tensor._base if tensor._base is not None else tensor
    flat = flat_of(base)
    if flat is not None and flat.unit.ctx.world_size > 1:
        return tensor.detach().clone()
    return of_no_graph(tensor)


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def gather_grad(parameter: nn.Parameter, join: bool = False) -> torch.Tensor | None:
    """The whole reduced gradient, in fp32 for low precision; None if no rank has one.  Collective.

    Shape: the parameter's, of a slice the slice's; with ``join`` that of all tensor-parallel ranks' slices together, in
    the order of the whole layer.  Call it between backward and the optimizer's step.  In a loop over parameters those
    that lie together are gathered together: the whole gradients of one unit stay until something changes.
    """
    flat = flat_of(parameter)
    if flat is None:
        return parameter.grad
    engine().finish_backward()
    assert isinstance(parameter, DistributedParameter)
    index, gradient = parameter._index, flat.gradient
    if not gradient.is_used(index):
        return None
    whole = gradient.settled()
    if flat.unit.ctx.world_size > 1:
        whole = flat.unit.pools.outer.whole_gradients.of(flat.unit, flat.key, whole, flat.gather_grad)
    slot = flat.layout.slots[index]
    own = whole[slot.start : slot.end].view(slot.shape)
    return flat.joined(index, own).clone() if join else own.clone()


def grouped_parameters(model: nn.Module) -> Iterator[tuple[str | None, list[nn.Parameter]]]:
    """Parameters by the ``group`` they were made with: pairs of group name and parameters."""
    groups: dict[str | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(group_of(parameter), []).append(parameter)
    yield from groups.items()


def init_parameters(model: nn.Module) -> None:
    """Run every parameter's ``init_method`` on its whole value, in the order of ``model.parameters()``.  Collective.

    Parameters without one keep their values.  Random numbers come from the generator of the parameter's device,
    as if the model were not sharded; where ranks draw different ones, all take rank 0's, with a warning.
    """
    for parameter in model.parameters():
        method = init_method_of(parameter)
        if method is None:
            continue
        if not callable(method):
            raise ConfigurationError(f"init_method must be callable, not {method!r}.")
        with gathered(parameter, write=True), torch.no_grad():
            initialise(parameter, method)


def initialise(parameter: nn.Parameter, method: Callable[[torch.Tensor], object]) -> None:
    """Let ``method`` fill ``parameter``, which is whole; of a slice, let it fill the whole and take the slice."""
    split = split_of(parameter)
    if split is None:
        method(parameter)
        return
    shape = whole_shape(context(), tuple(parameter.shape), split)
    whole = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    method(whole)
    parameter.copy_(own_slice(context(), whole, split))
