"""Files of ``torch.save`` that are filled one tensor at a time."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..written import replacing


def with_room(path: Path, tree: Any) -> Any:
    """Write ``tree``, whose tensors are those of a FakeTensorMode; give it back with tensors that are in the file.

    What is written into them is in the file.
    """
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tree, path)
    with open(path, "r+b") as file:  # a full disk is an error now, and would be a signal later
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, weights_only=False, mmap=True)


def write_in_turn(
    path: Path,
    kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    ties: Mapping[str, str],
    metadata: dict[str, Any],
    pieces: Iterable[tuple[str, int, torch.Tensor]],
) -> None:
    """A state dict, as ``torch.save`` writes it; the file appears complete or not at all.

    Args:
        kinds: shape and dtype of each tensor.
        ties: of each, the first of those that are one tensor.
        metadata: what torch adds to a state dict.
        pieces: of those firsts: name, where in the flattened whole, (n,) values.
    """
    with replacing(path) as temporary:
        with FakeTensorMode():
            firsts = {
                name: torch.empty(kinds[name][0], dtype=kinds[name][1], device="cpu")
                for name in dict.fromkeys(ties.values())
            }
            state: Any = OrderedDict((name, firsts[first]) for name, first in ties.items())
            state._metadata = metadata
        placed = with_room(temporary, state)
        for name, start, piece in pieces:
            placed[name].view(-1)[start : start + piece.numel()] = piece
