"""``bmt.config``: what this process knows of the job, under the published names.

Reading asks the context.  Writing is for a script's own keys, such as a communicator or stream of its own, and for
``save_param_to_cpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from ..checkpoint import background_writer
from ..context import Context, context, is_initialized, rank, world_size
from ..errors import ConfigurationError
from .init import topology

__all__ = ["Config", "config", "rank", "world_size"]


def _stream(here: Context) -> Any:
    """Where what is not gathered or reduced runs: the caller's stream.  None on a CPU."""
    return here.device.current_stream()


_KNOWN: dict[str, Callable[[Context], Any]] = {
    "initialized": lambda here: True,
    "rank": lambda here: here.rank,
    "local_rank": lambda here: here.topology.local_rank,
    "world_size": lambda here: here.world_size,
    "local_size": lambda here: here.topology.local_size,
    "pipe_size": lambda here: here.topology.pipe_size,
    "pipe_enabled": lambda here: here.topology.pipe_size > 1,
    "micros": lambda here: here.num_micro_batches or here.topology.pipe_size,
    "tp_size": lambda here: here.topology.tp_size,
    "tp_rank": lambda here: here.topology.tp_rank,
    "topology": lambda here: topology(),
    "zero_rank": lambda here: here.topology.data_rank,
    "zero_size": lambda here: here.topology.data_size,
    "tp_zero_rank": lambda here: here.topology.data_rank,
    "tp_zero_size": lambda here: here.topology.data_size,
    "comm": lambda here: here.world,
    "zero_comm": lambda here: here.world,
    "pp_zero_comm": lambda here: here.stage_group,
    "tp_zero_comm": lambda here: here.data_group,
    "pp_tp_zero_comm": lambda here: here.stage_data_group,
    "pipe_comm": lambda here: here.pipe_group,
    "tp_comm": lambda here: here.tensor_group,
    "calc_stream": _stream,
    "load_stream": lambda here: here.device.gather_stream or _stream(here),
    "tp_comm_stream": _stream,
    "pp_comm_stream": _stream,
    "barrier_stream": _stream,
    "load_event": lambda here: here.device.event_after(here.device.gather_stream),
    "save_param_to_cpu": lambda here: here.save_param_to_cpu,
    "finish_save": lambda here: background_writer() is None,
    "save_thread": lambda here: background_writer(),
}
_BEFORE = {"initialized": False, "rank": 0, "world_size": 1}


class Config(MutableMapping[str, Any]):
    """A view of the context, with room for keys of the script's own."""

    def __getitem__(self, key: str) -> Any:
        if not is_initialized():
            if key in _BEFORE:
                return _BEFORE[key]
        elif key in context().options:
            return context().options[key]
        if key in _KNOWN:
            return _KNOWN[key](context())  # says that init_distributed is missing, if it is
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "save_param_to_cpu":
            context().save_param_to_cpu = bool(value)
        elif key in _KNOWN and value != self[key]:
            raise ConfigurationError(
                f"bmt.config[{key!r}] is {self[key]!r}, settled by init_distributed; it cannot be changed."
            )
        if key not in _KNOWN:
            context().options[key] = value

    def __delitem__(self, key: str) -> None:
        del context().options[key]

    def __iter__(self) -> Iterator[str]:
        yield from (dict.fromkeys([*_KNOWN, *context().options]) if is_initialized() else _BEFORE)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Config({dict(self)!r})"


config = Config()
