"""cross_entropy_forward and cross_entropy_backward_ against torch.nn.functional.cross_entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bmtrain import kernels
from bmtrain.errors import ConfigurationError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 2), (5, 65), (7, 1000), (4, 50257), (2, 131_073)]
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def make_case(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose rows are ``padding`` elements further apart than they are long, and targets with ignored ones."""
    rows, classes = shape
    logits = (torch.randn(rows, classes + padding) * 3).to(device, dtype)[:, :classes]
    target = torch.randint(classes, (rows,))
    target[1::3] = -100
    return logits, target.to(device)


def expected_values(
    logits: torch.Tensor, target: torch.Tensor, row_grad: torch.Tensor, weight: torch.Tensor | None, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(
        wide, target, None if weight is None else weight.double(), reduction="none", label_smoothing=smoothing
    )
    losses.backward(row_grad.double())
    assert wide.grad is not None
    return losses.detach(), wide.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [0, 3])
def test_loss_and_gradient(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], padding: int) -> None:
    check_case(shape, dtype, device, padding, None, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_weights_and_smoothing(device: torch.device, dtype: torch.dtype, weighted: bool, smoothing: float) -> None:
    weight = (torch.rand(1003) + 0.5).to(device) if weighted else None
    check_case((6, 1003), dtype, device, 0, weight, smoothing)


def check_case(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    padding: int,
    weight: torch.Tensor | None,
    smoothing: float,
) -> None:
    logits, target = make_case(shape, dtype, device, padding)
    row_grad = torch.rand(shape[0]).to(device)
    expected_losses, expected_grad = expected_values(logits, target, row_grad, weight, smoothing)
    options = {"weight": weight, "label_smoothing": smoothing}
    losses, statistics = kernels.cross_entropy_forward(logits, target, **options)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.double().sum(dim=1), logits.double().logsumexp(dim=1), rtol=1e-6, atol=1e-6)
    kernels.cross_entropy_backward_(logits, target, statistics, row_grad, **options)
    torch.testing.assert_close(logits.double(), expected_grad, rtol=3 * ROUNDING[dtype], atol=1e-6)


def test_padding_between_rows_is_not_touched(device: torch.device) -> None:
    whole = torch.full((4, 40), 7.0, device=device)
    logits = whole[:, :33]
    target = torch.zeros(4, dtype=torch.int64, device=device)
    _, statistics = kernels.cross_entropy_forward(logits, target)
    kernels.cross_entropy_backward_(logits, target, statistics, torch.ones(4, device=device))
    assert torch.equal(whole[:, 33:], torch.full((4, 7), 7.0, device=device))
    assert not torch.equal(logits, torch.full((4, 33), 7.0, device=device))


def test_masked_and_extreme_logits(device: torch.device) -> None:
    logits = torch.randn(3, 100).to(device)
    logits[0, 10:60] = -torch.inf
    logits[1] = 3e4 * torch.sign(logits[1])
    logits[2, :] = -1e30
    target = torch.tensor([5, 2, 7], device=device)
    expected_losses, expected_grad = expected_values(logits, target, torch.ones(3, device=device), None, 0.0)
    losses, statistics = kernels.cross_entropy_forward(logits, target)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    kernels.cross_entropy_backward_(logits, target, statistics, torch.ones(3, device=device))
    torch.testing.assert_close(logits[:2].double(), expected_grad[:2], rtol=1e-5, atol=1e-6)


def test_nan_in_a_row_shows_in_its_loss_alone(device: torch.device) -> None:
    logits = torch.randn(2, 300).to(device)
    logits[0, 299] = torch.nan
    losses, _ = kernels.cross_entropy_forward(logits, torch.zeros(2, dtype=torch.int64, device=device))
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.gpu
def test_target_outside_the_classes_gives_nan() -> None:
    logits = torch.randn(3, 10, device="cuda")
    losses, _ = kernels.cross_entropy_forward(logits, torch.tensor([0, 10, -1], device="cuda"))
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    rows, classes = 33_000, 65_536
    if torch.cuda.mem_get_info()[0] < 3 * rows * classes * 2:
        pytest.skip("needs 13 GB of GPU memory")
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[-1, 5] = 20.0
    target = torch.full((rows,), 5, device="cuda")
    losses, statistics = kernels.cross_entropy_forward(logits, target)
    assert float(losses[0]) == pytest.approx(11.0904, rel=1e-4)
    assert float(losses[-1]) == pytest.approx(1.3507e-4, rel=1e-2)
    kernels.cross_entropy_backward_(logits, target, statistics, torch.ones(rows, device="cuda"))
    assert float(logits[-2, 5]) == -1.0 and float(logits[-1, 6]) == pytest.approx(2.06e-9, rel=1e-2)


def test_cpu_reference_equals_torch_operations() -> None:
    reference = pytest.importorskip("bmtrain._C").reference
    torch.manual_seed(0)
    logits, target = make_case((6, 77), torch.float32, torch.device("cpu"), padding=2)
    weight, row_grad = torch.rand(77) + 0.5, torch.rand(6)
    total = weight.sum()
    expected_losses, expected_grad = expected_values(logits, target, row_grad, weight, 0.2)
    entropy = reference.CrossEntropy(
        classes=77, ignore_index=-100, smoothing=0.2, weight=weight.data_ptr(), weight_total=total.data_ptr()
    )
    losses, statistics = torch.empty(6), torch.empty(6, 2)
    where = {
        "logits": logits.data_ptr(), "stride": logits.stride(0), "targets": target.data_ptr(), "rows": 6,
        "entropy": entropy, "statistics": statistics.data_ptr(),
    }  # fmt: skip
    reference.cross_entropy_forward(**where, losses=losses.data_ptr())
    reference.cross_entropy_backward(**where, row_gradients=row_grad.data_ptr())
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected_grad, rtol=1e-5, atol=1e-6)


def test_logits_that_do_not_fit_are_refused(device: torch.device) -> None:
    logits, target = torch.zeros(4, 6, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ConfigurationError, match="last dimension is contiguous"):
        kernels.cross_entropy_forward(logits[:, ::2], target)
    with pytest.raises(ConfigurationError, match="int64 targets"):
        kernels.cross_entropy_forward(logits, target.int())
    with pytest.raises(ConfigurationError, match="targets"):
        kernels.cross_entropy_forward(logits, target[:3])
    with pytest.raises(ConfigurationError, match=r"target\.to\(logits\.device\)"):
        kernels.cross_entropy_forward(logits, torch.zeros(4, dtype=torch.int64, device="meta"))
