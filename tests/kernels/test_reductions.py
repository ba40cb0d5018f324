"""Norms, overflow checks and accumulation."""

from __future__ import annotations

import math

import pytest
import torch

from bmtrain import kernels
from bmtrain.errors import ConfigurationError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_sum_of_squares_is_exact_to_double_precision(device: torch.device, dtype: torch.dtype, offset: int) -> None:
    counts = [0, 1, 7, 8193, 1_000_003]
    tensors = [torch.randn(count + offset, device=device).to(dtype)[offset:] for count in counts]
    expected = math.fsum(float(t.double().square().sum()) for t in tensors)
    total = kernels.sum_of_squares(tensors)
    assert total.dtype == torch.float64 and total.dim() == 0 and total.device == tensors[0].device
    assert float(total) == pytest.approx(expected, rel=1e-13)
    assert torch.equal(total, kernels.sum_of_squares(tensors))


def test_sum_of_squares_does_not_overflow_or_lose_small_elements(device: torch.device) -> None:
    huge = torch.full((1000,), 3e38, device=device)
    assert float(kernels.sum_of_squares([huge])) == pytest.approx(1000 * float(huge[0].double()) ** 2)
    ones_beside_one_large = torch.ones(1 << 20, device=device)
    ones_beside_one_large[17] = 4096.0
    assert float(kernels.sum_of_squares([ones_beside_one_large])) == (1 << 20) - 1 + 4096.0**2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 4095, 5000])
def test_has_inf_or_nan_finds_one_anywhere(device: torch.device, dtype: torch.dtype, bad: float, place: int) -> None:
    largest = torch.full((905,), torch.finfo(dtype).max, dtype=dtype, device=device)
    tensors = [torch.randn(4096, device=device).to(dtype), largest]
    assert not kernels.has_inf_or_nan(tensors)
    (tensors[0] if place < 4096 else tensors[1])[place % 4096] = bad
    assert kernels.has_inf_or_nan(tensors)


def test_nothing_has_norm_zero() -> None:
    assert float(kernels.sum_of_squares([])) == 0.0
    assert not kernels.has_inf_or_nan([])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, offset", [(1, 0), (5, 0), (4096, 0), (100_003, 0), (100_003, 1)])
def test_accumulate_adds_in_float32(device: torch.device, dtype: torch.dtype, count: int, offset: int) -> None:
    sources = [torch.randn(count + offset, device=device).to(dtype)[offset:] for _ in range(3)]
    total = torch.full((count + offset,), math.nan, device=device)[offset:]
    expected = sources[0].float()
    kernels.accumulate_(total, sources[0], first=True)
    assert torch.equal(total, expected)
    for source in sources[1:]:
        kernels.accumulate_(total, source, first=False)
        expected = expected + source.float()
    assert torch.equal(total, expected)


def test_a_thousand_small_gradients_are_not_lost(device: torch.device) -> None:
    source = torch.full((64,), 1e-3, dtype=torch.bfloat16, device=device)
    total = torch.zeros(64, device=device)
    for _ in range(1024):
        kernels.accumulate_(total, source, first=False)
    torch.testing.assert_close(total, source.float() * 1024, rtol=1e-5, atol=0)


def test_sizes_must_agree(device: torch.device) -> None:
    with pytest.raises(ConfigurationError, match="equally many"):
        kernels.accumulate_(torch.zeros(4, device=device), torch.zeros(3, device=device), first=True)
    with pytest.raises(ConfigurationError, match="contiguous"):
        kernels.sum_of_squares([torch.zeros(4, 4, device=device).t()[:2]])


def test_cpu_references_equal_torch_operations() -> None:
    reference = pytest.importorskip("bmtrain._C").reference
    torch.manual_seed(0)
    total, source = torch.randn(1001), torch.randn(1001)
    assert reference.sum_of_squares(data=total.data_ptr(), count=1001) == pytest.approx(
        float(kernels.sum_of_squares([total])), rel=1e-14
    )
    expected = total + source
    where = {"total": total.data_ptr(), "source": source.data_ptr(), "count": 1001}
    reference.accumulate(**where, first=False)
    assert torch.equal(total, expected)
    reference.accumulate(**where, first=True)
    assert torch.equal(total, source)
