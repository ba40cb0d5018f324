"""Short numbers that stand for tensors, samples and states of generators."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch

CHUNK = 1 << 20
"""Entries that are digested at a time, so that a large tensor needs no second one of float64."""


@lru_cache(maxsize=4)
def _pattern(device: torch.device) -> torch.Tensor:
    return torch.arange(CHUNK, dtype=torch.float64, device=device).mul_(2.399963).sin_()


def of_tensor(tensor: torch.Tensor) -> list[Any]:
    """Shape, sum, sum of squares, and the product with a fixed pattern, in float64."""
    flat = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    flat = torch.view_as_real(flat) if flat.is_complex() else flat
    flat = flat.reshape(-1)
    totals = torch.zeros(3, dtype=torch.float64, device=flat.device)
    for number, start in enumerate(range(0, flat.numel(), CHUNK)):
        part = flat[start : start + CHUNK].double()
        pattern = _pattern(flat.device)[: part.numel()]
        totals += torch.stack([part.sum(), part.square().sum(), part.dot(pattern) / (1 + number)])
    return [list(tensor.shape), *totals.tolist()]


def rows_of(value: Any) -> tuple[list[str], list[str]]:
    """A digest of every row of a batch, and one that is blind to padding.

    A row is what all tensors and lists of the batch's length hold at its position. Of two batches that are padded
    each to its own longest sample, the second digests agree: they leave out entries of 0, 1 and -100.
    """
    leaves = list(_leaves(value))
    length = length_of(value)
    if not length:
        return [], []
    exact, loose = [hashlib.blake2b(digest_size=8) for _ in range(length)], [0.0] * length
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == length:
            plain = leaf.detach().to("cpu").contiguous()
            held = plain.reshape(length, -1)
            numbers = torch.view_as_real(held).flatten(1) if held.is_complex() else held
            kept = numbers.double()
            kept = kept.masked_fill((kept == 0) | (kept == 1) | (kept == -100), 0.0).nan_to_num()
            sums = (kept.sum(1) + kept.square().sum(1).sqrt()).tolist()
            raw = held.view(torch.uint8) if held.numel() else held.to(torch.uint8)
            for index in range(length):
                exact[index].update(raw[index].numpy().tobytes())
                loose[index] += sums[index]
        elif isinstance(leaf, list) and len(leaf) == length:
            for index, entry in enumerate(leaf):
                exact[index].update(repr(entry).encode())
    return [found.hexdigest() for found in exact], [f"{number:.5g}" for number in loose]


def length_of(value: Any) -> int:
    """The number of samples in a batch; 0 if it has no rows."""
    for leaf in _leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return int(leaf.shape[0])
        if isinstance(leaf, list):
            return len(leaf)
    return 0


def _leaves(value: Any) -> Iterator[Any]:
    """Tensors that no gradient flows into, and lists of plain values."""
    if isinstance(value, torch.Tensor):
        if not value.requires_grad:
            yield value
    elif type(value).__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biuf":
        yield torch.as_tensor(value)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, (list, tuple)):
        if value and not any(isinstance(entry, (torch.Tensor, Mapping, list, tuple)) for entry in value):
            yield list(value)
        else:
            for entry in value:
                yield from _leaves(entry)


def cut(value: Any, part: str) -> Any:
    """The ``first`` or ``second`` half of a batch's rows, the ``whole`` batch, or the batch ``doubled``."""
    length = length_of(value)
    return _cut(value, length, part) if length > 1 else value


def _cut(value: Any, length: int, part: str) -> Any:
    if isinstance(value, torch.Tensor):
        return _piece(value, part) if value.dim() and value.shape[0] == length else value
    if type(value).__module__ == "numpy" and value.shape and len(value) == length:
        return _piece(torch.as_tensor(value), part).numpy()
    if isinstance(value, Mapping):
        pieces = {key: _cut(entry, length, part) for key, entry in value.items()}
        try:
            return type(value)(pieces)  # type: ignore[call-arg]
        except TypeError:
            return pieces
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cut(entry, length, part) for entry in value))
    if isinstance(value, (list, tuple)):
        if any(isinstance(entry, (torch.Tensor, Mapping, list, tuple)) for entry in value):
            return type(value)(_cut(entry, length, part) for entry in value)
        return _piece(value, part) if len(value) == length else value
    return value


def _piece(rows: Any, part: str) -> Any:
    if part == "whole":
        return rows
    half = (len(rows) + 1) // 2
    if part == "doubled":
        return torch.cat([rows, rows]) if isinstance(rows, torch.Tensor) else rows + rows
    return rows[:half] if part == "first" else rows[half:]


def of_generators() -> str:
    """The state of every generator that a script may draw from, so that a draw shows."""
    found = hashlib.blake2b(digest_size=8)
    found.update(torch.get_rng_state().numpy().tobytes())
    found.update(str(hash(random.getstate())).encode())
    if "numpy" in sys.modules:
        state = sys.modules["numpy"].random.get_state()
        found.update(state[1].tobytes())
        found.update(str(state[2]).encode())
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.update(torch.cuda.get_rng_state().numpy().tobytes())
    return found.hexdigest()
