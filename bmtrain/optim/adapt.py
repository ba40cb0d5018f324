"""Lets optimizers of torch and of other packages step on sharded parameters.

Around ``optimizer.step()`` every parameter shows what the optimizer is to step on, in fp32 for low precision, as an
ordinary tensor with its gradient (``step_on`` says which way is right for whom):

shards   element-wise optimizers: this rank's part, 1-D.  Nothing is moved.
tensors  those that treat each tensor by itself: whole tensors, each on one rank, its owner, which alone has its state.
whole    all others: whole tensors on every rank, which all do the same.

A state dict is the unsharded one: gathered on the way out and cut on the way in.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..context import context
from ..errors import ConfigurationError
from ..objects import allgather_objects
from ..shard.engine import engine
from ..shard.flat import FlatShard, flat_of, place_of
from ..shard.fp32_values import can_split, join, write_master
from ..shard.parameter import enter_whole, raw_data, set_raw_grad
from ..shard.sharded_tensor import ShardedTensor, part_of
from ..shard.unit import unit_of_flat
from .driven import knows_shards
from .pieces import (
    agree_on_touched,
    all_params,
    finish_gradients,
    flats_of,
    follow,
    gather_state,
    gather_whole,
    replicated_of,
)
from .replicated import adopt
from .step_on import StepOn, choose, is_unchanged


def adapt(optimizer: torch.optim.Optimizer, step_on: StepOn | None = None) -> None:
    """Make ``optimizer`` work on sharded parameters.

    Raises ConfigurationError for one that cannot, or when ``step_on`` does not fit it.
    """
    if knows_shards(optimizer):
        if step_on not in (None, "shards"):
            raise ConfigurationError(f"{type(optimizer).__name__} steps on shards; leave step_on out.")
        return
    if _is_adapted(optimizer):
        return
    params = all_params(optimizer.param_groups)
    if isinstance(optimizer, torch.optim.SparseAdam) and (flats_of(params) or context().world_size > 1):
        raise ConfigurationError("SparseAdam needs sparse gradients; here they become dense when reduced. Use Adam.")
    adopt(replicated_of(params))
    sharded = bool(flats_of(params)) and context().world_size > 1
    way = choose(optimizer, step_on) if sharded else "whole"
    if sharded and way == "whole" and step_on is None:
        _warn_of_whole(optimizer, params)
    view = {"shards": _ShardView, "tensors": _TensorView, "whole": _WholeView}[way]()
    view.tried = len(optimizer.param_groups)
    view.admits = step_on is not None or way == "whole" or is_unchanged(type(optimizer))
    optimizer.step = MethodType(_stepping(view, optimizer.step), optimizer)  # type: ignore[method-assign]
    optimizer.register_state_dict_post_hook(view.gather)
    optimizer.register_load_state_dict_pre_hook(view.cut)
    optimizer.register_load_state_dict_post_hook(view.restore)
    view.cut_present(optimizer)


def _is_adapted(optimizer: torch.optim.Optimizer) -> bool:
    hooks = optimizer._optimizer_state_dict_post_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), _View) for hook in hooks)


def _stepping(view: _View, step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` between ``view``'s two ends.  Not by hooks: a step that raises must let go, too."""

    @functools.wraps(step)
    def around(optimizer: torch.optim.Optimizer, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        view.admit(optimizer)
        try:
            view.show(optimizer)
            given = () if closure is None else (view.outside(optimizer, closure),)
            out = step(*given, *args, **kwargs)
            view.keep(optimizer)
        finally:
            view.show_sharded(optimizer)
        engine().optimizer_stepped()
        return out

    return around


def _warn_of_whole(optimizer: torch.optim.Optimizer, params: list[Any]) -> None:
    if context().rank == 0:
        numel = sum(p.numel() for p in params if flat_of(p) is not None)
        warnings.warn(
            f"{type(optimizer).__name__} may look at several tensors at once, so every rank makes all of its steps, "
            f"with all values, gradients and states: {numel / 2**28:.3g} GiB of each in fp32. If it treats each tensor "
            'by itself, say add_optimizer(..., step_on="tensors"), which shares the work out; if each element, '
            '"shards"; if neither, "whole" ends this warning.',
            stacklevel=4,
        )


def _refuse_unmanaged(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before any optimizer's step: on its own, torch's would step on gradients that are not reduced."""
    if knows_shards(optimizer):
        return
    flats = flats_of(all_params(optimizer.param_groups))
    if any(not flat.is_stepped_on for flat in flats):  # else it is part of an adapted one (SAM's base optimizer)
        raise ConfigurationError(
            f"{type(optimizer).__name__} holds sharded parameters but no bmt.optim.OptimManager drives it. Call "
            "optim_manager.add_optimizer(optimizer) after making it, then optim_manager.backward(loss) and "
            "optim_manager.step()."
        )


register_optimizer_step_pre_hook(_refuse_unmanaged)


class _View:
    """What the parameters of one optimizer show while it steps, and how that becomes shards again.

    Attributes:
        tried: how many groups the optimizer had when it was decided on what it steps.
        admits: whether that would be the same whatever groups it gets.
    """

    def __init__(self) -> None:
        self._masters: dict[int, tuple[int, torch.Tensor]] = {}
        self._shown: list[tuple[FlatShard, torch.Tensor, list[int]]] = []  # its fp32 values; parameters that are shown
        self._groups: list[list[Any]] = []  # what the optimizer's groups hold outside of steps
        self._loading: dict[Any, dict[str, Any]] = {}
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

    def outside(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, run on the model as it is outside of steps."""

        def again() -> Any:
            self.keep(optimizer)
            loss = closure()
            self.show(optimizer)
            return self._loss(loss)

        return again

    def _loss(self, loss: Any) -> Any:
        """What the optimizer sees of a closure's loss."""
        return loss

    @torch.no_grad()
    def show(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step: show what it is to step on.  Collective."""
        params = all_params(optimizer.param_groups)
        finish_gradients(params)
        flats = flats_of(params)
        touched = agree_on_touched(flats)
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
        version, known = self._masters.get(id(flat), (-1, None))
        return follow(known, flat, version, flat.shard.device)

    @torch.no_grad()
    def keep(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step: keep the new values, and show what is shown outside of steps.  Collective."""
        for flat, values, shown in self._shown:
            self._take(flat, values, shown)
        for flat, values, _ in self._shown:
            if values is flat.shard:
                flat.changed()
            else:
                write_master(flat, values)
                if not can_split(flat):
                    self._masters[id(flat)] = (flat.version, values)
        units = {id(flat.unit): unit_of_flat(flat) for flat, _, _ in self._shown}
        self.show_sharded(optimizer)
        for unit in units.values():
            engine().updated(unit)

    def _take(self, flat: FlatShard, values: torch.Tensor, shown: list[int]) -> None:
        """Bring what the parameters show now into ``values``."""

    def show_sharded(self, optimizer: torch.optim.Optimizer) -> None:
        """Show what is shown outside of steps."""
        for group, params in zip(optimizer.param_groups, self._groups, strict=False):
            group["params"] = params
        for flat, _, shown in self._shown:
            for index in shown:
                set_raw_grad(flat.params[index], None)
            flat.is_stepped_on = False
            flat.enter_sharded()
            flat.forget_writes()
        self._shown, self._groups = [], []

    # -- state ------------------------------------------------------------------------------------------------------

    def gather(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Whole states for every rank.  Collective."""
        return state_dict

    def part(self, parameter: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        """What this rank keeps of a parameter's whole state; None for nothing."""
        return state

    def cut(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of whole states, to be loaded."""
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

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo torch's rounding of loaded states to the parameters' dtype: they belong to fp32 masters."""
        params = all_params(optimizer.param_groups)
        for number, part in self._loading.items():
            parameter = params[number]
            device = parameter.device
            kept = {name: _moved(value, device) for name, value in part.items() if name != "step"}
            optimizer.state[parameter].update(kept)
        self._loading = {}

    def cut_present(self, optimizer: torch.optim.Optimizer) -> None:
        """Cut what the constructor (Adagrad's) has made whole."""
        for parameter in list(optimizer.state):
            if not isinstance(parameter, torch.Tensor):
                continue
            part = self.part(parameter, optimizer.state[parameter])
            if part is None:
                del optimizer.state[parameter]
            else:
                optimizer.state[parameter].update(part)


class _ShardView(_View):
    """This rank's part of every parameter."""

    def _show_flat(self, flat: FlatShard, values: torch.Tensor, chosen: list[int], used: list[bool]) -> list[int]:
        for index in chosen:
            parameter = flat.params[index]
            enter_whole(parameter, flat.local(values, index))
            if used[index]:
                set_raw_grad(parameter, flat.local(flat.gradient.settled(), index))
        return chosen

    def gather(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        params = all_params(optimizer.param_groups)
        numbers = {id(p): i for i, p in enumerate(params)}
        states = {
            number: {k: v.full_tensor().cpu() if isinstance(v, ShardedTensor) else v for k, v in state.items()}
            for number, state in state_dict["state"].items()
        }
        for flat in flats_of(params):
            owned = [(index, numbers[id(p)]) for index, p in enumerate(flat.params) if id(p) in numbers]
            names = {n for _, number in owned for n, v in states.get(number, {}).items() if _is_local(v)}
            for name in sorted(names):
                dtype = next(states[k][name].dtype for _, k in owned if k in states and name in states[k])
                packed = torch.zeros(flat.shard.numel(), dtype=dtype, device=flat.shard.device)
                for index, number in owned:
                    if name in states.get(number, {}):
                        flat.local(packed, index).copy_(states[number][name])
                whole = gather_state(flat, packed)
                for index, number in owned:
                    if name in states.get(number, {}):
                        states[number][name] = whole[index]
        return {**state_dict, "state": states}

    def part(self, parameter: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        if flat_of(parameter) is None:
            return state
        flat, index = place_of(parameter)
        flat.unit.is_settled = True
        place = flat.place_of(index)
        return state | {
            name: part_of(value, place, f"state {name}").to(flat.shard.device, flat.gradient.dtype, copy=True)
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and name not in _SCALARS and value.shape == parameter.shape
        }


class _WholeView(_View):
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

    def _take(self, flat: FlatShard, values: torch.Tensor, shown: list[int]) -> None:
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


class _TensorView(_View):
    """Whole parameters, each on its owner.  The others do not have it in their groups while they step."""

    def __init__(self) -> None:
        super().__init__()
        self._owners: dict[int, int] = {}
        self._loads = [0] * context().world_size

    def _owner(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every new parameter to the rank that has least, the largest first; the same on all ranks."""
        new = [p for p in all_params(optimizer.param_groups) if flat_of(p) is not None and id(p) not in self._owners]
        for parameter in sorted(new, key=lambda p: -int(p.numel())):
            rank = self._loads.index(min(self._loads))
            self._owners[id(parameter)] = rank
            self._loads[rank] += parameter.numel()

    def _owns(self, parameter: Any) -> bool:
        return self._owners.get(id(parameter), context().rank) == context().rank

    def show(self, optimizer: torch.optim.Optimizer) -> None:
        self._owner(optimizer)
        super().show(optimizer)
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

    def _take(self, flat: FlatShard, values: torch.Tensor, shown: list[int]) -> None:
        if not shown:
            return
        whole = torch.zeros(flat.layout.numel, dtype=values.dtype, device=values.device)
        for index in shown:
            if self._owns(flat.params[index]):
                slot = flat.layout.slots[index]
                whole[slot.start : slot.end].view(slot.shape).copy_(raw_data(flat.params[index]))
        mine = torch.empty_like(values)
        flat.unit.ctx.world.reduce_scatter(whole, mine)  # only owners have anything but zeros
        for index in shown:
            flat.local(values, index).copy_(flat.local(mine, index))

    def gather(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        params = all_params(optimizer.param_groups)
        own = {
            number: _moved(state, torch.device("cpu"))
            for number, state in state_dict["state"].items()
            if isinstance(number, int) and flat_of(params[number]) is not None
        }
        states = dict(state_dict["state"])
        for others in allgather_objects(own):
            states.update(others)
        return {**state_dict, "state": dict(sorted(states.items(), key=lambda entry: str(entry[0]).zfill(9)))}

    def part(self, parameter: Any, state: dict[str, Any]) -> dict[str, Any] | None:
        return state if self._owns(parameter) else None

    def cut(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._owner(optimizer)
        return super().cut(optimizer, state_dict)

    def cut_present(self, optimizer: torch.optim.Optimizer) -> None:
        self._owner(optimizer)
        super().cut_present(optimizer)


_SCALARS = ("step", "eta", "mu", "mu_product")
"""States of torch's optimizers that are one number for a parameter, whatever its shape."""


def _is_local(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 1


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of a state on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value
