"""Recomputed blocks whose forward ran inside contexts that the backward does not run in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from oracle import WIDTH
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import bmtrain as bmt
from bmtrain.context import context


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.into(x).view(1, 1, len(x), 3 * WIDTH).split(WIDTH, -1)
        return x + self.out(F.gelu(F.scaled_dot_product_attention(*parts).view(x.shape)))  # type: ignore[no-any-return]


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.filter = nn.LSTM(WIDTH, WIDTH), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.filter(self.cells(x[:, None])[0].transpose(1, 2))[..., 0]  # type: ignore[no-any-return]


class Makes(nn.Module):
    """Makes a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        own = torch.arange(WIDTH) / WIDTH * torch.full((WIDTH,), 0.3)
        return (torch.tanh(self.linear(x)) * own.exp()).to(x.dtype)  # type: ignore[no-any-return]


class Instead(TorchFunctionMode):
    """Another function for one of torch's."""

    def __init__(self, of: Callable[..., Any], other: Callable[..., Any]) -> None:
        super().__init__()
        self.of, self.other = of, other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.other if func is self.of else func)(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


Contexts = Callable[[], list[AbstractContextManager[Any]]]
CASES: dict[str, tuple[type[nn.Module], Contexts]] = {
    "sdpa_kernel": (Attention, lambda: [sdpa_kernel(SDPBackend.MATH)]),
    "sdpa_kernel nested": (Attention, lambda: [sdpa_kernel(SDPBackend.FLASH_ATTENTION), sdpa_kernel(SDPBackend.MATH)]),
    "mkldnn": (Memory, lambda: [torch.backends.mkldnn.flags(enabled=False)]),
    "default dtype": (Makes, lambda: [default_dtype(torch.float64)]),
    "function mode": (Makes, lambda: [Instead(torch.tanh, torch.sigmoid)]),
    "function modes": (Makes, lambda: [Instead(torch.tanh, torch.sigmoid), Instead(torch.sigmoid, torch.sin)]),
}


def present() -> list[Any]:
    C: Any = torch._C
    return [
        C._get_math_sdp_enabled(), C._get_flash_sdp_enabled(), C._get_sdp_priority_order(), C._get_mkldnn_enabled(),
        C._get_cudnn_enabled(), torch.get_default_dtype(), C._len_torch_function_stack(),
    ]  # fmt: skip


def runs(name: str, inside: bool) -> None:
    """``inside``: the backward runs in the same contexts."""
    make, contexts = CASES[name]
    torch.manual_seed(0)
    plain = nn.Sequential(make(), make())
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(nn.Sequential(*(bmt.Block(make(), use_checkpoint=True) for _ in range(2))))
    for net in (plain, model):
        before = present()
        x = oracle.inputs(0)
        with ExitStack() as stack:
            for one in contexts():
                stack.enter_context(one)
            loss = net(x).square().mean()
            if inside:
                loss.backward()
        if net is plain:
            before = present()  # attention on a GPU sets its own priorities when it is first used
        assert present() == before
        if not inside:
            loss.backward()
        assert present() == before
    oracle.assert_same_grads(model, plain)


@on_ranks(1, 2)
def test_contexts_around_a_forward() -> None:
    for name in CASES:
        for inside in (False, True):
            try:
                runs(name, inside)
            except Exception as error:
                raise AssertionError(f"{name}, {inside=}: {error}") from error


class TanhLayer(nn.Module):
    """Of a class that torch.compile takes: frames of torch's own, such as nn.Sequential's, it runs as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh()


def tanh_layer() -> nn.Module:
    return TanhLayer()


def times_compiled(default_device: bool) -> int:
    """How often code was made for two blocks that train twice."""
    torch._dynamo.reset()
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        calls.append(graph)
        return graph.forward

    with torch.device(context().device.torch_device) if default_device else nullcontext():
        model = bmt.BMTrainModelWrapper(
            nn.Sequential(*(bmt.Block(tanh_layer(), use_checkpoint=True) for _ in range(2)))
        )
        bmt.compile(model, backend=backend)
        for step in range(2):
            model(oracle.inputs(step).requires_grad_()).square().mean().backward()
    return len(calls)


@on_ranks(1, 2)
def test_a_default_device_has_no_block_compiled_for_its_second_run() -> None:
    assert times_compiled(True) == times_compiled(False) > 0


orders: list[list[int]] = []  # of kernels, as blocks find them; not the block's own, which would be put back


class OrdersWhenUsed(nn.Module):
    """Its first use puts kernels into another order, as attention does on some GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        C: Any = torch._C
        if not orders:
            C._set_sdp_priority_order(C._get_sdp_priority_order()[::-1])
        orders.append(C._get_sdp_priority_order())
        return torch.tanh(self.linear(x))


@on_ranks(1, 2)
def test_what_attention_settles_when_it_is_first_used() -> None:
    C: Any = torch._C
    before = C._get_sdp_priority_order()
    orders.clear()
    model = bmt.BMTrainModelWrapper(bmt.Block(OrdersWhenUsed(), use_checkpoint=True))
    try:
        model(oracle.inputs(0)).square().mean().backward()
        assert orders == [before[::-1]] * 2
        assert C._get_sdp_priority_order() == before[::-1]
    finally:
        C._set_sdp_priority_order(before)


@on_ranks(1, 2)
def test_a_forward_that_is_not_compiled_runs_again_so() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(Attention(), Attention())
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(nn.Sequential(*(bmt.Block(Attention(), use_checkpoint=True) for _ in range(2))))
    bmt.compile(model, backend="aot_eager")
    for eager in (True, False):
        with torch.compiler.set_stance("force_eager" if eager else "default"):
            loss = model(oracle.inputs(0)).square().mean()
        loss.backward()
        plain(oracle.inputs(0)).square().mean().backward()
    oracle.assert_same_grads(model, plain)


@on_ranks(1, 2)
def test_a_compiled_training_step() -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = bmt.BMTrainModelWrapper(bmt.Block(tanh_layer(), use_checkpoint=True))
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))

        def step(x: Tensor, model: Any = model, manager: Any = manager) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                loss: Tensor = model(x).square().mean()
            manager.backward(loss)  # in which other kernels are allowed
            manager.step()
            manager.zero_grad()
            return loss.detach()

        run = torch.compile(step, backend="eager") if compiled else step
        losses.append([float(run(oracle.inputs(i))) for i in range(3)])
    assert losses[0] == losses[1]
