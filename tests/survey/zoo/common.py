"""What the families share.

A family is a function that returns a model and its inputs: a real model, in a tiny configuration, with random weights.
It is named ``PACKAGE__FAMILY`` after the package (see ``packages.py``) whose source is converted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Made = tuple[Any, ...]
B, T, V = 4, 12, 65  # batch, length, vocabulary


def ids(batch: int = B, length: int = T, low: int = 3, high: int = V) -> Tensor:
    """Random tokens."""
    return torch.randint(low, high, (batch, length))
