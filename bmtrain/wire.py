"""Objects as bytes that are read without running anybody's code.

What comes over a network may come from a stranger, and a pickle runs what it says.  So bytes are read as torch reads
files with ``weights_only=True``: plain values, tensors, and classes that are known to be harmless.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import io
import pathlib
import threading
from functools import cache
from typing import Any

import torch

from .errors import CommunicationError, UnsupportedError

_reading = threading.Lock()  # what torch allows is one list for all threads


def to_bytes(obj: object) -> bytes:
    """``obj`` as bytes.  Raises UnsupportedError for one that ``from_bytes`` would refuse."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    with _reading, torch.serialization.safe_globals(_harmless()):
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    if refused:
        raise UnsupportedError(
            f"A {type(obj).__name__} with {', '.join(sorted(refused))} in it is not sent to other ranks: what comes "
            "over the network is read without running code. Send numbers, strings, tensors, lists and dicts of them, "
            "or call torch.serialization.add_safe_globals([TheClass]) on every rank."
        )
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """The object.  Raises CommunicationError for bytes that ``to_bytes`` has not made."""
    try:
        with _reading, torch.serialization.safe_globals(_harmless()):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of torch's and pickle's many kinds
        raise CommunicationError(
            f"What came from another rank is refused, as it is not what this library sends: {error}"
        ) from error


@cache
def _harmless() -> list[Any]:
    """Classes and functions that only hold or build values."""
    found: list[Any] = [
        frozenset, range, slice, datetime.date, datetime.datetime, datetime.timedelta, datetime.timezone,
        *(getattr(pathlib, name) for name in dir(pathlib) if name.endswith("Path")),
    ]  # fmt: skip
    if importlib.util.find_spec("numpy") is not None:
        numpy = importlib.import_module("numpy")
        inner = importlib.import_module("numpy._core.multiarray")
        found += [numpy.ndarray, numpy.dtype, inner._reconstruct, inner.scalar]
        found += [getattr(numpy.dtypes, name) for name in dir(numpy.dtypes) if name.endswith("DType")]
    return found
