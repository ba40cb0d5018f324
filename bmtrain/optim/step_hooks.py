"""Hooks of ``optimizer.step()``: they are called when torch calls them, and see the model as it is outside of steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch.optim import optimizer as of_torch

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Hook = Callable[..., Any]
Hooks = Any  # an OrderedDict of them, by number; torch has many types of these
Outside = Callable[[Hook], Hook]

_COUNTS = -1
"""The key of what counts the steps; those of torch's handles begin at 0."""


def _is_users(hook: Hook) -> bool:
    """Not one that torch (its profiler) or this package has registered by itself, which looks at no values."""
    return getattr(hook, "__module__", "").partition(".")[0] not in ("torch", __name__.partition(".")[0])


class StepHooks:
    """Those of one step of ``optimizer``, its own and the global ones, in torch's order.

    They are called before the parameters show what is stepped on, and after.  A step may make others, of the class
    that it derives from or of an optimizer that it holds, for which torch calls hooks, too: those run ``outside``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, outside: Outside) -> None:
        self._optimizer, self._outside = optimizer, outside
        self._depth = 0

    def before(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Call those before the step; returns what is left of its arguments."""
        everyones, own = of_torch._global_optimizer_pre_hooks, self._optimizer._optimizer_step_pre_hooks
        given: Any = (self._optimizer, *args)
        for hook in filter(_is_users, chain(list(everyones.values()), list(own.values()))):
            changed = hook(self._optimizer, given, kwargs)
            if changed is not None:
                given, kwargs = changed
        return tuple(given[1:]), kwargs

    def after(self, args: Args, kwargs: Kwargs) -> None:
        """Call those after it."""
        everyones, own = of_torch._global_optimizer_post_hooks, self._optimizer._optimizer_step_post_hooks
        for hook in filter(_is_users, chain(list(own.values()), list(everyones.values()))):
            hook(self._optimizer, (self._optimizer, *args), kwargs)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside the ``with``, torch calls them for steps within this one only."""
        before: Hooks = self._optimizer._optimizer_step_pre_hooks
        after: Hooks = self._optimizer._optimizer_step_post_hooks
        everyones: Any = of_torch._global_optimizer_pre_hooks, of_torch._global_optimizer_post_hooks
        set_aside = [(place, self._set_aside(place)) for place in (before, after, *everyones)]
        before[_COUNTS], after[_COUNTS] = self._enter, self._leave
        after.move_to_end(_COUNTS, last=False)
        try:
            yield
        finally:
            del before[_COUNTS], after[_COUNTS]
            for place, hooks in set_aside:
                place.update((key, hook) for key, hook in hooks.items() if key in place)

    def _set_aside(self, place: Hooks) -> dict[int, Hook]:
        """What ``place`` holds; in its place is what calls it for steps within this one."""
        hooks = {key: hook for key, hook in place.items() if _is_users(hook)}
        for key, hook in hooks.items():
            place[key] = self._within(hook)
        return hooks

    def _within(self, hook: Hook) -> Hook:
        outside = self._outside(hook)

        @functools.wraps(hook)
        def call(*args: Any) -> Any:
            return outside(*args) if self._depth else None

        return call

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
