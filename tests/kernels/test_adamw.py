"""adamw_ against torch.optim.AdamW and against the same formula in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from bmtrain import kernels
from bmtrain.errors import ConfigurationError
from bmtrain.split_float import join, split

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
# Torch's CPU square root is not always correctly rounded; after a few steps that shows in this many last places.
ROUNDINGS = 8
SIZES = [1, 3, 4, 127, 4099, 300_001]


def new_states(count: int, device: torch.device, offset: int = 0) -> list[torch.Tensor]:
    """Master, moments and gradient; ``offset`` elements into their memory, so that 128-bit accesses do not fit."""
    states = [torch.randn(count + offset), torch.zeros(count + offset), torch.zeros(count + offset)]
    states.append(torch.randn(count + offset) * 0.1)
    return [state.to(device)[offset:] for state in states]


def step_(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor | None,
    remainder: torch.Tensor | None = None,
    **numbers: Any,
) -> None:
    """adamw_ of whole tensors."""
    run = kernels.AdamWRun(master, exp_avg, exp_avg_sq, grad, out, remainder, 0, master.numel())
    kernels.adamw_([run], **numbers)


def torch_adamw(master: torch.Tensor) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    parameter = torch.nn.Parameter(master.detach().cpu().clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=HYPER["lr"],
        betas=(HYPER["beta1"], HYPER["beta2"]),
        eps=HYPER["eps"],
        weight_decay=HYPER["weight_decay"],
        foreach=False,
        fused=False,
    )
    return parameter, optimizer


def in_units_of_last_place(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of float32 tensors, in units of the last place of the larger (not under 2^-10)."""
    a, b = a.cpu(), b.cpu()
    unit = torch.maximum(a.abs(), b.abs()).clamp(min=2.0**-10) * 2.0**-23
    return float(((a - b).abs() / unit).max())


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("offset", [0, 1])
def test_equals_torch_adamw(device: torch.device, count: int, offset: int) -> None:
    master, exp_avg, exp_avg_sq, grad = new_states(count, device, offset)
    parameter, optimizer = torch_adamw(master)
    out = torch.empty(count, dtype=torch.bfloat16, device=device)
    for step in range(1, 6):
        parameter.grad = grad.cpu().clone()
        optimizer.step()
        step_(master, exp_avg, exp_avg_sq, grad, out, step=step, **HYPER)
        grad.mul_(-0.7)
    state = optimizer.state[parameter]
    limit = 0 if device.type == "cpu" else ROUNDINGS
    assert in_units_of_last_place(exp_avg, state["exp_avg"]) <= limit
    assert in_units_of_last_place(exp_avg_sq, state["exp_avg_sq"]) <= limit
    assert in_units_of_last_place(master, parameter.detach()) <= limit
    assert torch.equal(out, master.bfloat16())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_formula_in_float64(
    device: torch.device, grad_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    master, exp_avg, exp_avg_sq, grad = new_states(10_007, device)
    grad = grad.to(grad_dtype)
    before = grad.clone()
    p, m, v = (t.double() for t in (master, exp_avg, exp_avg_sq))
    out = None if out_dtype is None else torch.empty(10_007, dtype=out_dtype, device=device)
    clip = torch.tensor(0.25, device=device)
    for step in (1, 2, 3):
        step_(master, exp_avg, exp_avg_sq, grad, out, step=step, grad_scale=0.5, clip=clip, **HYPER)
        g = grad.double() * 0.125
        p *= 1 - HYPER["lr"] * HYPER["weight_decay"]
        m = HYPER["beta1"] * m + (1 - HYPER["beta1"]) * g
        v = HYPER["beta2"] * v + (1 - HYPER["beta2"]) * g * g
        c1, c2 = 1 - HYPER["beta1"] ** step, 1 - HYPER["beta2"] ** step
        p -= HYPER["lr"] / c1 * m / (v.sqrt() / c2**0.5 + HYPER["eps"])
    torch.testing.assert_close(master.double(), p, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(exp_avg.double(), m, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(exp_avg_sq.double(), v, rtol=1e-6, atol=1e-12)
    assert torch.equal(grad, before)
    assert out is None or torch.equal(out, master.to(out.dtype))


@pytest.mark.gpu
def test_compiled_kernel_equals_its_cpu_reference_bit_for_bit() -> None:
    torch.manual_seed(0)
    states = new_states(50_021, torch.device("cpu"))
    on_gpu = [state.cuda() for state in states]
    for step in (1, 2, 3):
        reference_step(states, step)
        step_(*on_gpu, None, step=step, grad_scale=0.5, **HYPER)
    for expected, actual in zip(states, on_gpu, strict=True):
        assert torch.equal(expected, actual.cpu())


def test_cpu_reference_equals_torch_operations() -> None:
    pytest.importorskip("bmtrain._C")
    torch.manual_seed(0)
    states = new_states(50_021, torch.device("cpu"))
    expected = [state.clone() for state in states]
    for step in (1, 2, 3):
        reference_step(states, step)
        step_(*expected, None, step=step, grad_scale=0.5, **HYPER)
    for name, actual, wanted in zip(("master", "exp_avg", "exp_avg_sq"), states, expected, strict=False):
        assert in_units_of_last_place(actual, wanted) <= ROUNDINGS, name


def reference_step(states: list[torch.Tensor], step: int) -> None:
    from bmtrain import _C

    numbers = _C.reference.AdamW(
        decay=1 - HYPER["lr"] * HYPER["weight_decay"],
        beta2=HYPER["beta2"],
        weight1=1 - HYPER["beta1"],
        weight2=1 - HYPER["beta2"],
        step_size=HYPER["lr"] / (1 - HYPER["beta1"] ** step),
        correction2_sqrt=(1 - HYPER["beta2"] ** step) ** 0.5,
        eps=HYPER["eps"],
    )
    master, exp_avg, exp_avg_sq, grad = (state.data_ptr() for state in states)
    _C.reference.adamw(
        master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, gradient=grad, count=states[0].numel(), adamw=numbers,
        scale=0.5,
    )  # fmt: skip


def test_tensors_that_do_not_fit_are_refused(device: torch.device) -> None:
    master, exp_avg, exp_avg_sq, grad = new_states(8, device)
    with pytest.raises(ConfigurationError, match="equally many"):
        step_(master, exp_avg, exp_avg_sq, grad[:4], None, step=1, **HYPER)
    with pytest.raises(ConfigurationError, match="contiguous"):
        step_(master[::2], exp_avg[::2], exp_avg_sq[::2], grad[::2], None, step=1, **HYPER)
    with pytest.raises(ConfigurationError, match="master must be float32"):
        step_(master.half(), exp_avg, exp_avg_sq, grad, None, step=1, **HYPER)
    rounded, remainder = split(master)
    with pytest.raises(ConfigurationError, match="master must be bfloat16"):
        step_(master, exp_avg, exp_avg_sq, grad, None, step=1, remainder=remainder, **HYPER)
    with pytest.raises(ConfigurationError, match="equally many"):
        step_(rounded, exp_avg, exp_avg_sq, grad, None, step=1, remainder=remainder[:4], **HYPER)


@pytest.mark.parametrize("count", [1, 4099])
def test_a_skipped_step_changes_nothing(device: torch.device, count: int) -> None:
    states = new_states(count, device)
    states[3][0] = float("nan")
    before = [state.clone() for state in states]
    out = torch.full((count,), 3.0, dtype=torch.bfloat16, device=device)
    step_(*states, out, step=1, skip=torch.ones((), device=device), **HYPER)
    for state, expected in zip(states, before, strict=True):
        assert torch.equal(state.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert (out == 3.0).all()


def test_a_step_that_is_not_skipped_is_the_same(device: torch.device) -> None:
    asked = new_states(4099, device)
    plain = [state.clone() for state in asked]
    step_(*asked, None, step=1, skip=torch.zeros((), device=device), **HYPER)
    step_(*plain, None, step=1, **HYPER)
    for one, other in zip(asked, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", SIZES)
def test_split_parameters_go_the_same_way(
    device: torch.device, count: int, offset: int, grad_dtype: torch.dtype
) -> None:
    master, exp_avg, exp_avg_sq, grad = new_states(count, device, offset)
    moments = [exp_avg.clone(), exp_avg_sq.clone()]
    whole = torch.cat([torch.zeros(offset, device=device), master])
    rounded, remainder = (part[offset:] for part in split(whole))
    out, clip = torch.empty(count, dtype=torch.bfloat16, device=device), torch.tensor(0.25, device=device)
    for step in range(1, 6):
        both = {"step": step, "clip": clip, "grad_scale": 0.5, **HYPER}
        step_(master, exp_avg, exp_avg_sq, grad.to(grad_dtype), out, **both)
        step_(rounded, *moments, grad.to(grad_dtype), None, remainder=remainder, **both)
        grad.mul_(-0.7)
        assert in_units_of_last_place(join(rounded, remainder), master) <= 1
        apart = rounded != out  # where the one last place that ties lose has moved another rounding
        assert apart.sum() <= count * 1e-4
    assert torch.equal(moments[0], exp_avg) and torch.equal(moments[1], exp_avg_sq)


def test_a_skipped_step_changes_no_split_parameters(device: torch.device) -> None:
    master, *others = new_states(4099, device)
    rounded, remainder = split(master)
    skip = torch.ones((), device=device)
    step_(rounded, *others, None, step=1, skip=skip, remainder=remainder, **HYPER)
    assert torch.equal(rounded, master.bfloat16()) and torch.equal(remainder, split(master)[1])


@pytest.mark.parametrize("split_too", [False, True])
def test_many_runs_go_as_each_alone(device: torch.device, split_too: bool) -> None:
    torch.manual_seed(1)
    counts = [0, 1, 5, 4096, 4097, 12_289, *range(1, 60)]  # more than one launch takes
    tensors = [new_states(count + 7, device) for count in counts]
    runs, alone = [], []
    for number, (states, count) in enumerate(zip(tensors, counts, strict=True)):
        states[3] = states[3].to([torch.float32, torch.bfloat16, torch.float16][number % 3])
        out = torch.zeros(count + 7, dtype=torch.bfloat16, device=device) if number % 2 else None
        remainder = None
        if split_too and number % 4 == 0:
            states[0], remainder = split(states[0])
        start = number % 5
        copies = [None if t is None else t.clone() for t in (*states, out, remainder)]
        runs.append(kernels.AdamWRun(*states, out, remainder, start, start + count))
        alone.append(kernels.AdamWRun(*copies, start, start + count))
    clip = torch.tensor(0.25, device=device)
    for step in (1, 2):
        kernels.adamw_(runs, step=step, clip=clip, grad_scale=0.5, **HYPER)
        for run in alone:
            kernels.adamw_([run], step=step, clip=clip, grad_scale=0.5, **HYPER)
    for run, other in zip(runs, alone, strict=True):
        for one, two in zip(run[:6], other[:6], strict=True):
            assert (one is None and two is None) or torch.equal(one, two)
    assert not torch.equal(runs[5].exp_avg, torch.zeros_like(runs[5].exp_avg))
    outside = [*range(runs[5].start), *range(runs[5].end, len(runs[5].exp_avg))]
    assert not runs[5].exp_avg[outside].any() and not runs[5].exp_avg_sq[outside].any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loop_on_a_cpu_equals_the_reference_bit_for_bit(
    grad_dtype: torch.dtype, out_dtype: torch.dtype | None, threads: int
) -> None:
    pytest.importorskip("bmtrain._C")
    for count in (1, 7, 8, 50_021, 300_001):
        torch.manual_seed(count)
        states = new_states(count + 1, torch.device("cpu"), 1)
        grad = states[3].to(grad_dtype)
        expected = [*map(torch.clone, states[:3]), grad.float()]
        out = None if out_dtype is None else torch.empty(count + 1, dtype=out_dtype)
        for step in (1, 2, 3):
            reference_step(expected, step)
            step_(*states[:3], grad, out, step=step, grad_scale=0.5, threads=threads, **HYPER)
        for wanted, actual in zip(expected[:3], states[:3], strict=True):
            assert torch.equal(wanted, actual)
        assert out is None or torch.equal(out, states[0].to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loop_on_a_cpu_rounds_as_torch_does(dtype: torch.dtype) -> None:
    pytest.importorskip("bmtrain._C")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = every.float()
    ordered = exact[exact.isfinite()].sort().values
    middles = (ordered[1:].double() + ordered[:-1].double()).div(2).float()
    beyond = torch.tensor(
        [65504.0, 65519.99, 65520.0, 3.39e38, 3.4e38, float("inf"), -float("inf"), float("nan"), -0.0]
    )
    values = torch.cat([exact, middles, middles.nextafter(beyond[5]), middles.nextafter(beyond[6]), beyond])
    out, zeros = torch.empty(len(values), dtype=dtype), torch.zeros(3, len(values))
    still = {"lr": 0.0, "beta1": 0.9, "beta2": 0.9, "eps": 1.0, "weight_decay": 0.0, "step": 1, "threads": 2}
    step_(values.clone(), zeros[0], zeros[1], zeros[2], out, **still)
    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    count = len(every)
    finite = torch.where(every.isfinite(), every, 0)
    moments = torch.zeros(3, count)
    step_(moments[0], moments[1], moments[2], finite, None, **{**still, "beta1": 0.0})
    assert torch.equal(moments[1], finite.float())


def test_the_loop_on_a_cpu_skips_and_clips() -> None:
    pytest.importorskip("bmtrain._C")
    states = new_states(50_021, torch.device("cpu"))
    before, expected = [state.clone() for state in states], [state.clone() for state in states]
    numbers = {"step": 1, "grad_scale": 0.5, **HYPER}
    step_(*states, None, skip=torch.tensor(1.0), threads=2, **numbers)
    assert all(map(torch.equal, states, before))
    step_(*states, None, skip=torch.tensor(0.0), clip=torch.tensor(0.25), threads=2, **numbers)
    step_(*expected, None, clip=torch.tensor(0.25), **numbers)
    for actual, wanted in zip(states[:3], expected[:3], strict=True):
        assert in_units_of_last_place(actual, wanted) <= ROUNDINGS


_WITHOUT_THREADS = """
import resource, torch
from bmtrain import kernels

count = 200_000
master, exp_avg, exp_avg_sq, grad = torch.ones(count), torch.zeros(count), torch.zeros(count), torch.ones(count)
run = kernels.AdamWRun(master, exp_avg, exp_avg_sq, grad, None, None, 0, count)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))  # a thread's stack is larger
kernels.adamw_([run], lr=0.5, beta1=0.9, beta2=0.9, eps=0.0, weight_decay=0.0, step=1, threads=6)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
torch.testing.assert_close(master, torch.full((count,), 0.5))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what this process takes")
def test_the_loop_on_a_cpu_does_without_threads_that_do_not_start() -> None:
    pytest.importorskip("bmtrain._C")
    done = subprocess.run([sys.executable, "-c", _WITHOUT_THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
