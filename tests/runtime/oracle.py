"""One model built twice, plain and sharded, trained side by side; the plain one is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import models
import torch

import bmtrain as bmt
from bmtrain.context import context

ROWS, WIDTH = 12, 6
LIMIT = 1e-5

Build = Callable[[models.Names], Any]
Run = Callable[[Any, torch.Tensor], torch.Tensor]


@contextmanager
def heard(words: str) -> Iterator[list[str]]:
    """The warnings with ``words`` in them, once the ``with`` is left."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if words in str(one.message)]


def mean(out: torch.Tensor) -> torch.Tensor:
    """A loss whose mean over ranks is that of the whole batch."""
    return out.float().tanh().square().mean()


def pair(build: Build, recompute: bool = True, zero_level: int = 3, seed: int = 5) -> tuple[Any, Any]:
    """The plain and the sharded model, with equal weights."""
    torch.manual_seed(seed)
    reference = build(models.plain())
    torch.manual_seed(seed)
    model = build(models.sharded(recompute, zero_level))
    assert_same_weights(model, reference, exact=True)
    return reference, model


def assert_same_weights(model: Any, reference: Any, exact: bool = False, limit: float = LIMIT) -> None:
    ours, theirs = model.state_dict(), reference.state_dict()
    assert list(ours) == list(theirs), (list(ours), list(theirs))
    for key, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            continue
        if exact:
            assert torch.equal(ours[key].cpu(), value.cpu()), key
        else:
            assert_close(ours[key].cpu(), value.cpu(), key, limit)


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str, limit: float = LIMIT) -> None:
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    size = max(float(expected.detach().abs().max()), 1e-6) if expected.numel() else 1.0
    error = float((found.cpu() - expected.cpu()).detach().abs().max()) / size if expected.numel() else 0.0
    assert error <= limit, f"{what} differs by {error:.2e} of its largest entry"


def assert_same_grads(model: Any, reference: Any, limit: float = LIMIT) -> None:
    for (name, ours), (same, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == same and ours.shape == theirs.shape, (name, same)
        found = bmt.gather_grad(ours)
        if theirs.grad is None:
            assert found is None or not found.any(), f"{name} has a gradient"
        else:
            assert found is not None, f"{name} has no gradient"
            assert_close(found, theirs.grad, f"the gradient of {name}", limit)


def inputs(step: int) -> torch.Tensor:
    """(ROWS, WIDTH) one global batch, the same on every rank."""
    made = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 + step), device="cpu")
    return made.to(torch.get_default_device())


def matches(
    build: Build,
    run: Run = lambda model, x: mean(model(x)),
    steps: int = 3,
    recompute: bool | None = None,
    zero_level: int = 3,
    prepare: Callable[[Any], None] = lambda model: None,
    limit: float = LIMIT,
) -> None:
    """Asserts that losses, gradients and weights agree over some steps of SGD, on the ranks' device.

    ``run`` gives the loss of a batch, a mean over its rows.  ``recompute`` None tries both.
    """
    device = context().device.torch_device
    limit *= 10 if device.type == "cuda" else 1  # one rank's sums are in another order there than the whole batch's
    for again in (True, False) if recompute is None else (recompute,):
        reference, model = pair(build, again, zero_level)
        reference.to(device)
        prepare(reference)
        prepare(model)
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.05))
        theirs = torch.optim.SGD(reference.parameters(), lr=0.05)
        for step in range(steps):
            whole = run(reference, inputs(step).to(device))
            whole.backward()  # type: ignore[no-untyped-call]
            loss = run(model, models.share(inputs(step), device))
            manager.backward(loss)
            assert_close(bmt.sum_loss(loss.detach()), whole.detach(), f"the loss of step {step}", limit)
            assert_same_grads(model, reference, limit)
            manager.step()
            theirs.step()
            manager.zero_grad()
            theirs.zero_grad()
        assert_same_weights(model, reference, limit=limit * 10)
