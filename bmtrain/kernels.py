"""Fused operations on flat tensors: one pass over memory each, in fp32 arithmetic.

CUDA tensors take the compiled kernels (csrc/kernels) when this installation has them; AdamW of states that are kept
beside a GPU takes a compiled loop over the CPU's memory (csrc/cpu).  Everything else takes torch operations that give
the same results in more passes.  Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple, TypedDict

import torch

from .errors import ConfigurationError
from .split_float import join, split

try:
    from . import _C
except ImportError:  # built without a compiler, or not built: torch operations serve
    _extension: ModuleType | None = None
else:
    _extension = _C

_SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # kernels::Scalar in csrc/kernels/api.h
_CHUNK = 1 << 22  # elements of fp64 scratch that a sum on torch operations holds at once


def compiled() -> bool:
    """Whether CUDA tensors take compiled kernels here."""
    return _extension is not None and bool(_extension.with_cuda)


class AdamWRun(NamedTuple):
    """Elements from ``start`` to before ``end`` of flat, contiguous tensors, which AdamW updates together.

    Attributes:
        master, exp_avg, exp_avg_sq: parameters and moments, float32; master is bfloat16 if there is a ``remainder``.
        grad: gradient in float32, float16 or bfloat16, which is not changed.
        out: receives the new parameters in its own dtype (float32, float16, bfloat16); None for nowhere.
        remainder: int16; with it master holds fp32 parameters as ``split_float`` does, and ``out`` is None.
    """

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor
    out: torch.Tensor | None
    remainder: torch.Tensor | None
    start: int
    end: int


def adamw_(
    runs: Sequence[AdamWRun],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    clip: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    threads: int | None = None,
) -> None:
    """One step of AdamW (decoupled decay, torch.optim.AdamW's order of operations), in place; few launches for all.

    Args:
        runs: what to update, each of tensors of one length on one device.
        step: number of this step, from 1.
        grad_scale, clip: gradients are multiplied by them; clip is one float32 element on the same device, or None for
            1.
        skip: one float32 element on the same device; unless it is 0, nothing is changed.
        threads: let so many on a CPU compute with the kernels' arithmetic; None: torch operations on a CPU, which give
            what torch.optim.AdamW gives to the bit.
    """
    numbers = _AdamWNumbers(
        1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, beta1, beta2, eps, grad_scale
    )
    alike: dict[_AdamWKind, list[_AdamWAddresses]] = {}
    for run in runs:
        _check_run(run)
        kind = _AdamWKind(
            run.master.get_device(), run.grad.dtype, torch.float32 if run.out is None else run.out.dtype,
            run.remainder is not None,
        )  # fmt: skip
        if not _fits(run.master, kind.grad, kind.out) and (threads is None or not _fits_cpu(run, kind)):
            _adamw_by_torch(run, numbers, clip, skip)
            continue
        master, exp_avg, exp_avg_sq, grad, out, remainder, start, end = run
        alike.setdefault(kind, []).append(_AdamWAddresses(
            master=_element(master, start), remainder=_element(remainder, start), exp_avg=_element(exp_avg, start),
            exp_avg_sq=_element(exp_avg_sq, start), gradient=_element(grad, start), out=_element(out, start),
            numel=end - start,
        ))  # fmt: skip
    for kind, addresses in alike.items():
        types = {"gradient_type": _SCALARS[kind.grad], "out_type": _SCALARS[kind.out]}
        adamw = _C.reference.AdamW(
            decay=numbers.decay, beta2=beta2, weight1=1 - beta1, weight2=1 - beta2, step_size=numbers.step_size,
            correction2_sqrt=numbers.correction2_sqrt, eps=eps,
        )  # fmt: skip
        if kind.device >= 0:
            _C.kernels.adamw(
                **types, **_queue(kind.device), runs=addresses, is_split=kind.is_split, adamw=adamw, scale=grad_scale,
                clip=_address(clip), skip=_address(skip),
            )  # fmt: skip
        elif skip is None or not skip:
            factor = grad_scale if clip is None else float(clip * grad_scale)
            _C.cpu.adamw(**types, runs=addresses, adamw=adamw, factor=factor, threads=threads or 1)


class _AdamWNumbers(NamedTuple):
    """Those of one step."""

    decay: float
    step_size: float
    correction2_sqrt: float
    beta1: float
    beta2: float
    eps: float
    grad_scale: float


def _adamw_by_torch(
    run: AdamWRun, numbers: _AdamWNumbers, clip: torch.Tensor | None, skip: torch.Tensor | None
) -> None:
    """The same by torch operations."""
    master, exp_avg, exp_avg_sq, grad = (t[run.start : run.end] for t in run[:4])
    out, remainder = (None if t is None else t[run.start : run.end] for t in (run.out, run.remainder))
    values = master if remainder is None else join(master, remainder)
    changes = [t for t in (values, exp_avg, exp_avg_sq, out) if t is not None]
    before = [] if skip is None else [t.clone() for t in changes]
    grad = _scaled(grad, numbers.grad_scale, clip)
    values.mul_(numbers.decay)
    exp_avg.lerp_(grad, 1 - numbers.beta1)
    exp_avg_sq.mul_(numbers.beta2).addcmul_(grad, grad, value=1 - numbers.beta2)
    denominator = (exp_avg_sq.sqrt() / numbers.correction2_sqrt).add_(numbers.eps)
    values.addcdiv_(exp_avg, denominator, value=-numbers.step_size)
    if out is not None:
        out.copy_(values)
    if skip is not None:
        for tensor, old in zip(changes, before, strict=True):
            tensor.copy_(torch.where(skip != 0, old, tensor))
    if remainder is not None:
        for tensor, part in zip((master, remainder), split(values), strict=True):
            tensor.copy_(part)


class _AdamWAddresses(NamedTuple):
    """A run as the kernel and the loop on a CPU take it, in their order."""

    master: int
    remainder: int
    exp_avg: int
    exp_avg_sq: int
    gradient: int
    out: int
    numel: int


class _AdamWKind(NamedTuple):
    """What runs of one launch have in common."""

    device: int
    grad: torch.dtype
    out: torch.dtype
    is_split: bool


def _check_run(run: AdamWRun) -> None:
    _check_flat(*(tensor for tensor in run[:6] if tensor is not None))
    rests = torch.float32 if run.remainder is None else torch.bfloat16
    for name, tensor, dtype in (
        ("master", run.master, rests), ("exp_avg", run.exp_avg, torch.float32),
        ("exp_avg_sq", run.exp_avg_sq, torch.float32),
    ):  # fmt: skip
        if tensor.dtype != dtype:
            raise ConfigurationError(f"adamw_: {name} must be {str(dtype)[6:]}, not {tensor.dtype}.")


def _element(tensor: torch.Tensor | None, index: int) -> int:
    """The address of an element of a flat, contiguous tensor."""
    return 0 if tensor is None else tensor.data_ptr() + index * tensor.element_size()


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements of contiguous floating ``tensors``: a 0-d float64 tensor on their device.

    Summed in float64 and in an order that depends on sizes only.  Squares of float32, float16 and bfloat16 do not
    overflow there: the sum is finite exactly when every element is.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    _check_contiguous(*tensors)
    if not all(_fits(tensors[0], t.dtype) and t.device == tensors[0].device for t in tensors):
        total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
        for tensor in tensors:
            for chunk in tensor.detach().view(-1).split(_CHUNK):  # type: ignore[no-untyped-call]
                total += chunk.double().square().sum()
        return total
    queue = _queue(tensors[0].get_device())
    counts = [_C.kernels.sum_of_squares_partials(t.numel()) for t in tensors]
    partials = torch.empty(sum(counts) + 1, dtype=torch.float64, device=tensors[0].device)
    address = partials.data_ptr()
    for tensor, count in zip(tensors, counts, strict=True):
        _C.kernels.sum_of_squares(
            **queue, data=tensor.data_ptr(), type=_SCALARS[tensor.dtype], count=tensor.numel(), partials=address
        )
        address += count * partials.element_size()
    _C.kernels.sum_partials(**queue, partials=partials.data_ptr(), count=len(partials) - 1, total=address)
    return partials[-1]


def has_inf_or_nan(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether any element is infinite or NaN: a 0-d bool tensor on the tensors' device.

    Of float64, elements from 1e150 on count as infinite.
    """
    return ~torch.isfinite(sum_of_squares(tensors))


def accumulate_(total: torch.Tensor, source: torch.Tensor, first: bool) -> None:
    """``total += source``, or ``total = source`` when ``first``; total is float32, source floating, both flat."""
    _check_flat(total, source)
    if total.dtype == torch.float32 and _fits(total, source.dtype):
        _C.kernels.accumulate(
            **_queue(total.get_device()), total=total.data_ptr(), source=source.data_ptr(), type=_SCALARS[source.dtype],
            count=total.numel(), first=first,
        )  # fmt: skip
    elif first:
        total.copy_(source)
    else:
        total.add_(source)


def cross_entropy_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row of ``logits``, in float32, as F.cross_entropy(reduction="none") defines it.

    Args:
        logits: (N, C), any row stride, neighbouring classes adjacent.
        target: (N,) int64.  On a GPU a target outside [0, C) that is not ``ignore_index`` gives NaN.
        weight: (C,) float32 or None.

    Returns losses (N,), 0 for ignored rows, and what backward needs of each row (N, 2): its maximum, and
    log(sum(exp(row - maximum))).  Both are float32, or float64 for float64 logits on torch operations.
    """
    _check_rows(logits, target)
    if _fits(logits, logits.dtype):
        losses = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
        statistics = torch.empty(len(target), 2, dtype=torch.float32, device=logits.device)
        entropy, _total = _entropy(logits, weight, ignore_index, label_smoothing)
        _C.kernels.cross_entropy_forward(
            **_queue(logits.get_device()), logits=logits.data_ptr(), type=_SCALARS[logits.dtype],
            stride=logits.stride(0), targets=target.data_ptr(), rows=len(target), entropy=entropy,
            losses=losses.data_ptr(), statistics=statistics.data_ptr(),
        )  # fmt: skip
        return losses, statistics
    wide = _wide(logits)
    losses = torch.nn.functional.cross_entropy(
        wide, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    maximum = wide.amax(dim=1)
    return losses, torch.stack([maximum, (wide - maximum.unsqueeze(1)).logsumexp(dim=1)], dim=1)


def cross_entropy_backward_(
    logits: torch.Tensor,
    target: torch.Tensor,
    statistics: torch.Tensor,
    row_grad: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> None:
    """Overwrite ``logits`` by the gradient, given each row loss's gradient ``row_grad`` (N,) in float32.

    The other arguments are forward's, and ``statistics`` (N, 2) is what it returned.
    """
    _check_rows(logits, target)
    _check_flat(row_grad, target)
    _check_contiguous(statistics)
    if _fits(logits, logits.dtype):
        entropy, _total = _entropy(logits, weight, ignore_index, label_smoothing)
        _C.kernels.cross_entropy_backward(
            **_queue(logits.get_device()), logits=logits.data_ptr(), type=_SCALARS[logits.dtype],
            stride=logits.stride(0), targets=target.data_ptr(), rows=len(target), entropy=entropy,
            statistics=statistics.data_ptr(), row_gradients=row_grad.data_ptr(),
        )  # fmt: skip
        return
    counted = target != ignore_index
    index = target.masked_fill(~counted, 0)
    gradient = (_wide(logits) - statistics[:, :1]).sub_(statistics[:, 1:]).exp_()
    wanted = gradient.new_ones(len(target)) if weight is None else weight[index]
    by_class = torch.ones_like(gradient[0]) if weight is None else weight
    spread = label_smoothing / logits.shape[1]
    uniform = gradient * by_class.sum() - by_class if label_smoothing > 0 else None
    gradient.scatter_add_(1, index.unsqueeze(1), gradient.new_full((len(target), 1), -1.0))
    gradient.mul_((wanted * (1 - label_smoothing)).unsqueeze(1))
    if uniform is not None:
        gradient.add_(uniform, alpha=spread)
    gradient.mul_(row_grad.unsqueeze(1)).masked_fill_(~counted.unsqueeze(1), 0.0)
    logits.copy_(gradient)


def _fits(tensor: torch.Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the compiled kernels can take these dtypes on the tensor's device."""
    return tensor.is_cuda and _built_for(tensor.get_device()) and all(dtype in _SCALARS for dtype in dtypes)


def _fits_cpu(run: AdamWRun, kind: _AdamWKind) -> bool:
    """Whether the compiled loop over host memory can take it."""
    return (
        _extension is not None
        and run.remainder is None
        and all(tensor is None or tensor.device.type == "cpu" for tensor in run[:5])
        and kind.grad in _SCALARS
        and kind.out in _SCALARS
    )


@lru_cache
def _built_for(device: int) -> bool:
    return compiled() and torch.cuda.get_device_capability(device) >= (8, 0)  # the oldest that setup.py builds for


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach() if logits.dtype == torch.float64 else logits.detach().float()


class _Queue(TypedDict):
    """A device's index and the handle of its current stream: where a kernel is to run."""

    device: int
    stream: int


def _queue(device: int) -> _Queue:
    stream = torch._C._cuda_getCurrentRawStream(device)  # a stream object would cost a launch's time
    return {"device": device, "stream": stream}


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scaled(grad: torch.Tensor, scale: float, clip: torch.Tensor | None) -> torch.Tensor:
    grad = grad.float()
    if clip is not None:
        return grad * (clip.float() * scale)
    return grad * scale if scale != 1.0 else grad


def _entropy(
    logits: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, smoothing: float
) -> tuple[_C._CrossEntropy, torch.Tensor | None]:
    """The kernels' description of the loss, and a tensor to keep until they are queued."""
    if weight is not None and weight.device != logits.device:
        raise ConfigurationError(f"Cross entropy has class weights on {weight.device}, logits on {logits.device}.")
    if weight is not None and (weight.dtype != torch.float32 or not weight.is_contiguous()):
        raise ConfigurationError(f"Cross entropy needs contiguous float32 class weights, not {weight.dtype}.")
    total = weight.sum() if weight is not None else None
    entropy = _C.reference.CrossEntropy(
        classes=logits.shape[1], ignore_index=ignore_index, smoothing=smoothing,
        weight=_address(weight), weight_total=_address(total),
    )  # fmt: skip
    return entropy, total


def _check_contiguous(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ConfigurationError("Fused operations need contiguous tensors; call .contiguous() first.")


def _check_flat(first: torch.Tensor, *others: torch.Tensor) -> None:
    _check_contiguous(first, *others)
    count, device = first.numel(), first.get_device()
    for other in others:
        if other.numel() != count or other.get_device() != device:
            raise ConfigurationError(
                f"Fused operations need equally many elements on one device, not {count} on {first.device} "
                f"and {other.numel()} on {other.device}."
            )


def _check_rows(logits: torch.Tensor, target: torch.Tensor) -> None:
    if logits.dim() != 2 or target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ConfigurationError(
            f"Cross entropy needs logits (N, C) and int64 targets (N,), not {tuple(logits.shape)} and "
            f"{target.dtype} {tuple(target.shape)}."
        )
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ConfigurationError("Cross entropy needs logits whose last dimension is contiguous.")
    if target.device != logits.device:  # a kernel would read what is not there
        raise ConfigurationError(
            f"The targets of a cross entropy are on {target.device}, its logits on {logits.device}: move them there, "
            "as with target.to(logits.device)."
        )
    _check_contiguous(target)
