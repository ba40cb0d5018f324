"""The bytes that a forward and a backward have alive at a time, counted on tensors without values (device "meta")."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROUND = 512
"""CUDA's caching allocator hands out multiples of so many bytes."""
_IN_FP32 = ("layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss")
"""What autocast runs in fp32 on a GPU, of what models call most."""


class LiveBytes(TorchDispatchMode):
    """Counts the memory of every tensor made inside the ``with`` for as long as anything holds it.

    A test of values, which are not there, is taken for true: what models ask is mostly whether a mask lets all through.

    Attributes:
        now, peak: bytes alive, and the most at a time since the ``with`` began.
        tests: how many were taken for true.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        """``known``: tensors whose memory, and that of their views, is counted elsewhere."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.tests = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            self.tests += 1
            return True
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def as_on_gpu(landing: Iterable[nn.Parameter], autocast: torch.dtype | None = None) -> Iterator[None]:
    """Inside the ``with`` functions keep what their GPU versions keep, where torch has others for "meta".

    ``F.scaled_dot_product_attention`` keeps inputs, output and one number a row, as flash and memory-efficient kernels
    do; on "meta" torch would keep every score.  A weight in ``landing`` has its gradient computed where it is reduced
    from (``bmtrain.block.linear``), which is counted with the buffers.  RMSNorm and dropout are one kernel each.
    Under ``autocast`` linear layers and attention cast to it, norms and losses to fp32, as torch has it for GPUs.
    """
    weights, plain, plain_dropout = {id(weight) for weight in landing}, F.linear, F.dropout

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        x, bias = _cast(x, autocast), _cast(bias, autocast)
        if id(weight) in weights:
            return _LandingLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return plain(x, _cast(weight, autocast), bias)

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, *_: Any, **__: Any
    ) -> Any:
        query, key, value = (_cast(tensor, autocast) for tensor in (query, key, value))
        return _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]

    def in_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *args, **kwargs: function(_cast(x, torch.float32), *args, **kwargs)

    def rms_norm(
        x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
    ) -> Any:
        return _RmsNorm.apply(x, weight, x.dim() - len(shape))  # type: ignore[no-untyped-call]

    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or inplace or not 0 < p < 1:
            return plain_dropout(x, p, training, inplace)
        return torch.native_dropout(x, p, True)[0]

    with ExitStack() as stack:
        for name, stand_in in (
            ("linear", linear), ("scaled_dot_product_attention", attention), ("rms_norm", rms_norm),
            ("dropout", dropout),
            *((name, in_fp32(getattr(F, name))) for name in (_IN_FP32 if autocast is not None else ())),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(F, name, stand_in))
        yield


def _cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    wanted = dtype is not None and tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype
    return tensor.to(dtype) if wanted else tensor


def _like(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """(..., H, T, width), in memory (..., T, H, width), as the kernels write it."""
    if tensor.dim() < 4:
        return tensor.new_empty((*tensor.shape[:-1], width))
    *batch, heads, rows, _ = tensor.shape
    return tensor.new_empty((*batch, rows, heads, width)).transpose(-3, -2)


class _Attention(torch.autograd.Function):
    """Shapes: (B, H, T, D) -> (B, H, T, Dv), and so without B or H."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        out = _like(query, value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *([mask] if isinstance(mask, torch.Tensor) else []))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return (*(_like(tensor, tensor.shape[-1]) for tensor in (query, key, value)), None)


class _RmsNorm(torch.autograd.Function):
    """Keeps the input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, rows: int) -> torch.Tensor:
        scales = x.new_empty(x.shape[:rows], dtype=torch.float32)
        ctx.save_for_backward(x, scales, *([] if weight is None else [weight]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, _, *weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight[0]) if weight else None, None


class _LandingLinear(torch.autograd.Function):
    """``F.linear`` whose weight gradient takes no memory of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch._C._nn.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        _, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, None, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None


@contextmanager
def gradients_go(groups: Iterable[list[nn.Parameter]]) -> Iterator[None]:
    """Inside the ``with`` gradients go as a block's are reduced: when all of one of ``groups`` have come."""
    handles = []
    for group in groups:
        left = {id(parameter) for parameter in group}

        def came(parameter: torch.Tensor, group: list[nn.Parameter] = group, left: set[int] = left) -> None:
            left.discard(id(parameter))
            if not left:
                left.update(map(id, group))
                for each in group:
                    each.grad = None

        handles += [p.register_post_accumulate_grad_hook(came) for p in group]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
