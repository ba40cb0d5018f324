"""What ranks tell one another from inside of compiled code happens when that runs, and as often."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ranks import on_ranks

import bmtrain as bmt

Loss = Callable[[torch.Tensor], torch.Tensor]  # of this rank's (4, 4) outputs

LOSSES: dict[str, Loss] = {
    "all_reduce": lambda y: bmt.distributed.all_reduce(y, "max").square().mean(),
    "reduce_scatter": lambda y: bmt.distributed.reduce_scatter(y, "sum").square().mean(),
    "broadcast": lambda y: bmt.distributed.broadcast(y, 0).square().mean(),
    "gather_result": lambda y: y.mean() + bmt.gather_result(y).square().mean(),
    "gather_samples": lambda y: y.mean() * bmt.gather_samples(y.detach()).square().mean(),
    "gather_batch": lambda y: bmt.gather_batch(y).logsumexp(0).square().mean(),
    "sum_loss": lambda y: y.mean() * bmt.sum_loss(y.mean().detach()),
    "total": lambda y: y.mean() * bmt.total(y.sum().detach()),
    "agree": lambda y: y.mean() * (2.0 if bmt.agree(bmt.rank() == 0) else 1.0),
    "fused loss": lambda y: bmt.loss.FusedCrossEntropy()(y, torch.arange(4)),
}


@on_ranks(2)
def test_as_in_eager_code() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1 + bmt.rank()))
    for name, loss in LOSSES.items():

        def of(x: torch.Tensor, loss: Loss = loss) -> torch.Tensor:
            return loss(x @ weight)

        torch._dynamo.reset()
        compiled = torch.compile(of, backend="aot_eager")
        expected, found = of(x), compiled(x)
        (right,), (gradient,) = torch.autograd.grad(expected, weight), torch.autograd.grad(found, weight)
        assert torch.allclose(found, expected) and torch.allclose(gradient, right, atol=1e-6), name
        assert torch.allclose(compiled(x + 1), of(x + 1)), name
