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
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..context import context, is_initialized
from ..errors import ConfigurationError, UnsupportedError
from ..log import warn
from ..shard.engine import engine
from ..shard.flat import flat_of
from ..shard.place import Place
from .driven import knows_shards
from .fit import require_fit
from .interrupts import after_step
from .pieces import all_params, flats_of, replicated_of
from .replicated import adopt
from .shown_state import own_place
from .step_hooks import Args, Kwargs, StepHooks
from .step_on import StepOn, choose, is_unchanged
from .views import ShardView, TensorView, View, WholeView

_STATE = ("state_dict", "load_state_dict")


def adapt(optimizer: torch.optim.Optimizer, step_on: StepOn | None = None) -> None:
    """Make ``optimizer`` work on sharded parameters.

    Raises ConfigurationError for one that cannot, or when ``step_on`` does not fit it.
    """
    if knows_shards(optimizer):
        if step_on not in (None, "shards"):
            raise ConfigurationError(f"{type(optimizer).__name__} steps on shards; leave step_on out.")
        return
    if not hasattr(type(optimizer), "register_state_dict_pre_hook"):  # one may pass on what it is asked for
        raise ConfigurationError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer: give add_optimizer the one that it holds. What "
            "it does to parameters and gradients around that one's step, do before optim_manager.step()."
        )
    _complete(optimizer)
    if _view_of(optimizer) is not None:
        return
    params = all_params(optimizer.param_groups)
    if isinstance(optimizer, torch.optim.SparseAdam) and (flats_of(params) or context().world_size > 1):
        raise ConfigurationError("SparseAdam needs sparse gradients; here they become dense when reduced. Use Adam.")
    adopt(replicated_of(params))
    sharded = bool(flats_of(params)) and context().world_size > 1
    way = choose(optimizer, step_on) if sharded else "whole"
    if sharded and way != "shards" and any(flat.is_slice for flat in flats_of(params)):
        raise UnsupportedError(
            f"{type(optimizer).__name__} steps on whole tensors, of which tensor-parallel ranks have slices. Use an "
            'element-wise optimizer (Adam, SGD, Lion), or give add_optimizer(step_on="shards") if this is one.'
        )
    if sharded and way == "whole" and step_on is None:
        _warn_of_whole(optimizer, params)
    view = {"shards": ShardView, "tensors": TensorView, "whole": WholeView}[way]()
    view.tried = len(optimizer.param_groups)
    view.admits = step_on is not None or way == "whole" or is_unchanged(type(optimizer))
    optimizer.step = MethodType(_stepping(view, optimizer.step), optimizer)  # type: ignore[method-assign]
    optimizer.register_state_dict_pre_hook(view.keep_state)
    optimizer.register_state_dict_post_hook(view.gather_kept)
    optimizer.register_load_state_dict_pre_hook(view.cut)
    optimizer.register_load_state_dict_post_hook(view.restore)
    view.cut_present(optimizer)
    optimizer.__dict__["_bmt_in_parts"] = _InParts(optimizer, view)


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer whose class does not call ``super().__init__()`` the hooks that torch gives the others."""
    for when in ("step_pre", "step_post", *(f"{what}_{when}" for what in _STATE for when in ("pre", "post"))):
        optimizer.__dict__.setdefault(f"_optimizer_{when}_hooks", OrderedDict())


class _InParts:
    """The state of an adapted optimizer, each rank's part of it (``shard.in_parts``)."""

    def __init__(self, optimizer: torch.optim.Optimizer, view: View) -> None:
        self._optimizer, self._view = optimizer, view

    def parts(self) -> dict[str, Any]:
        with self._view.in_parts():
            return {**self._optimizer.state_dict(), "masters": self._view.masters(self._optimizer)}

    def part_at(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Place | bool:
        params = all_params(self._optimizer.param_groups)
        if len(path) < 2 or path[0] not in ("state", "masters") or path[1] not in range(len(params)):
            return True
        parameter = params[path[1]]
        if path[0] == "state":
            return self._view.part_at(self._optimizer, parameter, path[2:], shape)
        return False if flat_of(parameter) is None else own_place(parameter)

    def check_parts(self, state: dict[str, Any]) -> None:
        require_fit(self._optimizer, state, self._view.check(self._optimizer), own=True)

    def load_parts(self, state: dict[str, Any]) -> None:
        with self._view.in_parts():
            self._optimizer.load_state_dict({k: v for k, v in state.items() if k != "masters"})
        self._view.load_masters(self._optimizer, state.get("masters", {}))


def _view_of(optimizer: torch.optim.Optimizer) -> View | None:
    hooks = optimizer._optimizer_state_dict_post_hooks.values()
    views = (getattr(hook, "__self__", None) for hook in hooks)
    return next((view for view in views if isinstance(view, View)), None)


def check_adapted(optimizer: torch.optim.Optimizer, state_dict: Any) -> None:
    """Raises CheckpointError on every rank if ``state_dict`` cannot be loaded.  Collective."""
    view = _view_of(optimizer)
    if view is not None:
        require_fit(optimizer, state_dict, view.check(optimizer))


def _stepping(view: View, step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` between ``view``'s two ends.  Not by hooks: a step that raises must let go, too."""

    @functools.wraps(step)
    def around(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        hooks = StepHooks(optimizer, functools.partial(view.outside, optimizer))
        args, kwargs = hooks.before(args, kwargs)
        closure, rest, others = _closure_of(args, kwargs)
        view.admit(optimizer)
        try:
            with hooks.inside():
                view.enter_step(optimizer)
                given = () if closure is None else (view.closure_outside(optimizer, closure),)
                out = step(*given, *rest, **others)
                view.leave_step(optimizer)
        finally:
            view.enter_sharded(optimizer)
        hooks.after(args, kwargs)
        engine().optimizer_stepped(functools.partial(view.state_bytes, optimizer))
        if closure is not None:  # no manager's step is around it
            after_step()
        return out

    return around


def _closure_of(args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs]:
    """The closure among a step's arguments, and the others."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs.get("closure"), (), {name: value for name, value in kwargs.items() if name != "closure"}


def _warn_of_whole(optimizer: torch.optim.Optimizer, params: list[Any]) -> None:
    if context().rank == 0:
        numel = sum(p.numel() for p in params if flat_of(p) is not None)
        warn(
            f"{type(optimizer).__name__} may look at several tensors at once, so every rank makes all of its steps, "
            f"with all values, gradients and states: {numel / 2**28:.3g} GiB of each in fp32. If it treats each tensor "
            'by itself, say add_optimizer(..., step_on="tensors"), which shares the work out; if each element, '
            '"shards"; if neither, "whole" ends this warning.',
            stacklevel=4,
        )


def _warn_of_unaveraged(optimizer: torch.optim.Optimizer, params: list[Any]) -> None:
    """Once for an optimizer, if it steps on what this rank's samples alone have given."""
    trained = [p for p in params if p.grad is not None]
    if trained and context().rank == 0 and engine().of_no_module.are_nobodys(trained):
        warn(
            f"{type(optimizer).__name__} steps on gradients of this rank's samples alone: no distributed module holds "
            "its parameters, and no bmt.optim.OptimManager drives it. Call optim_manager.add_optimizer(optimizer) "
            "after making it, and gradients are averaged; where your own code averages them, nothing is wrong.",
            stacklevel=4,
        )


def _refuse_unmanaged(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before any optimizer's step: on its own, torch's would step on gradients that are not reduced."""
    if knows_shards(optimizer):
        return
    params = all_params(optimizer.param_groups)
    if _steps_by_driven(optimizer, params):
        return
    flats = flats_of(params)
    if not flats and is_initialized():
        _warn_of_unaveraged(optimizer, params)
    if any(not flat.is_stepped_on for flat in flats):  # else it is part of an adapted one (SAM's base optimizer)
        raise ConfigurationError(
            f"{type(optimizer).__name__} holds sharded parameters but no bmt.optim.OptimManager drives it. Call "
            "optim_manager.add_optimizer(optimizer) after making it, then optim_manager.backward(loss) and "
            "optim_manager.step()."
        )
    own = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    if flats and own and _view_of(optimizer) is None and context().world_size > 1:
        raise UnsupportedError(
            f"{type(optimizer).__name__}, which steps inside another optimizer's step, has hooks that would see what "
            "this rank steps on. Register them on the outer optimizer, which was given to add_optimizer."
        )


def _steps_by_driven(optimizer: torch.optim.Optimizer, params: list[Any]) -> bool:
    """Whether others that an optimizer holds (Lookahead, SAM) step on its parameters, and managers drive those."""
    held = (one for one in vars(optimizer).values() if isinstance(one, torch.optim.Optimizer) and one is not optimizer)
    driven = [one for one in held if knows_shards(one) or "_bmt_in_parts" in vars(one)]
    return bool(driven) and {*map(id, params)} <= {id(p) for one in driven for p in all_params(one.param_groups)}


register_optimizer_step_pre_hook(_refuse_unmanaged)
