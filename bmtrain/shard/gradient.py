"""This rank's part of a reduced gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import kernels

if TYPE_CHECKING:
    from .flat import FlatShard


class ShardGradient:
    """The gradient of one flat shard: (S,) elements.

    One reduction of low-precision gradients stays as it came: summing made it exact to that precision, and a wider
    copy would only cost memory.  From the second on (gradient accumulation) the sum is kept in fp32.

    Attributes:
        present: whether anything was reduced since ``clear``; the same on all ranks.
        factor: a pending multiplier, 0-d on the device, that whoever reads ``values`` has to apply.
    """

    def __init__(self, flat: FlatShard) -> None:
        self._flat = flat
        self.present = False
        self.factor: torch.Tensor | None = None
        self._came: torch.Tensor | None = None  # in the dtype that travels
        self._sum: torch.Tensor | None = None  # fp32
        self._wide = False  # whether the gradient is in _sum

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which gradients are summed."""
        return torch.float32 if self._flat.dtype in (torch.float16, torch.bfloat16) else self._flat.dtype

    def add(self, whole: torch.Tensor) -> None:
        """Reduce ``whole`` over ranks and add this rank's part; on the current stream.  Collective."""
        reduce = self._flat.unit.ctx.reduce
        if not self.present:
            self._came = self._came if self._came is not None else self._new(self._flat.dtype)
            reduce.reduce_scatter(whole, self._came)
            self.present, self._wide, self.factor = True, False, None
            return
        if self._flat.dtype == self.dtype:
            part = self._flat.unit.pools.acquire_part(self._flat)
            total, target = self._apply_factor(), part.tensor
            reduce.reduce_scatter(whole, target)
            total.add_(target)
            self._flat.unit.pools.parts.give_back(part, self._flat.unit.ctx.device.reduce_stream)
            return
        total = self._widen()
        assert self._came is not None
        reduce.reduce_scatter(whole, self._came)
        kernels.accumulate_(total, self._came, first=False)

    def values(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient, in whatever precision it is kept, and the factor to apply.  For the current stream."""
        assert self.present
        self._flat.unit.reduced.wait(self._flat.unit.ctx.device.current_stream())
        tensor = self._sum if self._wide else self._came
        assert tensor is not None
        return tensor, self.factor

    def settled(self) -> torch.Tensor:
        """The gradient in the dtype of sums, with every factor applied.  For the current stream."""
        self.values()
        return self._apply_factor() if self._flat.dtype == self.dtype else self._widen()

    def scale_(self, factor: torch.Tensor | float) -> None:
        """Multiply by ``factor``, when it is next read."""
        factor = torch.as_tensor(factor, dtype=torch.float32, device=self._flat.shard.device)
        self.factor = factor if self.factor is None else self.factor * factor

    def zeros(self) -> torch.Tensor:
        """Become a gradient of zeros, to be written."""
        if not self.present:
            self._came = self._came if self._came is not None else self._new(self._flat.dtype)
            self._came.zero_()
            self.present, self._wide, self.factor = True, False, None
        return self.settled()

    def clear(self) -> None:
        """Forget the gradient; its memory stays for the next one."""
        self.present, self.factor = False, None

    def _new(self, dtype: torch.dtype) -> torch.Tensor:
        ctx = self._flat.unit.ctx
        return ctx.reduce.alloc(self._flat.layout.shard_numel, dtype, ctx.device.torch_device)

    def _apply_factor(self) -> torch.Tensor:
        assert self._came is not None
        if self.factor is not None:
            self._came.mul_(self.factor)
            self.factor = None
        return self._came

    def _widen(self) -> torch.Tensor:
        if self._sum is None:
            self._sum = torch.empty(self._flat.layout.shard_numel, dtype=self.dtype, device=self._flat.shard.device)
        if not self._wide:
            assert self._came is not None
            self._sum.copy_(self._came)
            self._wide = True
        if self.factor is not None:
            self._sum.mul_(self.factor)
            self.factor = None
        return self._sum
