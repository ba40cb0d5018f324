"""A linear map whose weight is split over ranks.

Two collectives come in pairs, one the other's gradient: gathering along a dimension (all-gather forward, reduce-scatter
backward) and its reverse, for activations that are split; and "copy" (nothing forward, all-reduce backward) with its
reverse "reduce", for activations that are the same on all ranks.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..autograd import runs_as_written
from ..comm import Communicator
from ..context import context
from ..errors import ConfigurationError
from .group import tensor_group

ReduceType = Literal["all_reduce", "reduce_scatter"]


@runs_as_written
def parallel_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    comm: Communicator,
    *,
    gather_input: bool = False,
    gather_output: bool = False,
    split_input: bool = False,
    reduce_type: ReduceType | None = None,
) -> torch.Tensor:
    """``F.linear`` with this rank's slice of a weight.

    Column parallel (``reduce_type`` None): ``weight`` (O / n, I) and ``bias`` (O / n,) give this rank's output
    features, all of them after ``gather_output``.  ``gather_input`` first joins the ranks' parts of dimension 0;
    otherwise the input is the same on all ranks.

    Row parallel: ``weight`` (O, I / n) gives a summand of the output; "all_reduce" adds the summands up on every rank,
    "reduce_scatter" gives each rank its part of dimension 0 of the sum.  ``bias`` (O,) is added once.  The input is
    this rank's slice of the features, or with ``split_input`` all of them, the same on all ranks.
    """
    if reduce_type not in (None, "all_reduce", "reduce_scatter"):
        raise ConfigurationError(f"reduce_type must be None, 'all_reduce' or 'reduce_scatter', not {reduce_type!r}.")
    if split_input:
        input = apply_over(Copy, input, comm).chunk(comm.world_size, dim=-1)[comm.rank]
    elif gather_input:
        input = apply_over(_Gather, input, comm)
    elif reduce_type is None:
        input = apply_over(Copy, input, comm)
    output = F.linear(input, weight, bias if reduce_type is None else None)
    if reduce_type == "all_reduce":
        output = apply_over(ReduceOutput, output, comm)
    elif reduce_type == "reduce_scatter":
        output = apply_over(_Scatter, output, comm)
    if reduce_type is not None and bias is not None:
        # Every rank's copy sees the whole gradient after all_reduce, but only its own rows' after reduce_scatter.
        output = output + (apply_over(Copy, bias, comm) if reduce_type == "reduce_scatter" else bias)
    if gather_output:
        output = apply_over(_GatherFeatures, output, comm)
    split = not gather_output and reduce_type != "all_reduce"
    return drawn_for(output, comm, split, joins=reduce_type is not None and not split_input)


class OpParallelLinear:
    """``parallel_linear`` over the tensor-parallel group, with the published name and positional arguments."""

    @staticmethod
    @runs_as_written
    def apply(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gather_input: bool = False,
        gather_output: bool = False,
        split_input: bool = False,
        reduce_type: ReduceType | None = None,
        async_chunks: int = 2,
    ) -> torch.Tensor:
        """See ``parallel_linear``.  ``async_chunks`` has no effect on the result and none yet on the speed."""
        return parallel_linear(
            input,
            weight,
            bias,
            tensor_group(),
            gather_input=gather_input,
            gather_output=gather_output,
            split_input=split_input,
            reduce_type=reduce_type,
        )


@runs_as_written
def apply_over(function: type[torch.autograd.Function], x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    if comm.world_size == 1:
        return x
    result: torch.Tensor = function.apply(x, comm)  # type: ignore[no-untyped-call]
    return result


@runs_as_written
def drawn_for(x: torch.Tensor, comm: Communicator, split: bool, joins: bool = False) -> torch.Tensor:
    """``x``; random numbers that are drawn next are for what is split over the ranks, as it is, or for what is not.

    ``joins``: it was made of what was split.
    """
    random = context().split_random
    if comm.world_size > 1 and random is not None:
        random.follow(x, split, joins)
    return x


@runs_as_written
def _summed(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    comm.all_reduce(result, "sum")
    return result


@runs_as_written
def _gathered(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    whole = x.new_empty((comm.world_size * x.shape[0], *x.shape[1:]))
    comm.all_gather(x.contiguous(), whole)
    return whole


@runs_as_written
def _scattered(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    if x.shape[0] % comm.world_size:
        raise ConfigurationError(
            f"Dimension 0 of {tuple(x.shape)} cannot be split evenly over {comm.world_size} ranks."
        )
    part = x.new_empty((x.shape[0] // comm.world_size, *x.shape[1:]))
    comm.reduce_scatter(x.contiguous(), part, "sum")
    return part


class Copy(torch.autograd.Function):
    """Nothing forward, all-reduce backward."""

    @staticmethod
    @runs_as_written
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(grad, ctx.comm), None


class ReduceOutput(torch.autograd.Function):
    @staticmethod
    @runs_as_written
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        return _summed(x, comm)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    @runs_as_written
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        ctx.comm = comm
        return _gathered(x, comm)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scattered(grad, ctx.comm), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    @runs_as_written
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        ctx.comm = comm
        return _scattered(x, comm)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gathered(grad, ctx.comm), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    @runs_as_written
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        ctx.comm = comm
        parts = _gathered(x.unsqueeze(0), comm)
        return torch.cat(parts.unbind(0), dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # The result is the same on all ranks and so is its gradient.
        return grad.chunk(ctx.comm.world_size, dim=-1)[ctx.comm.rank], None
