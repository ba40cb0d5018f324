"""What the parameters of an optimizer show while it steps, and what its state is outside of steps.

Three views, for the three ways of ``adapt``: ShardView, TensorView and WholeView.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..context import context
from ..errors import ConfigurationError, UnsupportedError
from ..objects import allgather_objects
from ..shard.engine import engine
from ..shard.flat import FlatShard, flat_of, place_of
from ..shard.fp32_values import can_split, join, part_of_joined, remainder_of, write_master
from ..shard.in_parts import Owned, part_at
from ..shard.parameter import enter_whole, raw_data, set_raw_grad
from ..shard.place import Place
from ..shard.sharded_tensor import ShardedTensor, part_of, unsliced
from ..shard.state_copies import StateTensor, without_links
from ..shard.unit import unit_of_flat
from .fit import CheckEntry, number_problem, require_fit, shape_in_state, tensor_problem
from .pieces import (
    all_params,
    begin_step,
    finish_gradients,
    flats_of,
    follow,
    gather_state,
    gather_whole,
    in_batches,
    replicated_of,
)
from .replicated import adopt
from .shown_state import OwnersState, ShownState, as_part, is_local, own_place
from .state_copies import OfState, linked
from .step_on import is_unchanged


class View:
    """What the parameters of one optimizer show while it steps, and how that becomes shards again.

    Attributes:
        tried: how many groups the optimizer had when it was decided on what it steps.
        admits: whether that would be the same whatever groups it gets.
    """

    def __init__(self) -> None:
        self._masters: dict[int, tuple[int, torch.Tensor]] = {}
        self._shown: list[tuple[FlatShard, torch.Tensor, list[int]]] = []  # its fp32 values; parameters that are shown
        self._is_shown = False
        self._changes = 0  # how often states may have changed
        self._groups: list[list[Any]] = []  # what the optimizer's groups hold outside of steps
        self._loading: dict[Any, dict[str, Any]] = {}
        self._shown_state: ShownState | None = None
        self._apart = False  # whether states come and go in parts
        self.tried = 0
        self.admits = True

    # -- a step -----------------------------------------------------------------------------------------------------

    def admit(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in groups that were added since.  Collective if there are any."""
        if len(optimizer.param_groups) == self.tried:
            return
        if not self.admits:
            raise ConfigurationError(
                f"{type(optimizer).__name__} got parameter groups after add_optimizer, which has tried out the others "
                "only. Add them before, or say add_optimizer(..., step_on=...)."
            )
        adopt(replicated_of(all_params(optimizer.param_groups)))
        self.tried = len(optimizer.param_groups)

    def outside(self, optimizer: torch.optim.Optimizer, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, run on the model as it is outside of steps."""

        def again(*args: Any, **kwargs: Any) -> Any:
            if not self._is_shown:  # inside another such call
                return call(*args, **kwargs)
            self.leave_step(optimizer)
            out = call(*args, **kwargs)
            self.enter_step(optimizer)
            return out

        return again

    def closure_outside(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, run likewise."""
        again = self.outside(optimizer, closure)
        return lambda: self._loss(again())

    def _loss(self, loss: Any) -> Any:
        """What the optimizer sees of a closure's loss."""
        return loss

    @torch.no_grad()
    def enter_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step: show what it is to step on.  Collective."""
        self._is_shown = True
        self._changes += 1
        self.keep_state(optimizer)
        params = all_params(optimizer.param_groups)
        finish_gradients(params)
        flats = flats_of(params)
        touched = begin_step(flats)
        self._groups = [group["params"] for group in optimizer.param_groups]
        own = {id(p) for p in params}
        for flat, used in zip(flats, touched, strict=True):
            chosen = [index for index, p in enumerate(flat.params) if id(p) in own]
            values = self._values(flat)
            self._shown.append((flat, values, self._show_flat(flat, values, chosen, used)))
            flat.is_stepped_on = True

    def _show_flat(self, flat: FlatShard, values: torch.Tensor, chosen: list[int], used: list[bool]) -> list[int]:
        """Show those of ``chosen``, parameters of ``flat``, that are to be stepped on; returns which.

        ``used`` says of all parameters whether they have a gradient.
        """
        raise NotImplementedError

    def _values(self, flat: FlatShard) -> torch.Tensor:
        """(S,) in the dtype of sums: the shard itself, or a copy."""
        if flat.dtype == flat.gradient.dtype:
            return flat.shard
        flat.keep_writes()
        if can_split(flat):
            return join(flat)
        version, known = self._masters.get(flat.key, (-1, None))
        return follow(known, flat, version, flat.shard.device)

    @torch.no_grad()
    def leave_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step: keep the new values, and show what is shown outside of steps.  Collective."""
        for flat, values, shown in self._shown:
            self._bring_back(flat, values, shown)
        for flat, values, shown in self._shown:
            flat.step_on(shown)
            if values is flat.shard:
                flat.changed(shown)
            else:
                write_master(flat, values, changed=shown)
                if not can_split(flat):
                    self._masters[flat.key] = (flat.version, values)
        units = {id(flat.unit): unit_of_flat(flat) for flat, _, _ in self._shown}
        self.enter_sharded(optimizer)
        for together in in_batches(list(units.values())):
            engine().updated(together)

    def _bring_back(self, flat: FlatShard, values: torch.Tensor, shown: list[int]) -> None:
        """Bring what the parameters show now into ``values``."""

    def enter_sharded(self, optimizer: torch.optim.Optimizer) -> None:
        """Show what is shown outside of steps."""
        for group, params in zip(optimizer.param_groups, self._groups, strict=False):
            group["params"] = params
        for flat, _, shown in self._shown:
            for index in shown:
                set_raw_grad(flat.params[index], None)
            flat.is_stepped_on = False
            flat.enter_sharded()
            flat.forget_writes()
        self._shown, self._groups, self._is_shown = [], [], False
        self.show_state(optimizer)

    # -- state ------------------------------------------------------------------------------------------------------

    _shows: type[ShownState] | None = None  # what the state is outside of steps; None where every rank has all of it

    def keep_state(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The state is what the optimizer keeps, until ``show_state``."""
        state: Any = optimizer.state
        if not isinstance(state, ShownState):
            if self._shows is not None:  # user code has put another in its place
                self._cut_given(optimizer)
            return
        if state is not self._shown_state and (type(state) is OwnersState or self._shows is not ShownState):
            raise UnsupportedError(
                f"{type(optimizer).__name__} got the state of another optimizer, of which each rank has something "
                "else. Give it the values: optimizer.load_state_dict(other.state_dict())."
            )
        optimizer.state = state.kept  # type: ignore[assignment]

    def show_state(self, optimizer: torch.optim.Optimizer) -> None:
        """The state is what user code is to see."""
        if self._shows is not None and not isinstance(optimizer.state, ShownState):
            self._shown_state = self._shows(optimizer.state, self.part, partial(self._states_of_all, optimizer))
            optimizer.state = self._shown_state  # type: ignore[assignment]

    def state_bytes(self, optimizer: torch.optim.Optimizer) -> int:
        """What the state takes on this rank."""
        state: Any = optimizer.state
        leaves = tree_leaves(list((state.kept if isinstance(state, ShownState) else state).values()))
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))

    def _states_of_all(self, optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
        """By parameter, the states that each are on one rank.  Collective."""
        raise NotImplementedError

    def gather_kept(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """``gather``, after torch has made a state dict of what the optimizer keeps."""
        self.show_state(optimizer)
        return self.gather(optimizer, state_dict)

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Inside the ``with``, states come and go in parts."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    def masters(self, optimizer: torch.optim.Optimizer) -> dict[int, torch.Tensor]:
        """The fp32 values of parameters in low precision, by number."""
        found: dict[int, torch.Tensor] = {}
        known: dict[int, torch.Tensor] = {}
        for number, parameter in enumerate(all_params(optimizer.param_groups)):
            flat = flat_of(parameter)
            if flat is None or flat.dtype == flat.gradient.dtype:
                continue
            _, index = place_of(parameter)
            if can_split(flat):
                found[number] = part_of_joined(flat, index)
            else:
                if flat.key not in known:
                    known[flat.key] = self._values(flat)
                found[number] = part_at(flat.place_of(index), flat.local(known[flat.key], index))
        return found

    @torch.no_grad()
    def load_masters(self, optimizer: torch.optim.Optimizer, masters: dict[int, torch.Tensor]) -> None:
        """Go on from them; what parameters show is their rounding."""
        params = all_params(optimizer.param_groups)
        kept: dict[int, tuple[FlatShard, torch.Tensor]] = {}
        for number, values in masters.items():
            flat, index = place_of(params[number])
            if flat.dtype == flat.gradient.dtype:
                continue
            part = flat.local_part(values, index).to(flat.shard.device)
            if can_split(flat):
                remainder_of(flat)
            else:
                flat.local(kept.setdefault(flat.key, (flat, self._values(flat)))[1], index).copy_(part)
            write_master(flat, part, index)
        for flat, values in kept.values():
            self._masters[flat.key] = (flat.version, values)

    def part_at(
        self, optimizer: torch.optim.Optimizer, parameter: Any, name: tuple[Any, ...], shape: tuple[int, ...]
    ) -> Place | bool:
        """What this rank needs of the tensor ``name`` of a parameter's state."""
        return True

    def gather(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Whole states for every rank.  Collective."""
        return state_dict

    def part(self, parameter: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        """What this rank keeps of a parameter's whole state; None for nothing."""
        return state

    def cut(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of whole states, to be loaded.  Collective.

        Raises CheckpointError on every rank when they do not fit.
        """
        require_fit(optimizer, state_dict, self.check(optimizer), own=self._apart)
        state_dict = without_links(state_dict)
        self._changes += 1
        params = all_params(optimizer.param_groups)
        self._loading, states = {}, {}
        for number, state in state_dict["state"].items():
            known = isinstance(number, int) and number < len(params)
            part = self.part(params[number], state) if known else state
            if part is not None:
                states[number] = part
                if known:
                    self._loading[number] = part
        return {**state_dict, "state": states}

    def check(self, optimizer: torch.optim.Optimizer) -> CheckEntry:
        """What tells the problems of one parameter's whole state: torch's optimizers are known, of others little is."""
        known = is_unchanged(type(optimizer))

        def check(parameter: Any, entry: Mapping[str, Any]) -> list[str]:
            shape = shape_in_state(parameter, entry)
            dtype = torch.float32.to_complex() if parameter.is_complex() else torch.float32
            problems = []
            for name, value in entry.items():
                if not isinstance(value, torch.Tensor):
                    problems += [f"{name}: a str given"] if isinstance(value, str) else []
                elif (known and name in _SCALARS) or value.numel() == 1:
                    problems += number_problem(name, value)
                elif known or (value.dim() == len(shape) and value.numel() == prod(shape)) or value.is_meta:
                    problems += tensor_problem(name, value, shape, dtype if known else value.dtype)
            return problems

        return check

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo torch's rounding of loaded states to the parameters' dtype: they belong to fp32 masters."""
        params = all_params(optimizer.param_groups)
        for number, part in self._loading.items():
            parameter = params[number]
            device = parameter.device
            # Counted on the CPU, a step stays there; on a GPU it may come from another rank's.
            kept = {name: _moved(value, device) for name, value in part.items() if name != "step" or _is_apart(value)}
            optimizer.state[parameter].update(kept)
        self._loading = {}
        self.show_state(optimizer)

    def cut_present(self, optimizer: torch.optim.Optimizer) -> None:
        """Cut what the constructor (Adagrad's) has made whole, or user code has put there."""
        if not isinstance(optimizer.state, ShownState):
            for parameter, entry in optimizer.state.items():
                if isinstance(entry, dict):
                    entry.update(_as_stepped_on(flat_of(parameter), entry))
        self.keep_state(optimizer)
        self.show_state(optimizer)

    def _cut_given(self, optimizer: torch.optim.Optimizer) -> None:
        """Cut a state that is no shown one."""
        for parameter, entry in list(optimizer.state.items()):
            if not isinstance(parameter, torch.Tensor) or not isinstance(entry, Mapping):
                continue
            part = self.part(parameter, dict(entry))
            if part is None:
                del optimizer.state[parameter]
            else:
                optimizer.state[parameter].update(part)


class ShardView(View):
    """This rank's part of every parameter."""

    _shows = ShownState

    def _show_flat(self, flat: FlatShard, values: torch.Tensor, chosen: list[int], used: list[bool]) -> list[int]:
        for index in chosen:
            parameter = flat.params[index]
            enter_whole(parameter, flat.local(values, index))
            if used[index]:
                set_raw_grad(parameter, flat.local(flat.gradient.settled(), index))
        return chosen

    def gather(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        params = all_params(optimizer.param_groups)
        if self._apart:
            states = {
                number: {k: as_part(params[number], v) for k, v in state.items()}
                for number, state in state_dict["state"].items()
            }
            return {**state_dict, "state": states}
        numbers = {id(p): i for i, p in enumerate(params)}
        states = {
            number: {k: _on_cpu(params[number] if number in range(len(params)) else None, state, k) for k in state}
            for number, state in state_dict["state"].items()
        }
        for flat in flats_of(params):
            owned = [(index, numbers[id(p)]) for index, p in enumerate(flat.params) if id(p) in numbers]
            names = {n for _, number in owned for n, v in states.get(number, {}).items() if is_local(v)}
            for name in sorted(names):
                dtype = next(states[k][name].dtype for _, k in owned if k in states and name in states[k])
                packed = torch.zeros(flat.shard.numel(), dtype=dtype, device=flat.shard.device)
                for index, number in owned:
                    if name in states.get(number, {}):
                        flat.local(packed, index).copy_(states[number][name])
                whole = gather_state(flat, packed)
                for index, number in owned:
                    if name in states.get(number, {}):
                        original = _original(flat.params[index], state_dict["state"][number], name)
                        states[number][name] = StateTensor.of(whole[index], original)
        return {**state_dict, "state": states}

    def part(self, parameter: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        if flat_of(parameter) is None:
            return state
        flat, index = place_of(parameter)
        flat.unit.is_settled = True
        place = flat.place_of(index)
        return state | {
            name: part_of(flat.own_slice(index, value), place, f"state {name}").to(
                flat.shard.device, flat.gradient.dtype, copy=True
            )
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
            and not _is_scalar(name, value.shape)
            and tuple(value.shape) in (tuple(parameter.shape), place.whole_shape)
        }

    def part_at(
        self, optimizer: torch.optim.Optimizer, parameter: Any, name: tuple[Any, ...], shape: tuple[int, ...]
    ) -> Place | bool:
        scalar = len(name) != 1 or _is_scalar(name[0], shape)
        if scalar or flat_of(parameter) is None or shape != own_place(parameter).whole_shape:
            return True
        return own_place(parameter)


class WholeView(View):
    """Whole parameters, on every rank."""

    def _show_flat(self, flat: FlatShard, values: torch.Tensor, chosen: list[int], used: list[bool]) -> list[int]:
        if not chosen:
            return []
        whole = gather_whole(flat, values)
        grads = gather_whole(flat, flat.gradient.settled()) if flat.gradient.present else []
        for index in chosen:
            enter_whole(flat.params[index], whole[index])
            if used[index]:
                set_raw_grad(flat.params[index], grads[index])
        return chosen

    def _bring_back(self, flat: FlatShard, values: torch.Tensor, shown: list[int]) -> None:
        if flat.unit.ctx.world_size > 1:
            for index in shown:
                flat.local(values, index).copy_(flat.local_part(raw_data(flat.params[index]), index))

    def _loss(self, loss: Any) -> Any:
        ctx = context()
        if ctx.world_size == 1 or not isinstance(loss, (float, torch.Tensor)):
            return loss
        mean = torch.as_tensor(loss, dtype=torch.float64, device="cpu").detach().clone()
        ctx.control.all_reduce(mean, "avg")
        return mean.to(loss) if isinstance(loss, torch.Tensor) else float(mean)


class TensorView(View):
    """Whole parameters, each on its owner.  The others do not have it in their groups while they step."""

    _shows = OwnersState

    def __init__(self) -> None:
        super().__init__()
        self._owners: dict[int, tuple[Any, int]] = {}  # with the parameter, so that no other has its id
        self._loads = [0] * context().shard_group.world_size

    def _owner(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every new parameter to the rank that has least, the largest first; the same on all ranks."""
        new = [p for p in all_params(optimizer.param_groups) if flat_of(p) is not None and id(p) not in self._owners]
        for parameter in sorted(new, key=lambda p: -int(p.numel())):
            rank = self._loads.index(min(self._loads))
            self._owners[id(parameter)] = parameter, rank
            self._loads[rank] += parameter.numel()

    def _owns(self, parameter: Any) -> bool:
        here = context().shard_rank
        return self._owners.get(id(parameter), (None, here))[1] == here

    def enter_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._owner(optimizer)
        super().enter_step(optimizer)
        shown = {id(flat.params[index]) for flat, _, chosen in self._shown for index in chosen}
        for group in optimizer.param_groups:
            group["params"] = [
                p for p in group["params"] if flat_of(p) is None or (id(p) in shown and self._owns(p))
            ]  # fmt: skip

    def _show_flat(self, flat: FlatShard, values: torch.Tensor, chosen: list[int], used: list[bool]) -> list[int]:
        chosen = [index for index in chosen if used[index]]
        if chosen:
            for take, shards in ((enter_whole, values), (set_raw_grad, flat.gradient.settled())):
                whole = gather_whole(flat, shards)
                for index in chosen:
                    if self._owns(flat.params[index]):
                        take(flat.params[index], whole[index].clone())
        return chosen

    def _bring_back(self, flat: FlatShard, values: torch.Tensor, shown: list[int]) -> None:
        if not shown:
            return
        whole = torch.zeros(flat.layout.numel, dtype=values.dtype, device=values.device)
        for index in shown:
            if self._owns(flat.params[index]):
                slot = flat.layout.slots[index]
                whole[slot.start : slot.end].view(slot.shape).copy_(raw_data(flat.params[index]))
        mine = torch.empty_like(values)
        flat.own_sum(whole, mine)  # only owners have anything but zeros
        for index in shown:
            flat.local(values, index).copy_(flat.local(mine, index))

    def gather(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        params = all_params(optimizer.param_groups)
        if self._apart:
            return self._owned(optimizer, state_dict)
        own = {
            number: _moved(state, torch.device("cpu"))
            for number, state in state_dict["state"].items()
            if isinstance(number, int) and flat_of(params[number]) is not None
        }
        states = dict(state_dict["state"])
        for others in allgather_objects(own):
            states.update(linked(others, lambda: OfState(lambda: self._changes)))
        return {**state_dict, "state": _in_order(states)}

    def _states_of_all(self, optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
        engine().meet(f"the copy of {type(optimizer).__name__}'s state")
        params, kept = all_params(optimizer.param_groups), optimizer.state
        kept = kept.kept if isinstance(kept, ShownState) else kept
        states = {p: kept[p] for p in params if p in kept and flat_of(p) is None}
        own = {n: _moved(kept[p], torch.device("cpu")) for n, p in enumerate(params) if p in kept and p not in states}
        for theirs in allgather_objects(own):
            states.update({params[n]: _moved(state, params[n].device) for n, state in theirs.items()})
        return states

    def _owned(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The states of all owners, of which each rank has its own tensors only."""
        params, states = all_params(optimizer.param_groups), dict(state_dict["state"])
        first = context().topology.mesh.group("replicate")[0]  # of the ranks that own the same, which writes it

        def known(value: Any) -> Any:
            return Owned(first, tuple(value.shape), value.dtype, value) if isinstance(value, torch.Tensor) else value

        def told(value: Any) -> Any:
            return _OWNED, value.owner, value.shape, value.dtype

        def heard(value: Any) -> Any:
            told_of = isinstance(value, tuple) and value[:1] == (_OWNED,)
            return Owned(value[1], value[2], value[3], None) if told_of else value

        own = {
            number: tree_map(known, state)
            for number, state in states.items()
            if isinstance(number, int) and flat_of(params[number]) is not None
        }
        told_of = tree_map(lambda v: told(v) if isinstance(v, Owned) else v, own)
        for theirs in allgather_objects(told_of):
            for number, state in theirs.items():
                states[number] = own.get(number) or tree_map(heard, state, is_leaf=lambda v: isinstance(v, tuple))
        return {**state_dict, "state": _in_order(states)}

    def part_at(
        self, optimizer: torch.optim.Optimizer, parameter: Any, name: tuple[Any, ...], shape: tuple[int, ...]
    ) -> Place | bool:
        self._owner(optimizer)
        return self._owns(parameter)

    def part(self, parameter: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        whole = {name: unsliced(value) if isinstance(value, ShardedTensor) else value for name, value in state.items()}
        return whole if self._owns(parameter) else None

    def cut(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._owner(optimizer)
        return super().cut(optimizer, state_dict)

    def cut_present(self, optimizer: torch.optim.Optimizer) -> None:
        self._owner(optimizer)
        super().cut_present(optimizer)


def _as_stepped_on(flat: FlatShard | None, entry: Mapping[str, Any]) -> dict[str, Any]:
    """States that torch was given to load: of their own, and in the dtype of steps, where torch has rounded them."""
    own = without_links(dict(entry))
    return {
        name: value.to(flat.gradient.dtype)
        if flat is not None
        and isinstance(value, torch.Tensor)
        and not _is_scalar(name, value.shape)
        and value.dtype == flat.dtype
        else value
        for name, value in own.items()
    }


def _original(parameter: Any, kept: Mapping[str, Any], name: str) -> OfState:
    """What a copy of ``parameter``'s state ``name`` is taken of."""
    return OfState(
        lambda: (id(kept.get(name)), getattr(kept.get(name), "_version", 0)), lambda: as_part(parameter, kept[name])
    )


def _on_cpu(parameter: Any, kept: Mapping[str, Any], name: str) -> Any:
    """What a whole state has of ``kept[name]`` where that is no local part, which is gathered with others.

    Where numbers of a sharded parameter are counted on a device, a file would name this rank's.
    """
    value = kept[name]
    if isinstance(value, ShardedTensor):
        return unsliced(value).cpu()
    if flat_of(parameter) is None or is_local(value) or not _is_apart(value):
        return value
    return StateTensor.of(value.detach().to("cpu", copy=True), _original(parameter, kept, name))


def _is_apart(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _in_order(states: Mapping[Any, Any]) -> dict[Any, Any]:
    """By parameters' numbers, as an optimizer of whole tensors would have them."""
    return dict(sorted(states.items(), key=lambda entry: str(entry[0]).zfill(9)))


_OWNED = "owned by"
_SCALARS = ("step", "eta", "mu", "mu_product")
"""States of torch's optimizers that are one number for a parameter, whatever its shape."""


def _is_scalar(name: str, shape: Sequence[int]) -> bool:
    """Whether a state is such a number; an optimizer of the script's own may call a momentum ``mu``."""
    return name in _SCALARS and not shape


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of a state on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value
