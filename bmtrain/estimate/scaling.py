"""How long a step takes on many ranks, from figures measured on one host: arithmetic alone (docs/scaling.md).

What moves is what ZeRO-3 moves (Rajbhandari et al. 2020, arXiv:1910.02054): a unit's parameters are gathered in the
forward and in the backward, its gradients are reduced.  How long that takes is bytes over bus bandwidth, as nccl-tests
defines it (doc/PERFORMANCE.md), and a latency for each step of a ring.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError

_MOST_GB_S = 1e5
"""No memory and no wire is faster: the figure is one of bytes a second."""


@dataclass(frozen=True)
class Unit:
    """Bytes of parameters that become whole together, as they are gathered, and of their gradients, as reduced."""

    gathered: int
    reduced: int


@dataclass(frozen=True)
class Work:
    """What a step moves.

    Attributes:
        blocks: the units that run one after the other.
        rest: all others, whole from the first block to the last.
        updated: bytes that the optimizer reads and writes, on all ranks together that keep the parts of one copy.
    """

    blocks: tuple[Unit, ...]
    rest: Unit
    updated: int

    def __post_init__(self) -> None:
        """Raises ConfigurationError for sizes that nothing has."""
        sizes = [self.updated, *(size for unit in (*self.blocks, self.rest) for size in (unit.gathered, unit.reduced))]
        if min(sizes) < 0 or (self.blocks and not any(unit.gathered for unit in self.blocks)):
            raise ConfigurationError("Sizes are from 0, and blocks have parameters that are gathered.")


@dataclass(frozen=True)
class Measured:
    """Figures of one host, and of the network where there are several.  What is None has not been measured.

    Attributes:
        optimizer_gb_s: bytes that the optimizer reads and writes in a second, in 10^9.
        recomputed: whether blocks were recomputed in the backward.
        compute_ms: forwards and backwards of a step on one GPU, without the optimizer.
        step_ms: whole steps that were measured on GPUs of one host, by their number.  That of one GPU gives
            ``compute_ms``, the largest other ``contention``.
        host_gather_gb_s, host_reduce_gb_s: bus bandwidth of all-gather and reduce-scatter inside a host.
        network_gb_s: bus bandwidth of a collective of all GPUs of several hosts.
        host_latency_us, network_latency_us: of one step of a ring inside a host, and between hosts.
        contention: the part of a collective's time by which the computation beside it becomes longer.
        backwards: how many make an optimizer step.
    """

    optimizer_gb_s: float
    recomputed: bool
    compute_ms: float | None = None
    step_ms: Mapping[int, float] | None = None
    host_gather_gb_s: float | None = None
    host_reduce_gb_s: float | None = None
    network_gb_s: float | None = None
    host_latency_us: float | None = None
    network_latency_us: float | None = None
    contention: float | None = None
    backwards: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigurationError for figures that nothing can have."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "step_ms":
                self._check_steps(value)
            elif field.name == "recomputed":
                if not isinstance(value, bool):
                    raise ConfigurationError(f"recomputed is {value!r}; it is true or false.")
            elif value is not None or field.name in ("optimizer_gb_s", "backwards"):
                _check(field.name, value)
        if self.contention is not None and any(gpus > 1 for gpus in self.step_ms or ()):
            raise ConfigurationError("contention follows from step_ms of several GPUs: give one of the two.")
        if self.compute_ms is not None and 1 in (self.step_ms or ()):
            raise ConfigurationError("compute_ms follows from step_ms of one GPU: give one of the two.")

    def _check_steps(self, steps: Mapping[int, float] | None) -> None:
        for gpus, ms in (steps or {}).items():
            if type(gpus) is not int or gpus < 1:
                raise ConfigurationError(f"step_ms has milliseconds by number of GPUs; {gpus!r} is none.")
            _check(f"step_ms of {gpus}", ms)

    @classmethod
    def read(cls, path: str | Path) -> Measured:
        """Of a JSON file: an object with the names above.

        Raises ConfigurationError when there is none, or with names or figures that cannot be.
        """
        try:
            given = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} cannot be read as JSON: {error}.") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or (unknown := [name for name in given if name not in known]):
            what = f"names {', '.join(unknown)}" if isinstance(given, dict) else "is no object"
            raise ConfigurationError(f"{path} {what}; the figures are {', '.join(known)}.")
        missing = [name for name in ("optimizer_gb_s", "recomputed") if name not in given]
        if missing:
            raise ConfigurationError(
                f"{path} says nothing of {', '.join(missing)}: docs/scaling.md has how to measure."
            )
        steps = given.get("step_ms")
        if steps is not None:
            if not isinstance(steps, dict) or not all(number.isdecimal() for number in steps):
                raise ConfigurationError(f'{path}: step_ms has milliseconds by number of GPUs, as in {{"8": 449.0}}.')
            given["step_ms"] = {int(number): ms for number, ms in steps.items()}
        return cls(**given)

    def figure(self, name: str) -> float:
        """A figure.  Raises ConfigurationError where it has not been measured."""
        value: float | None = getattr(self, name)
        if value is None:
            raise ConfigurationError(f"{name} is missing among what was measured: docs/scaling.md has how to measure.")
        return value


def _check(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    least_is_fine = name == "contention" or name.endswith("latency_us")
    if not number or value < 0 or (value == 0 and not least_is_fine):
        raise ConfigurationError(f"{name} is {value!r}; it is a number {'from' if least_is_fine else 'above'} 0.")
    if name == "contention" and value > 1:
        raise ConfigurationError(f"contention is {value!r}; it is a part of a collective's time, from 0 to 1.")
    if name == "backwards" and type(value) is not int:
        raise ConfigurationError(f"backwards is {value!r}; it is a number of backwards in a step.")
    if name.endswith("gb_s") and value > _MOST_GB_S:
        raise ConfigurationError(f"{name} is {value:g}; it is in GB/s, 10^9 bytes in a second.")


@dataclass(frozen=True)
class Ranks:
    """Where parts of parameters are: groups of ``shard_size`` neighbours have one copy, in hosts of ``host_gpus``."""

    gpus: int
    shard_size: int
    host_gpus: int

    def __post_init__(self) -> None:
        gpus, shard, host = self.gpus, self.shard_size, self.host_gpus
        if min(gpus, shard, host) < 1:
            raise ConfigurationError("GPUs, shard_size and the GPUs of a host are 1 at least.")
        if gpus > host and gpus % host:
            raise ConfigurationError(
                f"{gpus} GPUs are not whole hosts of {host}: give a multiple, or other GPUs of a host."
            )
        if gpus % shard or (shard % host if shard > host else min(host, gpus) % shard):
            raise ConfigurationError(
                f"shard_size {shard} does not cut {gpus} GPUs, {host} on a host, into groups that are inside of a host "
                "or whole hosts."
            )

    @property
    def replicas(self) -> int:
        """How many ranks keep the same parts."""
        return self.gpus // self.shard_size


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of a step.

    Attributes:
        ms: all of it: compute, optimizer, and what is exposed of the communication.
        communication_ms: what the collectives would take with nothing beside them.
        exposed_ms: by how much they make the step longer.
    """

    ranks: Ranks
    ms: float
    compute_ms: float
    optimizer_ms: float
    communication_ms: float
    exposed_ms: float


def predict(work: Work, measured: Measured, ranks: Ranks) -> Prediction:
    """A step of ``work``, with ``compute_ms`` and, on several ranks, ``contention`` known (see ``completed``).

    Parameters are whole only while they are used; what of them stays whole from step to step makes it shorter.

    Raises ConfigurationError where a figure that it takes is missing.
    """
    wires = _Wires(measured, ranks)
    compute = measured.figure("compute_ms")
    optimizer = 1e3 * work.updated / ranks.shard_size / (measured.optimizer_gb_s * 1e9)
    contention = measured.figure("contention") if ranks.gpus > 1 else 0.0
    # A backward is twice a forward, and the forward again where it is recomputed.
    forward = compute / measured.backwards / (4 if measured.recomputed else 3)
    backward = compute / measured.backwards - forward
    gathers = [wires.gather(unit.gathered) for unit in work.blocks]
    reductions = [wires.reduce(unit.reduced) for unit in work.blocks]
    rest = wires.gather(work.rest.gathered) + wires.reduce(work.rest.reduced)
    # Beside a block's forward the next one is gathered; beside its backward the one before, and the one behind is
    # reduced.  Two buffers serve all blocks of a shape, so that the last two are whole still when the backward begins.
    ahead = [*gathers, 0.0][1:]
    before, behind = [0.0, *gathers[:-2], 0.0][: len(gathers)], [*reductions, 0.0][1:]
    around = [one + other for one, other in zip(before, behind, strict=True)]
    total = sum(unit.gathered for unit in work.blocks)
    shares = [unit.gathered / total for unit in work.blocks]
    ends = rest + sum(gathers[:1]) + sum(reductions[:1])
    exposed = ends
    for phase, moving in ((forward, ahead), (backward, around)):
        for share, beside in zip(shares, moving, strict=True):
            exposed += max(beside - phase * share, contention * beside)
    moves = measured.backwards * (ends + sum(ahead) + sum(around))
    exposed *= measured.backwards
    return Prediction(ranks, compute + optimizer + exposed, compute, optimizer, moves, exposed)


def completed(work: Mapping[int, Work], measured: Measured) -> Measured:
    """``measured`` with what follows from its ``step_ms``; ``work`` is that of so many GPUs, by their number.

    Raises ConfigurationError where the compute has not been measured, or figures contradict each other.
    """
    steps = dict(measured.step_ms or {})
    if 1 in steps:
        alone = steps[1] - 1e3 * work[1].updated / (measured.optimizer_gb_s * 1e9)
        if alone <= 0:
            raise ConfigurationError(
                f"The optimizer takes {steps[1] - alone:.1f} ms at optimizer_gb_s={measured.optimizer_gb_s:g}, and the "
                f"step on one GPU {steps[1]:g}: one of the two figures is wrong."
            )
        measured = replace(measured, compute_ms=alone, step_ms={n: ms for n, ms in steps.items() if n > 1})
    elif measured.compute_ms is None:
        raise ConfigurationError("compute_ms is missing, or step_ms of one GPU: docs/scaling.md has how to measure.")
    gpus = max(steps, default=1)
    if gpus == 1:
        return measured
    measured = replace(measured, step_ms=None)
    return replace(measured, contention=_fitted(work[gpus], measured, gpus, steps[gpus]))


def _fitted(work: Work, measured: Measured, gpus: int, ms: float) -> float:
    """The contention with which ``gpus`` of one host take ``ms``."""

    def at(contention: float) -> float:
        return predict(work, replace(measured, contention=contention), Ranks(gpus, gpus, gpus)).ms

    low, high = 0.0, 1.0
    if not at(low) <= ms <= at(high):
        raise ConfigurationError(
            f"The step on {gpus} GPUs took {ms:g} ms, but compute, optimizer and communication take {at(low):.1f} at "
            f"their best, and {at(high):.1f} one after the other. "
            + ("A figure is wrong." if ms < at(low) else "The host is the limit, which more of them do not mend.")
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) < ms else (low, middle)
    return low


@dataclass(frozen=True)
class _Wires:
    """Milliseconds of collectives."""

    measured: Measured
    ranks: Ranks

    def gather(self, size: int) -> float:
        """Of a whole tensor of ``size`` bytes, from its parts."""
        return self._inside(size, "host_gather_gb_s")

    def reduce(self, size: int) -> float:
        """Of the sum of such tensors into parts, and then of equal parts over the replicas."""
        ranks, many = self.ranks, self.ranks.replicas
        ms = self._inside(size, "host_reduce_gb_s")
        if many == 1 or not size:
            return ms
        part = 2 * (many - 1) / many * size / ranks.shard_size
        hosts = ranks.gpus // ranks.host_gpus
        if hosts <= 1:
            return ms + part / self._bytes_in_ms("host_reduce_gb_s") + 2 * self._latency(many, 0)
        # All ranks of a host that keep different parts reduce them at a time, over the same wires.
        part *= min(ranks.shard_size, ranks.host_gpus)
        return ms + part / self._bytes_in_ms("network_gb_s") + 2 * self._latency(many, hosts)

    def _inside(self, size: int, name: str) -> float:
        count, host = self.ranks.shard_size, self.ranks.host_gpus
        if count == 1 or not size:
            return 0.0
        hosts = count // host if count > host else 0
        speed = self._bytes_in_ms(name)
        speed = min(speed, self._bytes_in_ms("network_gb_s")) if hosts else speed
        return (count - 1) / count * size / speed + self._latency(count, hosts)

    def _latency(self, count: int, hosts: int) -> float:
        """Of the steps of a ring of ``count`` ranks, which leaves each of ``hosts`` once."""
        between = min(count - 1, hosts)
        us = (count - 1 - between) * self.measured.figure("host_latency_us") if count - 1 > between else 0.0
        return 1e-3 * (us + (between * self.measured.figure("network_latency_us") if between else 0.0))

    def _bytes_in_ms(self, name: str) -> float:
        return self.measured.figure(name) * 1e6


def usual(gpus: Sequence[int], host_gpus: int) -> list[Ranks]:
    """For each number of GPUs: all of them share one copy; and each host has one, where there are several."""
    return [
        Ranks(number, shard, host_gpus)
        for number in gpus
        for shard in sorted({number, *([host_gpus] if 1 < host_gpus < number else [])})
    ]
