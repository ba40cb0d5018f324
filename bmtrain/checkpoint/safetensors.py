"""The format of safetensors: the size of a header, the header in JSON, and the tensors' bytes."""

from __future__ import annotations

import json
import os
import struct
from math import prod
from pathlib import Path

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in NAMES.items()}


def mapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, which is mapped: what is read of them comes into memory, and may go again.

    Raises ValueError for what is no such file.
    """
    length = os.path.getsize(path)
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8)) if length >= 8 else (length,)
        if size > length - 8:
            raise ValueError("it is no file of safetensors, or only a part of one")
        header = json.loads(file.read(size))
    data = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)
    found = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        dtype, (start, end) = _DTYPES.get(facts["dtype"]), facts["data_offsets"]
        if dtype is None:
            raise ValueError(f"{name!r} is {facts['dtype']}, which is not read here")
        if end - start != prod(facts["shape"]) * dtype.itemsize or not 0 <= start <= end <= length - 8 - size:
            raise ValueError(f"the place of {name!r} is wrong")
        values = data[8 + size + start : 8 + size + end]
        aligned = values if values.storage_offset() % dtype.itemsize == 0 else values.clone()
        found[name] = aligned.view(dtype).view(facts["shape"])
    return found
