"""The state of a model of which every rank gives and takes its own part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..alike import misfit
from ..block.in_turn import named_state
from ..block.sharded import level_statistics, owned_units
from ..errors import CheckpointError
from ..shard.flat import FlatShard, flat_of, place_of
from ..shard.in_parts import part_at
from ..shard.place import Place
from ..shard.sharded_tensor import ShardedTensor


class ModelParts:
    """Parameters and persistent buffers under the names of the unconverted model; ``shard.in_parts`` says what is what.

    Hooks of ``state_dict`` and ``load_state_dict`` are not called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def parts(self) -> dict[str, Any]:
        """The present values, without a copy."""
        level_statistics(self._model)
        found: dict[str, Any] = {}
        known: dict[int, Any] = {}  # what is tied stays one tensor
        for name, value in named_state(self._model).items():
            if value is None:
                module, _, _ = name.rpartition(".")
                found[name] = self._model.get_submodule(module).get_extra_state()
                continue
            if id(value) not in known:
                flat = flat_of(value)
                if flat is not None:
                    _, index = place_of(value)
                    known[id(value)] = part_at(flat.place_of(index), flat.read_part(index))
                else:
                    known[id(value)] = value if isinstance(value, ShardedTensor) else value.detach()
            found[name] = known[id(value)]
        return found

    def part_at(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> Place | bool:
        """As ``shard.in_parts`` says."""
        value = named_state(self._model).get(path[0]) if len(path) == 1 else None
        if isinstance(value, ShardedTensor):
            return value.part.place
        flat = flat_of(value)
        if value is None or flat is None or flat.whole_shape(place_of(value)[1]) != shape:
            return True
        return flat.place_of(place_of(value)[1])

    def check_parts(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when names, shapes or kinds do not fit."""
        expected = named_state(self._model)
        problems = [f"missing: {name}" for name in expected if name not in state]
        problems += [f"unexpected: {name}" for name in state if name not in expected]
        for name, value in expected.items():
            if name in state and value is not None:
                reason = misfit(state[name], value.shape, value.dtype, value.layout)
                problems += [] if reason is None else [f"{name}: {reason}"]
        if any(unit.pins for unit in owned_units(self._model)):
            problems.append("the model is in use: load outside of forwards and of `with bmt.gathered(...)`")
        if problems:
            raise CheckpointError(
                "The checkpoint does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems)
            )

    @torch.no_grad()
    def load_parts(self, state: dict[str, Any]) -> None:
        """Take the values of ``state``."""
        for unit in owned_units(self._model):
            unit.release()
        for name, value in named_state(self._model).items():
            given = state[name]
            if value is None:
                module, _, _ = name.rpartition(".")
                self._model.get_submodule(module).set_extra_state(given)
                continue
            flat: FlatShard | None = flat_of(value)
            if flat is not None:
                _, index = place_of(value)
                flat.write_part(index, flat.local_part(given, index))
            else:
                value.copy_(given)
