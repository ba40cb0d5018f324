"""fp32 numbers as bf16 and a remainder: nothing is lost but the last place of some ties."""

from __future__ import annotations

import torch

from bmtrain.split_float import join, split


def numbers(device: torch.device) -> torch.Tensor:
    """Every upper half of the bits with lower halves around all that rounding depends on: 65536 x 14."""
    upper = torch.arange(2**16, dtype=torch.int64).unsqueeze(1) << 16
    lower = [0, 1, 2, 0x1234, 0x4000, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xABCD, 0xFFFD, 0xFFFE, 0xFFFF]
    bits = (upper + torch.tensor(lower)).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32).to(device)


def test_the_rounding_is_bfloat16s(device: torch.device) -> None:
    values = numbers(device)
    rounded, remainder = split(values)
    assert rounded.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    known = ~values.isnan()
    assert torch.equal(rounded[known], values[known].bfloat16())
    assert rounded[~known].isnan().all()


def test_joining_gives_the_numbers_back(device: torch.device) -> None:
    values = numbers(device)
    back = join(*split(values))
    assert torch.equal(back.isnan(), values.isnan())
    known = ~values.isnan()
    values, back = values[known], back[known]
    lost = (back.view(torch.int32) != values.view(torch.int32)).nonzero().flatten()
    # Ties to the smaller even neighbour, and the last place of those only.
    assert len(lost) == 2 * 255 * 64  # signs, exponents of finite numbers, even mantissas
    assert ((values[lost].view(torch.int32) & 0x1FFFF) == 0x8000).all()
    assert (values[lost].view(torch.int32) - back[lost].view(torch.int32) == 1).all()
    assert torch.equal(back.bfloat16(), values.bfloat16())


def test_splitting_again_changes_nothing(device: torch.device) -> None:
    values = numbers(device)
    rounded, remainder = split(values[~values.isnan()])
    again = split(join(rounded, remainder))
    assert torch.equal(again[0].view(torch.int16), rounded.view(torch.int16)) and torch.equal(again[1], remainder)
