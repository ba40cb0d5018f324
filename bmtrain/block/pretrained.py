"""``model.save_pretrained(folder)`` of whatever package: every rank gives its part, rank 0 writes.

Rank 0 runs the package's own method, so that names, index and configuration are its own. The state dict that the
method asks for gives each tensor when it is taken: then rank 0 tells the others which, gets it in pieces, and puts it
into a file that it maps. So no rank has a whole tensor in memory that cannot go again, and a method that writes few of
them, as of an adapter, gathers few.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..context import context
from ..errors import CheckpointError
from ..objects import broadcast_object
from ..written import replacing_files_of
from .in_turn import facts_of, metadata_of, named_tensors, whole_in_pieces
from .state import attribute


@dataclass(frozen=True)
class Written:
    """A model whose state dict a package's method may ask for."""

    module: nn.Module
    state: Mapping[str, Any] | None
    """What it then gets, if it is known already."""
    writes: Callable[..., object] | None = None
    """The package's method of the model itself, where the one that runs is that of something around it."""


def write_by_rank_0(
    own: Callable[..., object], models: Sequence[Written], folder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Let rank 0 run ``own(folder, *args, **kwargs)``, which may ask ``models`` for their state dicts.  Collective.

    Raises CheckpointError on every rank when rank 0 cannot write; then files that were there are as they were.
    """
    values = [named_tensors(model.module) if model.state is None else {} for model in models]
    folder, raised = Path(folder), None
    if context().rank == 0:
        problem = None
        try:
            with (
                replacing_files_of(folder) as written,
                tempfile.TemporaryDirectory(dir=written.parent, prefix=".") as room,
                ExitStack() as given,
            ):
                for number, model in enumerate(models):
                    taken = _WhenTaken(values[number], metadata_of(model.module), Path(room), number)
                    state = taken.given if model.state is None else partial(_known, model.state)
                    given.enter_context(attribute(model.module, "state_dict", state))
                    if model.writes is not None:
                        given.enter_context(attribute(model.module, "save_pretrained", model.writes))
                _write(own, folder, written, args, kwargs)
        except Exception as error:  # the method may raise anything, and the others wait for the verdict
            problem = f"{type(error).__name__}: {error}"
            raised = error
        broadcast_object((None, problem))
    else:
        key, problem = broadcast_object(None)
        while key is not None:
            number, name = key
            for _ in whole_in_pieces(values[number][name]):
                pass
            key, problem = broadcast_object(None)
    if problem is not None:
        raise CheckpointError(f"Rank 0 could not write {folder}: {problem}") from raised


def _known(state: Mapping[str, Any], *args: Any, **kwargs: Any) -> OrderedDict[str, Any]:
    return OrderedDict(state)


def _write(
    own: Callable[..., object], folder: Path, written: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", folder.name)  # which the method takes from the folder it is given
    if (folder / "README.md").is_file():  # which methods add to
        shutil.copy2(folder / "README.md", written)
    own(os.fspath(written), *args, **kwargs)


class _WhenTaken(OrderedDict[str, Any]):
    """A state dict whose tensors are gathered when they are taken; what is tied is one tensor."""

    def __init__(
        self, values: Mapping[str, torch.Tensor], metadata: dict[str, dict[str, int]], room: Path, number: int
    ) -> None:
        super().__init__(dict.fromkeys(values))
        self._values, self._room, self._made = values, room, dict[int, torch.Tensor]()
        self._number = number  # of the model, as the others know it
        self._metadata = metadata

    def given(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As a model's ``state_dict``."""
        if destination is None and not prefix and not args:
            return self.copy()
        destination = OrderedDict() if destination is None else destination
        destination.update({prefix + key: value for key, value in self.items()})
        return destination

    def _whole(self, key: str) -> Any:
        value = self._values[key]
        if id(value) not in self._made:
            broadcast_object(((self._number, key), None))
            pieces = whole_in_pieces(value)
            try:
                self._made[id(value)] = self._in_a_file(pieces, *facts_of(value))
            finally:
                for _ in pieces:  # the others give all of them, whatever happens here
                    pass
        return self._made[id(value)]

    def _in_a_file(
        self, pieces: Iterator[tuple[int, torch.Tensor]], shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """The whole in memory that the system may take back at any time: it is on the disk as well."""
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device="cpu")
        path = self._room / str(len(self._made))
        with open(path, "wb") as file:
            for _, piece in pieces:
                file.write(piece.cpu().view(torch.uint8).numpy().data)
        mapped = torch.from_file(str(path), shared=False, size=prod(shape), dtype=dtype)
        path.unlink()
        return mapped.view(shape)

    def __getitem__(self, key: str) -> Any:
        present = super().__getitem__(key)
        if present is None:
            present = self._whole(key)
            super().__setitem__(key, present)
        return present

    def __iter__(self) -> Iterator[str]:  # of its own, so that dict(self) and {**self} take values by __getitem__
        return iter(list(super().__iter__()))

    def get(self, key: str, default: Any = None) -> Any:
        """As of any dict."""
        return self[key] if key in self else default  # noqa: SIM401 - this is the method

    def items(self) -> Any:
        """One after the other."""
        return ((key, self[key]) for key in self)

    def values(self) -> Any:
        """One after the other."""
        return (self[key] for key in self)

    def pop(self, key: str, *default: Any) -> Any:
        """As of any dict."""
        if key not in self:
            return super().pop(key, *default)
        value = self[key]
        del self[key]
        return value

    def copy(self) -> _WhenTaken:
        """Another one, which has no more of the values than this one."""
        made = _WhenTaken(self._values, self._metadata, self._room, self._number)
        made._made = self._made
        for key in list(OrderedDict.__iter__(made)):
            if key not in self:
                del made[key]
        return made
