"""Losses against torch's own, value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

import bmtrain as bmt
from bmtrain.comm import LocalCommunicator
from bmtrain.errors import ConfigurationError
from bmtrain.loss import FusedCrossEntropy, _function, linear_cross_entropy, vocab_parallel_cross_entropy
from bmtrain.loss.cross_entropy import fused_cross_entropy

TOKENS, CLASSES, WIDTH = 37, 50, 24
CASES: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": 3},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "ignore_index": 3, "reduction": "sum"},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.1, "ignore_index": 3},
]


def make_logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(TOKENS, CLASSES, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(CLASSES, (TOKENS,), generator=generator).index_fill(0, torch.tensor([1, 8]), 3)


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    return case | ({"weight": torch.linspace(0.1, 2.0, CLASSES)} if "weight" in case else {})


def value_and_grad(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss.square().sum(), inputs))


def assert_all_close(actual: Any, expected: Any, **tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fused_cross_entropy_is_torchs_in_float32(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits, target = make_logits(dtype)
    wide = logits if dtype == torch.float64 else logits.float()
    options = options_of(case)
    expected = value_and_grad(F.cross_entropy(wide, target, **_as_functional(options, wide)), logits)
    actual = value_and_grad(FusedCrossEntropy(**options)(logits, target), logits)
    assert actual[0].dtype == wide.dtype and actual[1].dtype == dtype
    assert_all_close(actual, expected, rtol=1e-6, atol=1e-6)


def _as_functional(options: dict[str, Any], like: torch.Tensor) -> dict[str, Any]:
    weight = options.get("weight")
    return options | ({} if weight is None else {"weight": weight.to(like.dtype)})


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_fused_path_is_torchs(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits, target = make_logits(dtype)
    options = options_of(case)
    expected = value_and_grad(F.cross_entropy(logits.float(), target, **options), logits)
    arguments = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0} | options
    before = logits.detach().clone()
    actual = value_and_grad(fused_cross_entropy(logits, target, **arguments), logits)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_all_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("fused", [False, True])
def test_logits_of_any_strides(fused: bool) -> None:
    logits, target = make_logits(torch.bfloat16)
    by_columns = logits.detach().t().contiguous().t().requires_grad_()
    inside = torch.zeros(TOKENS, 2 * CLASSES, dtype=torch.bfloat16)
    inside[:, ::2] = logits.detach()
    strided = inside.requires_grad_()[:, ::2]
    assert not by_columns.is_contiguous() and not strided.is_contiguous()
    rest = (None, -100, "mean", 0.0)
    call: Any = (
        (lambda x: fused_cross_entropy(x, target, *rest)) if fused else (lambda x: FusedCrossEntropy()(x, target))
    )
    expected = F.cross_entropy(logits.float(), target)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    for view in (by_columns, strided):
        loss = call(view)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, view)[0], expected_grad, rtol=1e-2, atol=1e-4)


def test_other_shapes_and_targets() -> None:
    logits = torch.randn(2, CLASSES, 7)
    target = torch.randint(CLASSES, (2, 7))
    torch.testing.assert_close(FusedCrossEntropy()(logits, target), F.cross_entropy(logits, target))
    flat, classes = torch.randn(5, CLASSES), torch.randint(CLASSES, (5,))
    torch.testing.assert_close(FusedCrossEntropy()(flat, classes.int()), F.cross_entropy(flat, classes))
    soft = torch.softmax(torch.randn(5, CLASSES), dim=1)
    torch.testing.assert_close(FusedCrossEntropy()(flat, soft), F.cross_entropy(flat, soft))


def test_a_loss_without_model_keeps_checkpoints_clean() -> None:
    assert FusedCrossEntropy(weight=torch.ones(3)).state_dict() == {}


# ---- linear and cross entropy together -----------------------------------------------------------------------------


def make_linear(dtype: torch.dtype, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(3, TOKENS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(CLASSES, WIDTH, generator=generator).to(dtype)
    inputs = [hidden, weight] + ([torch.randn(CLASSES, generator=generator).to(dtype)] if bias else [])
    targets = torch.randint(CLASSES, (3, TOKENS), generator=generator)
    targets[0, ::5] = -100
    return [x.requires_grad_() for x in inputs], targets


@pytest.mark.parametrize("chunk_size", [1, 10, 37, 1024])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_is_the_unchunked_one(chunk_size: int, bias: bool, reduction: str) -> None:
    inputs, targets = make_linear(torch.float64, bias)
    logits = F.linear(*inputs).flatten(0, 1)
    expected = value_and_grad(F.cross_entropy(logits, targets.flatten(), reduction=reduction), *inputs)
    loss = linear_cross_entropy(inputs[0], inputs[1], targets, *inputs[2:], reduction=reduction, chunk_size=chunk_size)
    assert_all_close(value_and_grad(loss, *inputs), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_linear_cross_entropy_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    inputs, targets = make_linear(dtype, True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = value_and_grad(F.cross_entropy(F.linear(*exact).flatten(0, 1), targets.flatten()), *exact)
    loss = linear_cross_entropy(inputs[0], inputs[1], targets, inputs[2], chunk_size=16)
    actual = value_and_grad(loss, *inputs)
    assert actual[0].dtype == torch.float32 and [x.dtype for x in actual[1:]] == [dtype] * 3
    for one, other in zip(actual, expected, strict=True):
        assert float((one.double() - other).abs().max()) <= tolerance * float(other.abs().max())


def test_small_float16_gradients_survive() -> None:
    # A token's share of the mean is so small here that float16 holds one or two digits of it; the scaled loss must not
    # have lost the others before it is scaled.
    tokens, scale = 20_000, 65536.0
    hidden = torch.randn(tokens, 4).half().requires_grad_()
    weight = (0.01 * torch.randn(8, 4)).half().requires_grad_()
    targets = torch.randint(8, (tokens,))
    actual = value_and_grad(linear_cross_entropy(hidden, weight, targets) * scale / scale**0.5, hidden)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = value_and_grad(F.cross_entropy(F.linear(*exact), targets) * scale / scale**0.5, exact[0])
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=5e-3, atol=1e-3 * float(expected[1].abs().max()))


def test_linear_cross_entropy_under_autocast() -> None:
    inputs, targets = make_linear(torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(*inputs)
        expected = value_and_grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), *inputs)
        actual = value_and_grad(linear_cross_entropy(inputs[0], inputs[1], targets, inputs[2], chunk_size=16), *inputs)
    assert [x.dtype for x in actual] == [torch.float32] * 4
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-2 * float(other.abs().max())


def fill_tied(model: Any) -> None:
    model.embedding = torch.nn.Embedding(CLASSES, WIDTH)
    model.norm = torch.nn.LayerNorm(WIDTH)


def tied_loss(model: Any, tokens: torch.Tensor, chunk_size: int | None) -> torch.Tensor:
    hidden = model.norm(model.embedding(tokens[:-1]))
    if chunk_size is None:
        return F.cross_entropy(F.linear(hidden, model.embedding.weight), tokens[1:])
    return linear_cross_entropy(hidden, model.embedding.weight, tokens[1:], chunk_size=chunk_size)


class Tied(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        fill_tied(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tied_loss(self, tokens, 5)


def train_tied() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    torch.manual_seed(0)
    model = Tied()
    loss = model(torch.arange(40).roll(3 * bmt.rank()) % CLASSES)
    bmt.optim.OptimManager(loss_scale=None).backward(loss)
    return bmt.sum_loss(loss.detach()), [bmt.gather_grad(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("world", [1, 2])
def test_linear_cross_entropy_with_a_sharded_tied_weight(world: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    fill_tied(model)
    loss = torch.stack(
        [tied_loss(model, torch.arange(40).roll(3 * rank) % CLASSES, None) for rank in range(world)]
    ).mean()
    expected = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    for average, grads in run_ranks(world, train_tied):
        assert_all_close([average, *grads], expected)


def test_only_needed_gradients_and_none_without_grad_mode() -> None:
    inputs, targets = make_linear(torch.float32, False)
    hidden, weight = inputs[0].detach(), inputs[1]
    loss = linear_cross_entropy(hidden, weight, targets)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.shape == weight.shape
    with torch.no_grad():
        plain = linear_cross_entropy(inputs[0], weight, targets)
    assert not plain.requires_grad and torch.equal(plain, loss.detach())


def test_all_tokens_ignored() -> None:
    inputs, targets = make_linear(torch.float32, False)
    nothing = torch.full_like(targets, -100)
    loss = linear_cross_entropy(inputs[0], inputs[1], nothing)
    assert torch.isnan(loss)
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(loss, inputs))


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    linear = F.linear

    def watched(*args: torch.Tensor | None) -> torch.Tensor:
        nonlocal largest
        result = linear(*args)
        largest = max(largest, result.numel())
        return result

    inputs, targets = make_linear(torch.float32, False)
    monkeypatch.setattr(F, "linear", watched)
    linear_cross_entropy(inputs[0], inputs[1], targets, chunk_size=8).backward()
    assert 0 < largest <= 8 * CLASSES


def test_misfits_are_named() -> None:
    hidden, weight, targets = torch.zeros(4, 6), torch.zeros(9, 6), torch.zeros(4, dtype=torch.long)
    for arguments, message in [
        ((hidden, weight.t(), targets), r"\(6, 9\)"),
        ((hidden, weight, targets[:3]), r"\(3,\)"),
        ((hidden, weight, targets, torch.zeros(2)), "9 classes"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            linear_cross_entropy(*arguments)
    with pytest.raises(ConfigurationError, match="'none'"):
        linear_cross_entropy(hidden, weight, targets, reduction="none")
    with pytest.raises(ConfigurationError, match="chunk_size"):
        linear_cross_entropy(hidden, weight, targets, chunk_size=0)
    with pytest.raises(IndexError):
        FusedCrossEntropy()(torch.zeros(4, 6), targets + 6)


# ---- classes split over ranks -------------------------------------------------------------------------------------


def split_by_class(ranks: int, label_smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    from bmtrain.context import context

    logits, target = make_logits(torch.float32)
    mine = logits.detach().chunk(ranks, dim=1)[bmt.rank()].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(mine, target, context().world, 3, label_smoothing)
    losses.square().sum().backward()
    assert mine.grad is not None
    return losses.detach(), mine.grad


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_vocab_parallel_is_the_whole_one(label_smoothing: float) -> None:
    logits, target = make_logits(torch.float32)
    whole = F.cross_entropy(logits, target, ignore_index=3, reduction="none", label_smoothing=label_smoothing)
    expected = value_and_grad(whole, logits)
    results = run_ranks(2, split_by_class, 2, label_smoothing)
    assert_all_close([results[0][0], torch.cat([grad for _, grad in results], dim=1)], expected)
    assert torch.equal(results[0][0], results[1][0])
    alone = vocab_parallel_cross_entropy(logits, target, LocalCommunicator(), 3, label_smoothing)
    assert_all_close(value_and_grad(alone, logits), expected)


# ---- the published low-level functions ----------------------------------------------------------------------------


def test_low_level_functions() -> None:
    logits, target = make_logits(torch.float16)
    x, rows = logits.detach(), target.int()
    softmax, output = torch.empty_like(x), torch.empty(TOKENS)
    _function.cross_entropy_forward(TOKENS, CLASSES, x, rows, softmax, output, 3)
    torch.testing.assert_close(output, F.cross_entropy(x.float(), target, ignore_index=3, reduction="none"))
    torch.testing.assert_close(softmax, x.float().softmax(1).half())
    grad_output = torch.linspace(0, 1, TOKENS)
    _function.cross_entropy_backward_inplace(TOKENS, CLASSES, grad_output, rows, softmax, 3)
    losses = F.cross_entropy(logits.float(), target, ignore_index=3, reduction="none")
    (expected,) = torch.autograd.grad(losses, logits, grad_output)
    torch.testing.assert_close(softmax, expected, rtol=1e-2, atol=1e-3)

    highest = x.float().amax(1)
    sums = _function.fused_sumexp(x, highest)
    torch.testing.assert_close(sums, (x.float() - highest[:, None]).exp().sum(1))
    y = x.clone()
    _function.fused_softmax_inplace(y, highest, sums)
    torch.testing.assert_close(y, x.float().softmax(1).half())


@pytest.mark.parametrize(("value", "expected"), [(1.0, 0), (float("inf"), 1), (float("-inf"), 1), (float("nan"), 1)])
def test_has_inf_nan(value: float, expected: int) -> None:
    grad = torch.zeros(1000, dtype=torch.float16)
    grad[777] = value
    out = torch.zeros(1, dtype=torch.uint8)[0]
    _function.has_inf_nan(grad, out)
    assert out.item() == expected
    _function.has_inf_nan(torch.zeros(3), out)
    assert out.item() == expected


# ---- on a GPU ------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_cross_entropy_on_a_gpu(case: dict[str, Any], dtype: torch.dtype) -> None:
    options = {name: value.cuda() if name == "weight" else value for name, value in options_of(case).items()}
    logits, target = (x.detach().cuda() for x in make_logits(dtype))
    expected_input, actual_input = logits.clone().requires_grad_(), logits.clone().t().contiguous().t().requires_grad_()
    expected = value_and_grad(F.cross_entropy(expected_input.float(), target, **options), expected_input)
    actual = value_and_grad(FusedCrossEntropy(**options).cuda()(actual_input, target), actual_input)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_all_close(actual, expected, rtol=tolerance, atol=tolerance)


@on_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_linear_cross_entropy_on_a_gpu(dtype: torch.dtype, tolerance: float, autocast: bool) -> None:
    inputs, targets = make_linear(dtype, True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = value_and_grad(F.cross_entropy(F.linear(*exact).flatten(0, 1), targets.flatten()), *exact)
    on_device = [x.detach().cuda().requires_grad_() for x in inputs]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(on_device[0], on_device[1], targets.cuda(), on_device[2], chunk_size=16)
    for one, other in zip(value_and_grad(loss, *on_device), expected, strict=True):
        allowed = (2e-2 if autocast else tolerance) * float(other.abs().max())
        assert float((one.cpu().double() - other).abs().max()) <= allowed
