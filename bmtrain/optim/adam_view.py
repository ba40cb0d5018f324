"""What ``optimizer.state`` shows of an AdamOptimizer: what torch's AdamW keeps of each parameter, to read and change.

Moments are ShardedTensors over the optimizer's own memory, so that what is written to them is what the next step uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..errors import UnsupportedError
from ..shard.flat import FlatShard
from ..shard.in_parts import part_at
from .adam_state import FlatState
from .pieces import Home, home_of
from .shown_state import LikeDict
from .state_copies import OfState

_MOMENTS = ("exp_avg", "exp_avg_sq")
Find = Callable[[Home], FlatState]


class AdamView(LikeDict):
    """By parameter.

    Args:
        params: the optimizer's, as they are now.
        kept: what it keeps of a home, by key.
        find: the same of any home, made where there is nothing yet.
    """

    def __init__(self, params: list[Any], kept: Mapping[int, FlatState], find: Find, shown: list[StepShown]) -> None:
        self._begin()
        self._params, self._kept, self._find, self._shown = params, kept, find, shown

    def _has(self, parameter: Any) -> bool:
        home, index = home_of(parameter)
        return home.key in self._kept and bool(self._kept[home.key].steps[index])

    def __iter__(self) -> Iterator[Any]:
        return (p for p in self._params if self._has(p))

    def __len__(self) -> int:
        return sum(map(self._has, self._params))

    def __contains__(self, parameter: object) -> bool:
        return any(p is parameter for p in self._params) and self._has(parameter)

    def __getitem__(self, parameter: Any) -> OfParameter:
        home, index = home_of(parameter)
        return OfParameter(home, index, self._kept.get(home.key), self._find, self._shown)

    def get(self, parameter: Any, default: Any = None) -> Any:
        """As of a dict: ``default`` where there is nothing yet, for which ``state[parameter]`` gives an empty one."""
        found = self[parameter]
        return found if len(found) else default

    def pop(self, parameter: Any, *default: Any) -> Any:
        """As of a dict: what was kept, copied."""
        if parameter not in self and default:
            return default[0]
        kept = {name: value.clone() for name, value in self[parameter].items()}
        del self[parameter]
        return kept

    def __setitem__(self, parameter: Any, given: Mapping[str, Any]) -> None:
        shown = self[parameter]
        values = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        shown.clear()
        shown.update(values)

    def __delitem__(self, parameter: Any) -> None:
        if parameter not in self:
            raise KeyError(parameter)
        self[parameter].clear()

    def clear(self) -> None:
        for parameter in list(self):
            del self[parameter]


StepShown = tuple[FlatState, int, torch.Tensor, float]
"""Whose number of steps was shown, as a tensor that code may have written to, and what it was."""


class OfParameter(LikeDict):
    """``step``, ``exp_avg`` and ``exp_avg_sq`` of one parameter; empty before its first step."""

    def __init__(self, home: Home, index: int, kept: FlatState | None, find: Find, shown: list[StepShown]) -> None:
        self._begin()
        self._home, self._index, self._state, self._find, self._shown = home, index, kept, find, shown

    def __iter__(self) -> Iterator[str]:
        return iter(("step", *_MOMENTS) if self._state is not None and self._state.steps[self._index] else ())

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._state is None or name not in set(self):
            raise KeyError(name)
        if name != "step":
            return self._moment(self._state, name)
        steps = float(self._state.steps[self._index])
        tensor = torch.tensor(steps, device="cpu")
        self._shown.append((self._state, self._index, tensor, steps))
        return tensor

    def original(self, name: str) -> OfState:
        """What a copy of one of them is taken of."""
        state = self._state
        assert state is not None

        def version() -> tuple[int, int, int]:
            return state.steps[self._index], state.exp_avg._version, state.exp_avg_sq._version

        if name == "step":
            return OfState(version, lambda: torch.tensor(float(state.steps[self._index]), device="cpu"), self._count)
        return OfState(version, (lambda: self._moment(state, name)) if name in _MOMENTS else None)

    def _count(self, step: torch.Tensor) -> None:
        self["step"] = step

    def _moment(self, state: FlatState, name: str) -> torch.Tensor:
        values: torch.Tensor = getattr(state, name)
        if isinstance(self._home, FlatShard):
            return part_at(self._home.place_of(self._index), self._home.local(values, self._index))
        return self._home.whole(values)

    @torch.no_grad()
    def __setitem__(self, name: str, value: Any) -> None:
        self._state = self._find(self._home) if self._state is None else self._state
        if name == "step":
            self._state.steps[self._index] = int(value)
        elif name in _MOMENTS:
            self._moment(self._state, name).copy_(value)
        else:
            raise UnsupportedError(f"An AdamOptimizer keeps no {name!r}. Keep it in a dict of your own, by parameter.")

    def __delitem__(self, name: str) -> None:
        raise UnsupportedError(
            f"An AdamOptimizer cannot forget {name!r} alone. Forget all of a parameter: del optimizer.state[parameter]."
        )

    @torch.no_grad()
    def clear(self) -> None:
        """As before the first step."""
        if self._state is not None:
            self._state.steps[self._index] = 0
            for name in _MOMENTS:
                self._moment(self._state, name).zero_()


def take_steps(shown: list[StepShown]) -> None:
    """Take over the numbers of steps that code has written to since they were shown."""
    for state, index, tensor, steps in shown:
        if float(tensor) != steps:
            state.steps[index] = int(tensor)
    shown.clear()
