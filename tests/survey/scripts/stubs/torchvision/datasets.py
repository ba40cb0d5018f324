"""Synthetic pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MNIST(torch.utils.data.Dataset[Any]):
    def __init__(
        self, root: str, train: bool = True, transform: Callable[[Any], Any] | None = None, download: bool = False
    ) -> None:
        draw = torch.Generator().manual_seed(int(train))
        self.pictures = torch.rand(32, 1, 28, 28, generator=draw)
        self.labels = torch.randint(10, (32,), generator=draw).tolist()
        self.transform = transform

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = self.pictures[index]
        return self.transform(picture) if self.transform else picture, self.labels[index]
