"""Values that every rank must start with alike: compared by digests, and rank 0's taken where ranks differ."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from .context import Context, context
from .errors import CheckpointError, ConfigurationError
from .objects import allgather_objects
from .topology import Dimension

T = TypeVar("T")
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_AT_ONCE = 1 << 17  # words whose products stay in a CPU's cache
_FACTOR = 0x1E3779B97F4A7C15  # odd, so that no difference is multiplied away


def follow_rank_0(
    ctx: Context, what: str, values: Mapping[str, torch.Tensor], slices: Collection[str] = ()
) -> list[str]:
    """Overwrite ``values`` by rank 0's where ``differing`` names them; returns those names.  Collective.

    Of ``slices``, the first rank's that holds the same slices.
    """
    names = differing(ctx, what, values, slices=slices)
    with torch.no_grad():
        for name in names:
            sent = values[name].detach().to(ctx.device.torch_device).contiguous()
            (ctx.data_group if name in slices else ctx.world).broadcast(sent.view(-1).view(torch.uint8), 0)
            values[name].copy_(sent)
    return names


def differing(
    ctx: Context,
    what: str,
    values: Mapping[str, torch.Tensor],
    others: Sequence[str] = (),
    slices: Collection[str] = (),
) -> list[str]:
    """The names of those of ``values`` that differ between ranks in any bit.  Collective.

    Equal values cost one exchange of two numbers.  Those on the meta device are compared by what is known of them.
    ``slices`` names values that tensor-parallel ranks hold slices of: only ranks that hold the same ones compare them.

    Raises ConfigurationError on every rank, naming the first difference, unless names, shapes, dtypes and what trains
    are the same on all ranks, and ``others``, what else is known; ``what`` names the whole in it.
    """
    if ctx.world_size == 1:
        return []
    with torch.no_grad():
        facts = [_fact(name, value) for name, value in values.items()] + list(others)
        digests = _digests(list(values.values()))
        names = torch.tensor(zlib.crc32("\n".join(facts).encode()), device="cpu")
        rows = from_all(ctx, torch.stack((names, digest(digests))))
        if bool((rows == rows[0]).all()):
            return []
        if not bool((rows[:, 0] == rows[0, 0]).all()):
            raise ConfigurationError(_first_difference(what, allgather_objects(facts)))
        every = from_all(ctx, digests)
        differs = (every != every[0]).any(0).tolist()
        if slices:
            mesh = ctx.topology.mesh
            firsts = [replace(mesh, rank=rank).group("replicate", "shard")[0] for rank in range(ctx.world_size)]
            of_slices = (every != every[firsts]).any(0).tolist()
            differs = [s if name in slices else d for name, d, s in zip(values, differs, of_slices, strict=True)]
        return [name for name, differ in zip(values, differs, strict=True) if differ]


def differing_ranks(
    ctx: Context, values: Mapping[str, tuple[torch.Tensor, tuple[Dimension, ...]]]
) -> dict[str, list[int]] | None:
    """Which ranks differ from the first of their group, by the names of ``values``; None if not even names are alike.

    Each value comes with the dimensions of the mesh along which ranks keep the same.  Those on the meta device are not
    compared.  Collective: one exchange of a number for each value.
    """
    mesh = ctx.topology.mesh
    names = torch.tensor([zlib.crc32("\n".join(values).encode()), len(values)], device="cpu")
    heads = from_all(ctx, names)
    if not bool((heads == heads[0]).all()):
        return None
    every = from_all(ctx, _digests([value for value, _ in values.values()]))
    found: dict[str, list[int]] = {}
    for column, (name, (_, dimensions)) in enumerate(values.items()):
        for rank in range(ctx.world_size):
            if every[rank, column] != every[replace(mesh, rank=rank).group(*dimensions)[0], column]:
                found.setdefault(name, []).append(rank)
    return found


def on_all_ranks(ctx: Context, things: Sequence[T | None], most: int) -> list[T]:
    """Those of at most ``most`` ``things`` that no rank has lost.  Collective.

    All ranks have as many, in the same order; what nobody needs each loses in its own time.
    """
    here = torch.zeros(most, dtype=torch.uint8, device="cpu")
    for index, thing in enumerate(things[:most]):
        here[index] = thing is not None
    ctx.control.all_reduce(here, "min")
    return [thing for thing, there in zip(things, here.tolist(), strict=False) if thing is not None and there]


def require_same(
    what: str, kind: str, values: Mapping[str, torch.Tensor], others: Sequence[str], advice: str, noun: str = "values"
) -> None:
    """Collective.  Raises CheckpointError on every rank unless all were given the same to load.

    Args:
        what: the name of the whole, as in "state dict".
        kind: of the object that it is to be loaded into.
        values, others: as ``differing`` takes them.
        advice: what to do instead.
        noun: what the ranks were given that differs.
    """
    try:
        names = differing(context(), f"The {what} given to {kind}", values, others)
    except ConfigurationError as error:
        raise CheckpointError(f"{error} Nothing was loaded.") from None
    if names:
        raise CheckpointError(
            f"The ranks were given different {noun} to load into {kind} ({', '.join(names[:5])}"
            f"{' ...' if len(names) > 5 else ''}); nothing was loaded. {advice}"
        )


def misfit(given: object, shape: Sequence[int], dtype: torch.dtype, layout: torch.layout = torch.strided) -> str | None:
    """Why ``given`` cannot be loaded where a tensor of this shape, dtype and layout is; None if it can."""
    if not isinstance(given, torch.Tensor):
        return f"a {type(given).__name__} given, a tensor needed"
    if given.is_meta:
        return "given on the meta device, without values"
    if given.layout != layout or given.is_quantized:
        return f"a {'quantized' if given.is_quantized else str(given.layout).removeprefix('torch.')} tensor given"
    if given.shape != torch.Size(shape) and not (len(shape) == 0 and given.shape == (1,)):
        return f"shape {tuple(given.shape)} given, {tuple(shape)} needed"
    is_counter = not shape and _kind(dtype) == "integer" and given.is_floating_point()  # averaged as all the rest was
    if _kind(given.dtype) != _kind(dtype) and not is_counter:
        return f"{given.dtype} given, {dtype} needed".replace("torch.", "")
    return None


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else "integer"


def digest(value: torch.Tensor) -> torch.Tensor:
    """() int64 of every bit of ``value`` and its place, on its device.

    It changes whenever a single element does; NaNs count by their bits.
    """
    flat = value.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    size = flat.element_size()
    if flat.numel() * size % 8:
        words = flat.view(_WORDS[size])
    else:  # the fewer words, the faster
        words = (flat.clone() if flat.storage_offset() * size % 8 else flat).view(torch.int64)
    weights = torch.arange(1, 2 * min(words.numel(), _AT_ONCE) + 1, 2, device=value.device)
    if words.numel() <= _AT_ONCE:
        return (words * weights).sum()
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    for part in torch.split(words, _AT_ONCE):
        total = total * _FACTOR + (part * weights[: part.numel()]).sum()
    return total


def _digests(values: list[torch.Tensor]) -> torch.Tensor:
    """(n,) on the CPU; 0 for values that are still to be made."""
    none = torch.zeros((), dtype=torch.int64, device="cpu")
    made = [none if value.is_meta else digest(value) for value in values]
    device = next((one.device for one in made if one.device.type != "cpu"), none.device)
    return torch.stack([one.to(device) for one in made]).cpu() if made else none.new_empty(0)


def _fact(name: str, value: torch.Tensor) -> str:
    trains = ", trained" if value.requires_grad else ""
    made = ", on the meta device" if value.is_meta else ""
    return f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{trains}{made}"


def from_all(ctx: Context, numbers: torch.Tensor) -> torch.Tensor:
    """(ranks, n) every rank's ``numbers``, (n,) on the CPU."""
    rows = torch.empty(ctx.world_size * numbers.numel(), dtype=numbers.dtype, device="cpu")
    ctx.control.all_gather(numbers, rows)
    return rows.view(ctx.world_size, -1)


def _first_difference(what: str, facts: list[list[str]]) -> str:
    """Of the ranks' ``facts``, rank 0's first, of which at least two differ."""
    other = next(rank for rank, theirs in enumerate(facts) if theirs != facts[0])
    pairs = itertools.zip_longest(facts[0], facts[other], fillvalue="nothing")
    ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    ranks = [str(rank) for rank, mine in enumerate(facts) if mine != facts[0]]
    return (
        f"{what} has other parameters on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} than on rank 0: {ours} "
        f"on rank 0 is {theirs} on rank {other} ({len(facts[0])} and {len(facts[other])} parameters and buffers). "
        "Give every rank the same."
    )


_NEAR = 0.05
"""By how much of its norm sums of a tensor may differ that was computed alike, in low precision and in any order."""


def sums_of(values: torch.Tensor) -> torch.Tensor:
    """(4,) the norm and some sums of (n,) values: two that have all of these in common are the same."""
    middle, kind = values.numel() // 2, torch.promote_types(values.dtype, torch.float32)
    halves = values[:middle].sum(dtype=kind), values[middle:].sum(dtype=kind)
    rows = values[::2].sum(dtype=kind), values[1::2].sum(dtype=kind)
    norm = torch.linalg.vector_norm(values, dtype=kind)
    return torch.stack((norm, halves[0] + halves[1], halves[0] - halves[1], rows[0] - rows[1])).float()


def differ(sums: torch.Tensor) -> torch.Tensor:
    """(m,) whether those of (k, m, 4) ``sums`` are of different tensors that should be k times the same."""
    apart, norms = (sums.amax(0) - sums.amin(0)).amax(1), sums[:, :, 0].amax(0)
    return apart > _NEAR * norms
