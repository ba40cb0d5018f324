"""AdamW on flat shards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import kernels
from ..context import context
from ..device import processors
from ..errors import ConfigurationError
from ..shard.engine import engine
from ..shard.flat import FlatShard
from ..shard.fp32_values import drop_remainder
from ..shard.in_parts import part_at
from ..shard.place import Place
from ..shard.state_copies import StateTensor
from ..shard.unit import ShardUnit, unit_of_flat
from .adam_state import FlatState
from .adam_view import AdamView, OfParameter, StepShown, take_steps
from .delta import Delta
from .fit import number_problem, require_fit, shape_in_state, tensor_problem
from .loss_scale import Overflow, Unscale
from .old import HoldsLossScale
from .pieces import (
    Home,
    Piece,
    all_params,
    begin_step,
    finish_gradients,
    flats_of,
    gather_state,
    home_of,
    homes_of,
    in_batches,
    pieces_of,
    replicated_of,
)  # fmt: skip
from .replicated import Replicated, adopt
from .staging import Staging

_TORCH_EXTRAS = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
    "decoupled_weight_decay": True,
}  # fmt: skip
"""What torch.optim.AdamW keeps in a group besides; written so that state dicts interchange."""


_STATES = ("exp_avg", "exp_avg_sq", "master")


class _Holdings:
    """Which parameters of which home an optimizer's groups hold.

    Attributes:
        groups: by key of home and the parameter's index there, the number of its group; in the order of indices.
    """

    def __init__(self, param_groups: Sequence[dict[str, Any]]) -> None:
        self._params = all_params(param_groups)  # they live as long as their ids are compared
        self._ids, self._ends = self._now(param_groups)
        self.flats = flats_of(self._params)
        found: dict[int, dict[int, int]] = {}
        for number, group in enumerate(param_groups):
            for parameter in group["params"]:
                home, index = home_of(parameter)
                found.setdefault(home.key, {})[index] = number
        self.groups = {key: dict(sorted(of_home.items())) for key, of_home in found.items()}

    @staticmethod
    def _now(param_groups: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
        params = all_params(param_groups)
        homes = [id(getattr(p, "_flat", None)) for p in params]  # flat_of, without a call for each of them
        return [*map(id, params), *homes], [len(group["params"]) for group in param_groups]

    def fit(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether this is still so."""
        return (self._ids, self._ends) == self._now(param_groups)


class _Runs(NamedTuple):
    """What to step on in a home while ``chosen`` of its parameters are stepped on: pieces, each of one group."""

    chosen: list[int]
    pieces: list[tuple[Piece, int]]


_Due = dict[int, list[tuple[Piece, tuple[int, int]]]]
"""By key of home: what is to be updated, with the number of its group and of this step."""


class _Numbers(NamedTuple):
    """What runs of one update have in common: the numbers of group and step, and what gradients are multiplied by."""

    group: int
    step: int
    weight: float
    factor: int
    device: torch.device


class AdamOptimizer(HoldsLossScale, torch.optim.Optimizer):
    """Adam with decoupled weight decay (AdamW) in every precision, one pass over each flat shard.

    Args are torch.optim.AdamW's, but ``weight_decay`` is 0 by default.  Moments and masters are fp32.
    ``hold_steps``: for this many first steps the moments build up and the parameters stay.
    ``scale``: the loss scale that older scripts gave to the optimizer; others use OptimManager.

    Parameters that no distributed module holds (a plain model's, a temperature's) stay whole on every rank, with rank
    0's values to begin with; their gradients are averaged before each step.

    ``state_dict()`` is collective and has torch.optim.AdamW's format with whole tensors: either may load the other's.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """

    _bmtrain_optimizer = True
    skips_on_device = True
    _threads: int | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hold_steps: int = 0,
        *,
        scale: float = 1.0,
    ) -> None:
        for name, value, good in (
            ("lr", lr, lr >= 0), ("eps", eps, eps >= 0), ("weight_decay", weight_decay, weight_decay >= 0),
            ("betas", betas, all(0 <= b < 1 for b in betas)),
        ):  # fmt: skip
            if not good:
                raise ConfigurationError(f"AdamOptimizer got {name}={value!r}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **_TORCH_EXTRAS})
        self._hold_steps, self.scale = hold_steps, scale
        self._states: dict[int, FlatState] = {}
        self._steps_shown: list[StepShown] = []
        self._counted: dict[int, tuple[list[int], list[int]]] = {}  # by key of home: steps, and of which parameters
        self._holdings = _Holdings([])
        self._runs: dict[int, _Runs] = {}
        self._overflow: Overflow | None = None
        # Numbers of this step, to where states are.
        self._brought: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        adopt(replicated_of(all_params(self.param_groups)))

    def _state_device(self, flat: Home) -> torch.device:
        return flat.shard.device

    def _state_of(self, flat: Home) -> FlatState:
        state = self._states.get(flat.key)
        if state is None:
            if isinstance(flat, FlatShard):
                flat.unit.is_settled = True
            state = self._states[flat.key] = FlatState(flat, self._state_device(flat))
        return state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        scale: float | torch.Tensor | None = None,
        overflow: Overflow | None = None,
    ) -> float | None:
        """Update from the reduced gradients divided by ``scale``.  Collective.

        After an ``overflow`` nothing changes.  A scale on the device and an overflow are not waited for.
        """
        self._uncount()
        if self._steps_shown:
            take_steps(self._steps_shown)
        self._overflow, self._brought = overflow, {}
        unscale = Unscale(self.scale if scale is None else scale)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = all_params(self.param_groups)
        replicated = finish_gradients(params)
        if not self._holdings.fit(self.param_groups):
            self._holdings, self._runs = _Holdings(self.param_groups), {}
        units = sorted(dict.fromkeys(map(unit_of_flat, self._holdings.flats)), key=lambda unit: unit.index)
        due = self._count_steps([*(flat for unit in units for flat in unit.flats), *replicated])
        # What the next forward needs first was reduced last: half of the others hide the wait for that reduction, and
        # the rest of them its gather.
        first, others = units[:2], units[2:]
        half = len(others) // 2
        for together in self._in_turn(list(in_batches([*others[:half], *first, *others[half:]]))):
            self._update([flat for unit in together for flat in unit.flats], due, unscale)
            engine().updated(together)
        self._update(replicated, due, unscale)
        engine().optimizer_stepped(self._state_bytes)
        return loss

    def _in_turn(self, batches: Sequence[list[ShardUnit]]) -> Iterable[list[ShardUnit]]:
        """What is updated one after the other."""
        return batches

    def _gradient(self, home: Home) -> torch.Tensor:
        """The gradient of ``home``, where its state is."""
        return home.gradient.values()[0]

    def _beside(self, home: Home, out: torch.Tensor | None) -> torch.Tensor | None:
        """Where a step puts values for ``out``, to be copied to it; None if ``out`` itself is where states are."""
        return None

    def _there(self, number: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """``number``, which is of this step, on ``device``; brought there once."""
        if number is None:
            return None
        if (id(number), device) not in self._brought:
            self._brought[id(number), device] = (number, number.to(device))
        return self._brought[id(number), device][1]

    def _state_bytes(self) -> int:
        return sum(state.nbytes for state in self._states.values()) + sum(
            flat.remainder.nbytes for flat in self._holdings.flats if flat.remainder is not None
        )

    def _count_steps(self, homes: Sequence[Home]) -> _Due:
        """By key of home: what is to be updated, with the number of its group and of this step."""
        due: _Due = {}
        self._counted = {}
        for home, touched in zip(homes, begin_step(homes), strict=True):
            groups = self._holdings.groups.get(home.key, {})
            chosen = [index for index in groups if touched[index]]
            if not chosen:
                due[home.key] = []
                continue
            steps = self._state_of(home).steps
            for index in chosen:
                steps[index] += 1
            self._counted[home.key] = steps, chosen
            due[home.key] = self._due(home, chosen, groups, steps)
        return due

    def _due(
        self, home: Home, chosen: list[int], groups: dict[int, int], steps: list[int]
    ) -> list[tuple[Piece, tuple[int, int]]]:
        first = steps[chosen[0]]
        if isinstance(home, Replicated) or [steps[index] for index in chosen].count(first) != len(chosen):
            return pieces_of(home, {index: (groups[index], steps[index]) for index in chosen})
        runs = self._runs.get(home.key)  # nearly always as the last time
        if runs is None or runs.chosen != chosen:
            runs = self._runs[home.key] = _Runs(chosen, pieces_of(home, {index: groups[index] for index in chosen}))
        return [(piece, (group, first)) for piece, group in runs.pieces]

    def _uncount(self) -> None:
        """Take back the count of the last step if it turns out to have been skipped."""
        if self._overflow is not None and self._overflow.happened:
            for steps, chosen in self._counted.values():
                for index in chosen:
                    steps[index] -= 1
        self._overflow = None

    def _update(self, homes: Sequence[Home], due: _Due, unscale: Unscale) -> None:
        """Update what is due of each of ``homes``; what takes the same numbers goes together."""
        alike: dict[_Numbers, list[kernels.AdamWRun]] = {}
        factors: dict[int, torch.Tensor] = {}
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for home in homes:
            if home.key not in self._counted:
                continue
            state = self._state_of(home)
            values, out, remainder = state.operands(home)
            grad, factor = self._gradient(home), unscale.with_factor(home.gradient.factor)
            if factor is not None:
                factors[id(factor)] = factor
            beside = self._beside(home, out)
            for piece, (group, step) in due[home.key]:
                numbers = _Numbers(group, step, home.gradient.weight, id(factor), values.device)
                alike.setdefault(numbers, []).append(kernels.AdamWRun(
                    values, state.exp_avg, state.exp_avg_sq, grad, out if beside is None else beside, remainder,
                    piece.start, piece.end,
                ))  # fmt: skip
                if out is not None and beside is not None:
                    copies.append((out[piece.start : piece.end], beside[piece.start : piece.end]))
                if remainder is None and home.remainder is not None:  # of an optimizer on another device, to which
                    home.remainder[piece.start : piece.end].zero_()  # this step is a write like others
            state.stepped(home, self._counted[home.key][1])
        skip = None if self._overflow is None else self._overflow.flag
        for numbers, runs in alike.items():
            options, clip = self.param_groups[numbers.group], factors.get(numbers.factor)
            beta1, beta2 = options["betas"]
            kernels.adamw_(
                runs, lr=0.0 if numbers.step <= self._hold_steps else float(options["lr"]), beta1=beta1, beta2=beta2,
                eps=options["eps"], weight_decay=options["weight_decay"], step=numbers.step,
                grad_scale=unscale.on_host * numbers.weight, clip=self._there(clip, numbers.device),
                skip=self._there(skip, numbers.device), threads=self._threads,
            )  # fmt: skip
        if copies and skip is not None and bool(self._there(skip, torch.device("cpu"))):
            return  # nothing is beside
        for out, values in copies:
            out.copy_(values, non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        clear_grads(self)

    def _on_justify_scale(self, old_scale: float, new_scale: float) -> None:
        """Moments are kept unscaled, so a new loss scale changes nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> AdamOptimizer:
        made = type(self)(copy.deepcopy(self.param_groups, memo), hold_steps=self._hold_steps, scale=self.scale)
        memo[id(self)] = made
        made._load(self.state_dict(gather=False))
        return made

    # -- state ----------------------------------------------------------------------------------------------------

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Any, Any]:
        """By parameter: ``step``, ``exp_avg`` and ``exp_avg_sq``, of whole shapes; what is written there is used.

        Reductions of moments, as of other ShardedTensors, are of the whole and need all ranks.
        """
        self._uncount()
        return AdamView(all_params(self.param_groups), self._states, self._state_of, self._steps_shown)

    @state.setter
    def state(self, given: Mapping[Any, Any]) -> None:
        if hasattr(self, "_states"):  # else torch's constructor comes with an empty one
            held = self.state
            held.clear()
            held.update(given)

    def _numbered_groups(self) -> list[dict[str, Any]]:
        numbers = {id(p): i for i, p in enumerate(all_params(self.param_groups))}
        return [
            {**{k: v for k, v in g.items() if k != "params"}, "params": [numbers[id(p)] for p in g["params"]]}
            for g in self.param_groups
        ]

    def state_dict(self, gather: bool = True) -> dict[str, Any]:
        """The state in torch.optim.AdamW's format.

        Args:
            gather: whole tensors, on every rank (collective); False gives this rank's shards, for as many shards.
        """
        self._uncount()
        numbers = {id(p): i for i, p in enumerate(all_params(self.param_groups))}
        groups = self._numbered_groups()
        states: dict[int, dict[str, torch.Tensor]] = {}
        for flat in homes_of(all_params(self.param_groups)):
            kept = self._states.get(flat.key)
            if kept is None:
                continue
            named = {"exp_avg": kept.exp_avg, "exp_avg_sq": kept.exp_avg_sq}
            if flat.dtype != torch.float32:
                named["master"] = kept.master_of(flat)  # also where this rank's part is empty: gathering is collective
            if gather:
                whole = {name: gather_state(flat, tensor) for name, tensor in named.items()}
            else:
                whole = {n: [flat.local(t, i).clone() for i in range(len(flat.params))] for n, t in named.items()}
            for index, parameter in enumerate(flat.params):
                if id(parameter) in numbers and kept.steps[index]:
                    entry = {"step": torch.tensor(float(kept.steps[index]), device="cpu")}
                    entry |= {name: parts[index] for name, parts in whole.items()}
                    if gather:
                        shown = OfParameter(flat, index, kept, self._state_of, self._steps_shown)
                        entry = {name: StateTensor.of(value, shown.original(name)) for name, value in entry.items()}
                    states[numbers[id(parameter)]] = entry
        out: dict[str, Any] = {"state": dict(sorted(states.items())), "param_groups": groups}
        if not gather:
            out["shard_of"] = _shard_of()
        return out

    def parts(self) -> dict[str, Any]:
        """As ``state_dict()``; each rank has its own part, without a copy (``shard.in_parts``)."""
        self._uncount()
        params = all_params(self.param_groups)
        states: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(params):
            home, index = home_of(parameter)
            kept = self._states.get(home.key)
            if kept is None or not kept.steps[index]:
                continue
            entry: dict[str, Any] = {"step": torch.tensor(float(kept.steps[index]), device="cpu")}
            for name, values in (("exp_avg", kept.exp_avg), ("exp_avg_sq", kept.exp_avg_sq)):
                entry[name] = (
                    part_at(home.place_of(index), home.local(values, index))
                    if isinstance(home, FlatShard) else home.whole(values)
                )  # fmt: skip
            if home.dtype != torch.float32:
                entry["master"] = (
                    kept.part_of_master(home, index)
                    if isinstance(home, FlatShard) else home.whole(kept.master_of(home))
                )  # fmt: skip
            states[number] = entry
        return {"state": states, "param_groups": self._numbered_groups()}

    def part_at(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Place | bool:
        """As ``shard.in_parts`` says."""
        params = all_params(self.param_groups)
        if len(path) == 3 and path[0] == "state" and path[2] in _STATES and path[1] in range(len(params)):
            home, index = home_of(params[path[1]])
            if isinstance(home, FlatShard) and home.whole_shape(index) == shape:
                return home.place_of(index)
        return True

    def check_parts(self, state: dict[str, Any]) -> None:
        """As ``shard.in_parts`` says."""
        require_fit(self, state, _check_whole, own=True)

    def load_parts(self, state: dict[str, Any]) -> None:
        """As ``shard.in_parts`` says."""
        self.check_parts(state)
        self._load(state)

    def check_state(self, state_dict: object) -> None:
        """Raises CheckpointError on every rank if it cannot be loaded.  Collective."""
        given: Any = state_dict
        sharded, problems = isinstance(given, dict) and "shard_of" in given, []
        here = _shard_of()
        if sharded and tuple(given["shard_of"]) != here:
            rank, size = given["shard_of"]
            problems.append(f"it is shard {rank} of {size}; this rank keeps shard {here[0]} of {here[1]}")
        require_fit(self, given, _check_part if sharded else _check_whole, problems, own=sharded)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load whole states (from here or torch.optim.AdamW, any world size) or this rank's own shards.

        Raises CheckpointError on every rank, with nothing loaded, when the state does not fit or ranks have others.
        """
        self.check_state(state_dict)
        self._load(state_dict)

    @torch.no_grad()
    def _load(self, state_dict: dict[str, Any]) -> None:
        params = all_params(self.param_groups)
        sharded = "shard_of" in state_dict
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
        self._states.clear()
        self._overflow = None
        for parameter in params:
            flat, index = home_of(parameter)
            if isinstance(flat, FlatShard):
                drop_remainder(flat, index)
        for number, saved in state_dict["state"].items():
            flat, index = home_of(params[int(number)])
            state = self._state_of(flat)
            state.steps[index] = int(saved["step"])
            parts = {k: v if sharded else flat.local_part(v, index) for k, v in saved.items() if k in _STATES}
            flat.local(state.exp_avg, index).copy_(parts["exp_avg"])
            flat.local(state.exp_avg_sq, index).copy_(parts["exp_avg_sq"])
            if "master" in parts and flat.dtype != torch.float32:
                state.load_master(flat, index, parts["master"])


class AdamOffloadOptimizer(AdamOptimizer):
    """AdamOptimizer with masters and moments in host memory: 12 bytes a parameter less on the GPU, slower steps.

    All processors of the host compute, each rank's as many; meanwhile gradients of what is next come to the host, and
    parameters go back.  Numbers are AdamOptimizer's on the same GPU, to the bit.

    ``record_delta`` keeps of each step by how much it changed the parameters: see ``get_avg_delta``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hold_steps: int = 0,
        record_delta: bool = False,
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, hold_steps, scale=scale)
        self._delta = Delta() if record_delta else None
        ctx = context()
        self._staging = Staging(ctx.device) if ctx.device.is_apart else None
        if self._staging is not None:
            self._threads = max(1, processors() // ctx.topology.local_size)

    def _state_device(self, flat: Home) -> torch.device:
        return torch.device("cpu")

    def _in_turn(self, batches: Sequence[list[ShardUnit]]) -> Iterable[list[ShardUnit]]:
        return batches if self._staging is None else self._staging.each(batches, self._counted)

    def _gradient(self, home: Home) -> torch.Tensor:
        return super()._gradient(home) if self._staging is None else self._staging.gradient(home)

    def _beside(self, home: Home, out: torch.Tensor | None) -> torch.Tensor | None:
        return None if self._staging is None or out is None else self._staging.out(home)

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        scale: float | torch.Tensor | None = None,
        overflow: Overflow | None = None,
    ) -> float | None:
        if self._delta is None:
            return super().step(closure, scale, overflow)
        self._delta = Delta()
        loss = super().step(closure, scale, overflow)
        self._delta.of_all_ranks()
        return loss

    def _update(self, homes: Sequence[Home], due: _Due, unscale: Unscale) -> None:
        if self._delta is None:
            super()._update(homes, due, unscale)
            return
        pieces = [piece for home in homes for piece, _ in due[home.key]]
        before = [self._values_of(piece).clone() for piece in pieces]
        super()._update(homes, due, unscale)
        for piece, values in zip(pieces, before, strict=True):
            self._delta.add(piece, self._values_of(piece) - values)

    def _values_of(self, piece: Piece) -> torch.Tensor:
        return self._state_of(piece.flat).master_of(piece.flat)[piece.start : piece.end]

    def __deepcopy__(self, memo: dict[int, Any]) -> AdamOptimizer:
        made: Any = super().__deepcopy__(memo)
        made._delta = None if self._delta is None else Delta()
        return made  # type: ignore[no-any-return]

    def get_avg_delta(self) -> float:
        """The mean over all elements of what the last step added to the parameters; 0 before the first.

        Raises ConfigurationError without ``record_delta``.
        """
        return self._recorded().mean

    def get_var_delta(self) -> float:
        """The variance of the same."""
        return self._recorded().variance

    def _recorded(self) -> Delta:
        if self._delta is None:
            raise ConfigurationError(
                "What steps change is not recorded; make the optimizer with AdamOffloadOptimizer(record_delta=True)."
            )
        return self._delta

    def state_dict(self, gather: bool = True) -> dict[str, Any]:
        """As AdamOptimizer's; ``is_whole`` says whether it holds whole tensors, as ``gather`` asked."""
        return super().state_dict(gather) | {"is_whole": gather}


def clear_grads(optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients of every parameter of ``optimizer``."""
    own = {id(p) for p in all_params(optimizer.param_groups)}
    for flat in homes_of(all_params(optimizer.param_groups)):
        if own.issuperset(map(id, flat.params)):
            flat.clear_grad()
        else:
            for parameter in flat.params:
                if id(parameter) in own:
                    parameter.grad = None


def _shard_of() -> tuple[int, int]:
    """Which shard this rank keeps, of how many."""
    ctx = context()
    return ctx.model_group.rank, ctx.model_group.world_size


def _check_whole(parameter: Any, entry: Mapping[str, Any]) -> list[str]:
    dtype = torch.float32.to_complex() if parameter.is_complex() else torch.float32
    return _check_entry(entry, shape_in_state(parameter, entry), dtype)


def _check_part(parameter: Any, entry: Mapping[str, Any]) -> list[str]:
    home, index = home_of(parameter)
    return _check_entry(entry, tuple(home.local(home.shard, index).shape), torch.float32)


def _check_entry(entry: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    problems = [f"no {name}" for name in ("step", "exp_avg", "exp_avg_sq") if name not in entry]
    if "step" in entry:
        problems += number_problem("step", entry["step"])
    for name in _STATES:
        if name in entry:
            problems += tensor_problem(name, entry[name], shape, dtype)
    return problems
