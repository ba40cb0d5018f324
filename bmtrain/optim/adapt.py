"""Lets torch's element-wise optimizers (SGD, Adam, RMSprop, ...) step on shards.

Around ``optimizer.step()`` every parameter shows this rank's part, in fp32 for low precision, as an ordinary 1-D tensor
with its gradient.  Its state dict is gathered on the way out and cut on the way in, so it is the unsharded one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import ConfigurationError
from ..shard.engine import engine
from ..shard.flat import FlatShard, flat_of, place_of
from ..shard.fp32_values import can_split, join, write_master
from ..shard.parameter import enter_whole, raw_grad, set_raw_grad
from ..shard.sharded_tensor import ShardedTensor, part_of
from .driven import knows_shards
from .pieces import agree_on_touched, all_params, flats_of, follow, gather_flat

_NEED_WHOLE = ("LBFGS", "Muon", "Adafactor", "SparseAdam", "Shampoo", "SOAP", "LAMB", "Lamb", "LARS", "Lars")


def adapt(optimizer: torch.optim.Optimizer) -> None:
    """Make ``optimizer`` work on shards.  Raises ConfigurationError for one that needs whole matrices or norms."""
    if knows_shards(optimizer) or _is_adapted(optimizer):
        return
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _NEED_WHOLE:
            raise ConfigurationError(
                f"{cls.__name__} needs whole matrices, which no rank holds. Use bmt.optim.AdamOptimizer or an "
                "element-wise torch optimizer (SGD, Adam, AdamW, RMSprop, Adagrad)."
            )
    flats_of(all_params(optimizer.param_groups))
    view = _ShardView(optimizer)
    optimizer.register_step_pre_hook(view.enter)
    optimizer.register_step_post_hook(view.leave)
    optimizer.register_state_dict_post_hook(view.gather)
    optimizer.register_load_state_dict_pre_hook(view.cut)
    optimizer.register_load_state_dict_post_hook(view.restore)
    view.cut_present(optimizer)


def _is_adapted(optimizer: torch.optim.Optimizer) -> bool:
    hooks = optimizer._optimizer_step_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), _ShardView) for hook in hooks)


def _refuse_unmanaged(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before any optimizer's step: on its own, torch's would step on gradients that are not reduced."""
    if knows_shards(optimizer) or _is_adapted(optimizer):
        return
    if any(flat_of(p) is not None for p in all_params(optimizer.param_groups)):
        raise ConfigurationError(
            f"{type(optimizer).__name__} holds sharded parameters but no bmt.optim.OptimManager drives it. Call "
            "optim_manager.add_optimizer(optimizer) after making it, then optim_manager.backward(loss) and "
            "optim_manager.step()."
        )


register_optimizer_step_pre_hook(_refuse_unmanaged)


class _ShardView:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._masters: dict[int, tuple[int, torch.Tensor]] = {}
        self._shown: dict[int, torch.Tensor] = {}
        self._loading: dict[Any, dict[str, torch.Tensor]] = {}

    def _values(self, flat: FlatShard) -> torch.Tensor:
        if flat.dtype == flat.gradient.dtype:
            return flat.shard
        flat.keep_writes()
        if can_split(flat):
            return join(flat)
        version, known = self._masters.get(id(flat), (-1, None))
        return follow(known, flat, version, flat.shard.device)

    def enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Show shards."""
        engine().finish_backward()
        params = all_params(optimizer.param_groups)
        flats = flats_of(params)
        touched = {id(f): t for f, t in zip(flats, agree_on_touched(flats), strict=True)}
        self._shown = {id(flat): self._values(flat) for flat in flats}
        for parameter in params:
            flat, index = place_of(parameter)
            enter_whole(parameter, flat.local(self._shown[id(flat)], index))
            if touched[id(flat)][index] and parameter.requires_grad:
                set_raw_grad(parameter, flat.local(flat.gradient.settled(), index))

    def leave(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Show what was shown before."""
        params = all_params(optimizer.param_groups)
        for parameter in params:
            if raw_grad(parameter) is not None:
                set_raw_grad(parameter, None)
        for flat in flats_of(params):
            master = self._shown.pop(id(flat))
            if master is flat.shard:
                flat.changed()
            else:
                write_master(flat, master)
                if not can_split(flat):
                    self._masters[id(flat)] = (flat.version, master)
            flat.enter_sharded()
            flat.forget_writes()
        engine().optimizer_stepped()

    def gather(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Whole states for every rank.  Collective."""
        params = all_params(optimizer.param_groups)
        numbers = {id(p): i for i, p in enumerate(params)}
        states = {
            number: {k: v.full_tensor().cpu() if isinstance(v, ShardedTensor) else v for k, v in state.items()}
            for number, state in state_dict["state"].items()
        }
        for flat in flats_of(params):
            owned = [(index, numbers[id(p)]) for index, p in enumerate(flat.params) if id(p) in numbers]
            names = {n for _, number in owned for n, v in states.get(number, {}).items() if _is_local(flat, v)}
            for name in sorted(names):
                dtype = next(states[k][name].dtype for _, k in owned if k in states and name in states[k])
                packed = torch.zeros(flat.shard.numel(), dtype=dtype, device=flat.shard.device)
                for index, number in owned:
                    if name in states.get(number, {}):
                        flat.local(packed, index).copy_(states[number][name])
                whole = gather_flat(flat, packed)
                for index, number in owned:
                    if name in states.get(number, {}):
                        states[number][name] = whole[index]
        return {**state_dict, "state": states}

    def cut(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of whole states."""
        params = all_params(optimizer.param_groups)
        self._loading = {n: _cut(params[int(n)], state) for n, state in state_dict["state"].items()}
        states = {n: {**state, **self._loading[n]} for n, state in state_dict["state"].items()}
        return {**state_dict, "state": states}

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo torch's rounding of loaded states to the parameters' dtype: they belong to fp32 masters."""
        params = all_params(optimizer.param_groups)
        for number, state in self._loading.items():
            optimizer.state[params[int(number)]].update(state)
        self._loading = {}

    def cut_present(self, optimizer: torch.optim.Optimizer) -> None:
        """Cut what the constructor (Adagrad's) has made whole."""
        for parameter, state in optimizer.state.items():
            state.update(_cut(parameter, state))


_SCALARS = ("step", "eta", "mu", "mu_product")
"""States of torch's optimizers that are one number for a parameter, whatever its shape."""


def _cut(parameter: Any, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """This rank's part of every state that has the parameter's shape, in the dtype of its master."""
    flat, index = place_of(parameter)
    flat.unit.is_settled = True
    place = flat.place_of(index)
    return {
        name: part_of(value, place, f"state {name}").to(flat.shard.device, flat.gradient.dtype, copy=True)
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in _SCALARS and value.shape == parameter.shape
    }


def _is_local(flat: FlatShard, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 1
