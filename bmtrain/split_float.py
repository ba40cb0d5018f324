"""fp32 numbers kept as their bf16 rounding and the 16 bits that it leaves out.

A parameter that computes in bf16 and is updated in fp32 so takes 4 bytes for both, not 6.  Adding the remainder to the
bits of the rounded number gives the number back.  One remainder does not fit into 16 bits: that of a number just half
way between two bf16 numbers whose even neighbour is the smaller.  It is cut by 1, so that number comes back one fp32
step nearer to its rounding.
"""

from __future__ import annotations

import torch


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round fp32 ``values`` to bfloat16 (to nearest, ties to even); also returns the remainders, int16."""
    rounded = values.bfloat16()
    difference = values.view(torch.int32) - rounded.float().view(torch.int32)
    return rounded, difference.clamp_(max=2**15 - 1).to(torch.int16)


def join(rounded: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers that ``split`` was given."""
    return (rounded.float().view(torch.int32) + remainder).view(torch.float32)
