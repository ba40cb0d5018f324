"""Linear layers split over the tensor-parallel group by output or by input features."""

from __future__ import annotations

import torch

from ..autograd import runs_as_written
from ..shard import DistributedModule
from .functional import OpParallelLinear, ReduceType
from .group import slice_of
from .linear import xavier_weight, zero_bias


class ColumnParallelLinear(DistributedModule):
    """A linear layer whose output features are split over the tensor-parallel group.

    Args:
        in_features, out_features: sizes of the whole layer; ``out_features`` must be a multiple of the group's size.
        bias: whether there is one.
        dtype: of the parameters.
        gather_output: give every rank all output features instead of its own.
        gather_input: the input is split along dimension 0 and is joined first; otherwise it is the same on all ranks.
        async_gather_chunks: kept for old scripts; no effect.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        gather_output: bool = False,
        gather_input: bool = True,
        async_gather_chunks: int = 2,
    ) -> None:
        torch.nn.Module.__init__(self)  # what derives from nn.Linear, too, has its parameters from here
        self.in_features = in_features
        self.out_features = out_features
        self.out_features_per_partition = slice_of(out_features, "out_features")
        self.gather_output = gather_output
        self.gather_input = gather_input
        self.async_gather_chunks = async_gather_chunks
        self.weight = xavier_weight(self.out_features_per_partition, in_features, dtype, split_dim=0)
        self.register_parameter("bias", zero_bias(self.out_features_per_partition, dtype, 0) if bias else None)

    @runs_as_written
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` (..., in_features) to (..., out_features), or to this rank's slice of the last dimension."""
        return OpParallelLinear.apply(input, self.weight, self.bias, self.gather_input, self.gather_output)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features_per_partition} of {self.out_features}, "
            f"bias={self.bias is not None}"
        )


class RowParallelLinear(DistributedModule):
    """A linear layer whose input features are split over the tensor-parallel group.

    Args:
        in_features, out_features: sizes of the whole layer; ``in_features`` must be a multiple of the group's size.
        bias: whether there is one.
        dtype: of the parameters.
        split_input: the input holds all features, the same on all ranks; otherwise it is this rank's slice of them.
        all_reduce_output: give every rank the whole output instead of its part of dimension 0.
        async_chunks: kept for old scripts; no effect.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        split_input: bool = False,
        all_reduce_output: bool = False,
        async_chunks: int = 2,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.in_features_per_partition = slice_of(in_features, "in_features")
        self.split_input = split_input
        self.all_reduce_output = all_reduce_output
        self.async_chunks = async_chunks
        self.weight = xavier_weight(out_features, self.in_features_per_partition, dtype, split_dim=1)
        self.register_parameter("bias", zero_bias(out_features, dtype) if bias else None)

    @runs_as_written
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` (..., in_features), or this rank's slice of the last dimension, to (..., out_features)."""
        reduce_type: ReduceType = "all_reduce" if self.all_reduce_output else "reduce_scatter"
        return OpParallelLinear.apply(input, self.weight, self.bias, False, False, self.split_input, reduce_type)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features_per_partition} of {self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
