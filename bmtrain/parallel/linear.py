"""An ordinary linear layer under the published name."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..shard import DistributedModule, DistributedParameter, ParameterInitializer


class OpLinear:
    """``F.linear`` under the published name."""

    @staticmethod
    def apply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``input`` (..., I), ``weight`` (O, I), ``bias`` (O,): (..., O)."""
        return F.linear(input, weight, bias)


class Linear(DistributedModule):
    """``y = x W^T + b``.

    ``bmt.init_parameters(model)`` gives the weight Xavier's normal distribution and the bias zeros; until then both
    hold arbitrary numbers.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is a ``b``.
        dtype: of the parameters; torch's default if None.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = xavier_weight(out_features, in_features, dtype)
        self.register_parameter("bias", zero_bias(out_features, dtype) if bias else None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` (..., in_features) to (..., out_features)."""
        return OpLinear.apply(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def xavier_weight(
    rows: int, columns: int, dtype: torch.dtype | None, split_dim: int | None = None
) -> DistributedParameter:
    """A weight (rows, columns) that ``init_parameters`` fills; a slice along ``split_dim`` of a larger one."""
    return _made(ParameterInitializer(torch.nn.init.xavier_normal_), torch.empty(rows, columns, dtype=dtype), split_dim)


def zero_bias(size: int, dtype: torch.dtype | None, split_dim: int | None = None) -> DistributedParameter:
    """A bias (size,) that ``init_parameters`` sets to zero; a slice along ``split_dim`` of a larger one."""
    return _made(ParameterInitializer(torch.nn.init.zeros_), torch.empty(size, dtype=dtype), split_dim)


def _made(initializer: ParameterInitializer, data: torch.Tensor, split_dim: int | None) -> DistributedParameter:
    if split_dim is None:
        return DistributedParameter(data, init_method=initializer)
    return DistributedParameter(data, init_method=initializer, tp_mode=True, tp_split_dim=split_dim)
