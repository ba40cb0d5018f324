"""Hooks that make of one rank's gradient what the mean over ranks would not have become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...context import Context
from ...log import warn
from ...shard.flat import flat_of
from ...shard.parameter import DistributedParameter
from .linearity import watched
from .steps import FirstSteps

_CALLS = 3
"""So many of each hook are looked at, and those that a model has in so many of its first steps."""

Hooks = MutableMapping[int, Callable[..., Any]]


class FirstHooks:
    """Looks at the first calls of hooks that get gradients.  A hook that is linear may come before the mean.

    Attributes:
        watches: whether hooks are looked at where they are registered.
    """

    def __init__(self, ctx: Context, first_steps: FirstSteps) -> None:
        self._ctx, self._first_steps = ctx, first_steps
        self._said: set[str] = set()
        self.watches = ctx.topology.data_size > 1 and ctx.rank == 0

    def renew(self) -> None:
        """A model begins to train."""
        self._said.clear()

    @property
    def wanted(self) -> bool:
        """Whether hooks are looked for now, which may have been there before their model was sharded."""
        return self.watches and self._first_steps.age < _CALLS

    def note(self, model: nn.Module, age: int) -> None:
        """An outermost forward is about to train ``model``, which has made ``age`` steps.

        Hooks of modules that are registered after some steps are not looked at.
        """
        if not self.watches or age >= _CALLS:
            return
        for module in model.modules():
            for hooks in (module._backward_hooks, module._backward_pre_hooks):
                if hooks:
                    self._observe(hooks, type(module).__name__, _tensors, self._say_of_module)
        for parameter in model.parameters():
            self.note_leaf(parameter)

    def note_leaf(self, leaf: torch.Tensor) -> None:
        """``leaf`` may have hooks, and is to get a gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            hooks: Any = leaf._backward_hooks
            later: Any = leaf._post_accumulate_grad_hooks
        if hooks:
            self._observe(hooks, _name(leaf), _tensors, self._say_of_parameter)
        if later:
            self._observe(later, _name(leaf), _gradients, self._say_of_parameter)

    def _observe(self, hooks: Hooks, name: str, given: Given, say: Callable[[str, str, str], None]) -> None:
        for key, hook in list(hooks.items()):
            if not isinstance(hook, _Observed) and not (getattr(hook, "__module__", "") or "").startswith("bmtrain."):
                hooks[key] = _Observed(hooks, key, given, partial(self._say, say, name, _line(hook)))

    def _say(self, say: Callable[[str, str, str], None], name: str, place: str, function: str) -> None:
        if place not in self._said:
            self._said.add(place)
            say(name, place, function)

    def _say_of_parameter(self, name: str, place: str, function: str) -> None:
        warn(
            f"A hook of {name} ({place}) makes something of the gradient that is not linear ({function}). It gets this "
            "rank's gradient, before the mean over the ranks, and what becomes of that is not what would become of "
            "the whole batch's. Change p.grad instead, which is the mean, after the backward and before the step: "
            "`with torch.no_grad(): p.grad.clamp_(-1, 1)`, say.",
            stacklevel=2,
        )

    def _say_of_module(self, name: str, place: str, function: str) -> None:
        ranks = self._ctx.topology.data_size
        warn(
            f"A backward hook of {name} ({place}) makes something of gradients that is not linear ({function}). It "
            "gets those of a mean over this rank's samples, before the mean over the ranks: of each sample "
            f"{ranks} times what it is in the whole batch. Where it treats each element by itself, as a clamp does, "
            f"let it divide what it gets by {ranks}, the number of ranks that share a batch, and multiply what it "
            "gives.",
            stacklevel=2,
        )


Given = Callable[[tuple[Any, ...]], list[torch.Tensor]]


class _Observed:
    """In the place of a hook, until that has been called some times."""

    def __init__(self, hooks: Hooks, key: int, given: Given, say: Callable[[str], None]) -> None:
        self._hooks, self._key, self._given, self._say = hooks, key, given, say
        self._hook, self._calls = hooks[key], 0

    def __call__(self, *args: Any) -> Any:
        self._calls += 1
        present: object = self._hooks.get(self._key)
        if self._calls == _CALLS and present is self:
            self._hooks[self._key] = self._hook
        if torch.compiler.is_dynamo_compiling():
            return self._hook(*args)
        again = _gradients if self._given is _gradients else _nothing
        out, bends = watched(partial(self._hook, *args), self._given(args), partial(again, args))
        if bends:
            self._say(bends)
        return out

    def __reduce__(self) -> Any:
        return _same, (self._hook,)  # a copy of a model has the hook itself


def _same(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


def _tensors(args: Iterable[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(list(args)) if isinstance(leaf, torch.Tensor)]


def _gradients(args: tuple[Any, ...]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in args if parameter.grad is not None]


def _nothing(args: tuple[Any, ...]) -> list[torch.Tensor]:
    return []


def _name(leaf: torch.Tensor) -> str:
    flat = flat_of(leaf)
    if flat is not None and isinstance(leaf, DistributedParameter):
        return repr(flat.names[leaf._index])
    with torch._C.DisableTorchFunctionSubclass():
        return f"a parameter of shape {tuple(leaf.shape)}"


def _line(hook: Any) -> str:
    code = getattr(hook, "__code__", None)
    return (
        getattr(hook, "__name__", type(hook).__name__) if code is None else f"{code.co_filename}:{code.co_firstlineno}"
    )
