"""What ``optimizer.state`` shows of an optimizer of torch's that steps on shards.

Between steps its states of a sharded parameter, of which it keeps this rank's part, are ShardedTensors over the same
memory: what user code reads of them is of the whole, and what it writes is what the next step uses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from ..shard.flat import flat_of, place_of
from ..shard.in_parts import part_at
from ..shard.place import Place
from ..shard.sharded_tensor import ShardedTensor

States = MutableMapping[Any, Any]
Cut = Callable[[Any, dict[str, Any]], dict[str, Any] | None]


if TYPE_CHECKING:
    _Dict = States  # what both give, once: their annotations do not agree
else:

    class _Dict(MutableMapping, dict):
        pass


class LikeDict(_Dict):
    """A dict whose entries are made when they are asked for: what is inherited of a dict's memory is not used.

    There lies one entry, so that C code that looks at the memory itself finds it not empty (json, which then asks for
    ``items()``).  What is made of it, copies among them, are ordinary dicts.
    """

    def _begin(self) -> None:
        memory: Any = self
        dict.__setitem__(memory, "made when asked for", None)

    def copy(self) -> dict[Any, Any]:
        """As of a dict: the same entries."""
        return dict(self)

    def __copy__(self) -> dict[Any, Any]:
        return dict(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return dict(self) | dict(other)

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return dict(other) | dict(self)

    def __ior__(self, other: Any) -> LikeDict:  # type: ignore[misc]
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[Any]:
        return iter(list(self)[::-1])

    def __repr__(self) -> str:
        return repr(dict(self))


class ShownState(LikeDict):
    """By parameter.

    Args:
        kept: what the optimizer keeps, by parameter; a parameter has an empty one before its first step.
        cut: this rank's part of a whole state.
        whole: the states of all ranks, by parameter (collective), where one rank keeps each.
    """

    def __init__(self, kept: States, cut: Cut, whole: Callable[[], dict[Any, Any]]) -> None:
        self._begin()
        self.kept, self._cut, self._whole = kept, cut, whole

    def __getitem__(self, parameter: Any) -> Any:
        entry = self.kept[parameter]
        if flat_of(parameter) is None or not isinstance(entry, MutableMapping):
            return entry
        return _ShownEntry(parameter, entry, self._cut)

    def __setitem__(self, parameter: Any, given: Any) -> None:
        if isinstance(given, Mapping) and flat_of(parameter) is not None:
            given = self._cut(parameter, dict(given))
        self.kept[parameter] = given

    def __delitem__(self, parameter: Any) -> None:
        del self.kept[parameter]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.kept

    def get(self, parameter: Any, default: Any = None) -> Any:
        """As of a dict: it makes no new one."""
        if parameter not in self:
            return default
        return self[parameter]

    def clear(self) -> None:
        self.kept.clear()

    def __reduce__(self) -> Any:
        """A copy, as of the optimizer, is of what is shown."""
        return _restored, ({parameter: _as_dict(self[parameter]) for parameter in self.kept},)


def _as_dict(entry: Any) -> Any:
    return dict(entry) if isinstance(entry, _ShownEntry) else entry


def _restored(kept: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(dict, kept)


class _ShownEntry(LikeDict):
    """What is kept of one sharded parameter."""

    def __init__(
        self,
        parameter: Any,
        kept: MutableMapping[str, Any],
        cut: Cut,
    ) -> None:
        self._begin()
        self._parameter, self._kept, self._cut = parameter, kept, cut

    def __getitem__(self, name: str) -> Any:
        return as_part(self._parameter, self._kept[name])

    def __setitem__(self, name: str, value: Any) -> None:
        part = self._cut(self._parameter, {name: value})
        assert part is not None
        self._kept[name] = part[name]

    def __delitem__(self, name: str) -> None:
        del self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


class OwnersState(ShownState):
    """The same where each state is whole, on the rank that owns the parameter: the others have nothing to show.

    Whatever is asked of such a parameter, all ranks raise alike, those that have something as those that have not.
    """

    def __getitem__(self, parameter: Any) -> Any:
        _require_on_all(parameter)
        return super().__getitem__(parameter)

    def __setitem__(self, parameter: Any, given: Any) -> None:
        _require_on_all(parameter)
        super().__setitem__(parameter, given)

    def __delitem__(self, parameter: Any) -> None:
        _require_on_all(parameter)
        super().__delitem__(parameter)

    def __contains__(self, parameter: object) -> bool:
        _require_on_all(parameter)
        return super().__contains__(parameter)

    def __reduce__(self) -> Any:
        """A copy, with which an optimizer's copy goes on, has the states of all ranks.  Collective."""
        return _restored, (self._whole(),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(each state is on one rank)"

    def __iter__(self) -> Iterator[Any]:
        raise UnsupportedError(_ON_ONE_RANK)

    def __len__(self) -> int:
        raise UnsupportedError(_ON_ONE_RANK)


_ON_ONE_RANK = (
    "What this optimizer keeps of a parameter is on one rank, its owner. Read optimizer.state_dict(), which holds the "
    "states of all of them (collective), change them by optimizer.load_state_dict, or forget them: "
    "optimizer.state.clear()."
)


def _require_on_all(parameter: Any) -> None:
    if flat_of(parameter) is not None:
        raise UnsupportedError(_ON_ONE_RANK)


def own_place(parameter: Any) -> Place:
    """Where this rank's part of a sharded parameter is."""
    flat, index = place_of(parameter)
    return flat.place_of(index)


def is_local(value: Any) -> bool:
    """Whether a state may be this rank's part of one like its parameter."""
    return isinstance(value, torch.Tensor) and value.dim() == 1


def as_part(parameter: Any, value: Any) -> Any:
    """The whole state of which ``value`` is this rank's part; any other value as it is."""
    if flat_of(parameter) is None or not is_local(value) or isinstance(value, ShardedTensor):
        return value
    place = own_place(parameter)
    return part_at(place, value) if value.numel() == place.kept.stop - place.kept.start else value
