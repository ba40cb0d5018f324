"""Losses that divide by another number on each rank are told, once."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bmtrain as bmt
from bmtrain.block.first_steps.losses import FirstLosses
from bmtrain.context import context

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _per_sample(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    losses = [
        F.cross_entropy(one[: 1 + int(k)], one.argmax(1)[: 1 + int(k)])
        for one, k in zip(out[:, None].expand(-1, 5, -1), y, strict=True)
    ]
    return torch.stack(losses).mean()


def _summed(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(1, device=out.device)
    for one, k in zip(out, y, strict=True):
        total = total + one[: 2 + int(k)].square().mean()
    return total / len(y)


def _of_classes(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean losses of parts, as detectors have of boxes: one number in one dimension, added to in place."""
    total = torch.zeros(1, device=out.device)
    for kind in range(4):
        total += out[y != kind].square().mean()
    total *= 0.5
    return total


def _of_boxes(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Means over what matches on each of several scales, as many as there are samples, beside means over all cells."""
    total = torch.zeros(1, device=out.device)
    for scale in range(3):
        found = out[y != scale]
        total += 0.05 * (1 - found[:, :2].sigmoid()).mean() + F.binary_cross_entropy_with_logits(
            found[:, 2:], torch.zeros_like(found[:, 2:])
        )
        total += F.binary_cross_entropy_with_logits(out, torch.zeros_like(out))
    return total


def _of_some_boxes(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same, where a scale may have no match: then a rank divides less often."""
    total = out.square().mean()
    for kind in range(5):
        found = out[(y == kind) & (out[:, 0] > 0)]
        total = total + (found.square().mean() if len(found) else 0)
    return total


def _of_boxes_and_samples(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same beside a mean over as many numbers as there are samples."""
    return _of_boxes(out, y) + out.square().mean(1).mean()


def _by_samples_as_terms(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """More terms than samples, over as many steps as there are samples."""
    return sum((out[y != k % 5].exp().mean() for k in range(len(y) + 1)), out.sum() * 0) / len(y)


def _by_sample_and_more(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.1 * out.square().mean() + (_per_sample(out, y) + _summed(out, y)) * 0.5


def _with_a_term_more(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(out, y)
    return loss + 0.3 * F.cross_entropy(out, y.roll(1)) if y[0] > 1 else loss


def _in_two_parts(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    losses = [one[: 2 + int(k)].square().mean() + one[: 1 + int(k)].exp().mean() for one, k in zip(out, y, strict=True)]
    return torch.stack(losses).mean()


def _times_ranks(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), device=out.device)
    for one, k in zip(out, y, strict=True):
        total = total + one[: 2 + int(k)].square().mean()
    return total * bmt.world_size()


def _dice(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p, t = out.softmax(1), F.one_hot(y, 5)
    return 1 - 2 * (p * t).sum() / (p.square().sum() + t.sum())


SAID: dict[str, Loss] = {
    "ignored": lambda out, y: F.cross_entropy(out, y.masked_fill(y < 2, -100)),
    "smoothed": lambda out, y: F.cross_entropy(out, y.masked_fill(y < 2, -100), label_smoothing=0.1),
    "module": lambda out, y: nn.CrossEntropyLoss(ignore_index=0)(out, y),
    "weighted": lambda out, y: F.cross_entropy(out, y, weight=torch.linspace(0.5, 2, 5)),
    "nll": lambda out, y: F.nll_loss(out.log_softmax(1), y, ignore_index=0),
    "two dimensions": lambda out, y: F.cross_entropy(out.T[None, :, :, None], y[None, :, None], ignore_index=0),
    "masked": lambda out, y: (out.square().mean(1) * (y > 1)).sum() / (y > 1).sum(),
    "clamped": lambda out, y: (out.square().mean(1) * (y > 1)).sum() / (y > 1).sum().clamp(min=1),
    "number": lambda out, y: out[y > 1].square().sum() / int((y > 1).sum()),
    "selected": lambda out, y: F.cross_entropy(out[y > 1], y[y > 1]),
    "mse": lambda out, y: F.mse_loss(out[y > 1], torch.zeros_like(out[y > 1])),
    "mean": lambda out, y: out[y > 1].square().mean(),
    "sum of two": lambda out, y: 0.1 * out.square().mean() + F.cross_entropy(out, y, ignore_index=0) / 2,
    "scaled": lambda out, y: (F.cross_entropy(out, y, ignore_index=0) * 3.0 + 1e-3).float(),
    "quotient": _dice,
    "one in one dimension": lambda out, y: out[y > 1].square().mean().view(1),
    "of classes": _of_classes,
    "of boxes": _of_boxes,
    "of some boxes": _of_some_boxes,
    "of boxes and samples": _of_boxes_and_samples,
    "as many steps as samples": _by_samples_as_terms,
    "checkpointed": lambda out, y: checkpoint(
        lambda o: F.cross_entropy(o, y, ignore_index=0), out, use_reentrant=False
    ),
}
QUIET: dict[str, Loss] = {
    "plain": lambda out, y: F.cross_entropy(out, y),
    "accumulated": lambda out, y: F.cross_entropy(out, y) / 4,
    "sum": lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y),
    "elements": lambda out, y: (out / out.detach().norm(dim=1, keepdim=True)).square().mean(),
    "over ranks": lambda out, y: bmt.loss.mean_over_ranks(F.cross_entropy)(out, y, ignore_index=0),
    "mean over ranks": lambda out, y: bmt.mean(out.square().mean(1), y > 1),
    "fused": lambda out, y: bmt.loss.FusedCrossEntropy(ignore_index=0)(out, y),
    "per sample": _per_sample,
    "summed by sample": _summed,
    "by sample in two parts": _in_two_parts,
    "by sample, and more": _by_sample_and_more,
    "by sample, a list": lambda out, y: _summed(out.exp(), y).view(()),
    "by sample, side by side": lambda out, y: torch.cat(
        [one[: 1 + int(k)].exp().mean().view(1) for one, k in zip(out, y, strict=True)]
    ).mean(),
    "with a term more on one rank": _with_a_term_more,
    "by sample, accumulated": lambda out, y: _summed(out, y) / 4,
    "a sum by sample, times the ranks": _times_ranks,
    "vector": lambda out, y: (F.cross_entropy(out, y, reduction="none") * torch.ones(1).expand(len(y))).mean(),
}


def _focal(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(out, y)
    return (1 - torch.exp(-loss)) ** 2 * loss


NO_MEAN: dict[str, Loss] = {
    "only a sum": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "squares": lambda out, y: 0.5 * F.mse_loss(out, torch.zeros_like(out), reduction="sum"),
    "sum of elements": lambda out, y: (out - F.one_hot(y, 5)).square().sum(),
    "sum over a dimension": lambda out, y: F.cross_entropy(out, y, reduction="none").sum(0),
    "over all ranks' samples": lambda out, y: F.cross_entropy(out, y, reduction="sum") / 12,
    "times a number": lambda out, y: F.cross_entropy(out, y, reduction="sum") * (1 / 12),
    "beside a mean": lambda out, y: F.cross_entropy(out, y) + 0.1 * out.abs().sum(),
    "divergence": lambda out, y: F.kl_div(out.log_softmax(-1), torch.full_like(out, 0.2), reduction="sum"),
    "variational": lambda out, y: F.binary_cross_entropy_with_logits(
        out, torch.full_like(out, 0.3), reduction="sum"
    ) - 0.5 * torch.sum(1 + out - out.pow(2)),
    "logarithm": lambda out, y: F.cross_entropy(out, y).log(),
    "root": lambda out, y: F.mse_loss(out, torch.zeros_like(out)).sqrt() * 3,
    "focal": _focal,
}  # fmt: skip
A_MEAN: dict[str, Loss] = QUIET | {
    "sum by its elements": lambda out, y: out.square().sum() / out.numel(),
    "sum times a number": lambda out, y: (1 / len(y)) * F.cross_entropy(out, y, reduction="sum"),
    "sum by a count": lambda out, y: out.square().sum() / (y >= 0).sum(),
    "sum of each sample": lambda out, y: out.square().sum(-1).mean(),
    "sum times the ranks": lambda out, y: F.cross_entropy(out, y, reduction="sum") * bmt.world_size(),
    "root of the mean over ranks": lambda out, y: bmt.mean(out.square()).sqrt(),
}


class Inside(nn.Module):
    """Gives its loss, as models of a library do."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": self.loss(out, y), "logits": out}


def _model(kind: str, loss: Loss) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))
    if kind == "outside":
        return bmt.BMTrainModelWrapper(net)
    model = Inside(net, loss)
    if kind == "recomputed":
        return bmt.Block(bmt.BMTrainModelWrapper(model), use_checkpoint=True)
    model = bmt.BMTrainModelWrapper(model)
    return bmt.compile(model, backend="eager") if kind == "compiled" else model


def said(where: str, names: list[str], words: str = "different counts") -> dict[str, list[str]]:
    """What is said of each loss, computed outside of the model or in it, by a backward of the manager or torch's."""
    found, ctx = {}, context()
    engine: Any = ctx.engine
    for name in names:
        engine.first_losses = FirstLosses(ctx, engine.backward, engine.first_steps)  # as in a new job
        loss = (SAID | A_MEAN | NO_MEAN)[name]
        model = _model(where, loss)
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(4):
                x = torch.randn(12, 4, generator=torch.Generator("cpu").manual_seed(step))
                y = torch.randint(5, (12,), generator=torch.Generator("cpu").manual_seed(step))
                x, y = bmt.shard_batch(x), bmt.shard_batch(y)
                manager.zero_grad()
                if where == "outside":
                    manager.backward(loss(model(x), y))
                elif where == "torch's":
                    model(x, y)["loss"].backward()
                else:
                    manager.backward(model(x, y)["loss"])
                manager.step()
        found[name] = [str(w.message) for w in caught if words in str(w.message)]
    return found


@pytest.mark.parametrize("where", ["outside", "inside", "torch's", "recomputed", "compiled"])
def test_what_is_a_mean_over_different_counts_is_said_once(where: str) -> None:
    few = {"recomputed": ("number", "mean"), "compiled": ("ignored", "masked", "mean")}
    names = list(few.get(where, SAID))
    found = run_ranks(2, said, where, names)
    assert {name: len(words) for name, words in found[0].items()} == dict.fromkeys(names, 1)
    assert not any(found[1].values())
    assert all(
        "test_first_losses.py:" in words[0] and "bmt.mean(losses, mask)" in words[0] for words in found[0].values()
    )


@pytest.mark.parametrize("where", ["outside", "inside", "recomputed"])
def test_nothing_is_said_of_other_losses(where: str) -> None:
    names = list(QUIET)
    assert run_ranks(2, said, where, names) == [{name: [] for name in names}] * 2
    if where == "inside":
        assert run_ranks(1, said, where, list(SAID)) == [{name: [] for name in SAID}]


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_what_is_no_mean_over_samples_is_said_once(where: str) -> None:
    names = list(NO_MEAN)
    found = run_ranks(2, said, where, names, "is not a mean over this rank's samples")
    assert {name: len(words) for name, words in found[0].items()} == dict.fromkeys(names, 1)
    assert not any(found[1].values())
    for name, (words,) in found[0].items():
        is_sum = name not in ("logarithm", "root", "focal")
        assert ("a sum over them" in words and "Multiply the loss by 2" in words) == is_sum
        assert ("bmt.mean(losses)" in words) != is_sum


def said_of_batches(kind: str) -> list[str]:
    """What is said of losses of whole batches, which all ranks have, or of parts of them."""
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            x = torch.randn(12, 4, generator=torch.Generator("cpu").manual_seed(step))
            z = model(bmt.shard_batch(x) if kind.startswith("parts") else x)
            manager.zero_grad()
            manager.backward(z.square().sum() if kind.endswith("summed") else (z @ z.t()).logsumexp(1).mean())
            manager.step()
    return [str(w.message) for w in caught if "same batches" not in str(w.message)]


@pytest.mark.parametrize("loss", ["summed", "compared"])
def test_nothing_is_said_of_losses_where_all_ranks_have_the_same_batches(loss: str) -> None:
    assert run_ranks(2, said_of_batches, f"whole, {loss}", fresh=True) == [[], []]
    first, second = run_ranks(2, said_of_batches, f"parts, {loss}", fresh=True)
    assert len(first) == 1 and not second


@pytest.mark.parametrize("where", ["outside", "inside", "recomputed"])
def test_nothing_is_said_of_means_over_samples(where: str) -> None:
    names = list(A_MEAN)
    assert run_ranks(2, said, where, names, "is not a mean over") == [{name: [] for name in names}] * 2
    if where == "inside":
        assert run_ranks(1, said, where, list(NO_MEAN), "is not a mean") == [{name: [] for name in NO_MEAN}]


def penalised(kind: str) -> list[str]:
    """What is said where sums of parameters are added to a mean."""
    model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 6)))
    ctx: Any = context()
    ctx.engine.first_losses = FirstLosses(ctx, ctx.engine.backward, ctx.engine.first_steps)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    first, second = model[0].weight, model[1].weight  # 12 and 6 rows: multiples of the samples
    penalty = {
        "squares": lambda: sum(p.square().sum() for p in model.parameters()),
        "product": lambda: (second @ first).square().sum(),
        "root": lambda: sum(p.abs().sum() for p in model.parameters()) ** 0.5,
    }[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = model(bmt.shard_batch(torch.randn(12, 4)))
        manager.backward(out.square().mean() + 1e-3 * penalty())
        manager.step()
    return [str(w.message) for w in caught if "is not a mean" in str(w.message)]


@pytest.mark.parametrize("kind", ["squares", "product", "root"])
def test_nothing_is_said_of_sums_of_parameters(kind: str) -> None:
    assert run_ranks(2, penalised, kind) == [[], []]


class _Holds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, held: list[Any]) -> torch.Tensor:
        ctx.what = _Held()
        held.append(weakref.ref(ctx.what))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient, None


class _Held:
    pass


def held_after_a_forward() -> bool:
    held: list[Any] = []

    class Model(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _Holds.apply(self.linear(x), held)  # type: ignore[no-any-return,no-untyped-call]

    model = Model()
    out = model(torch.ones(4, 3, device=context().device.torch_device))
    assert held[0]() is not None
    del out
    gc.collect()
    return held[0]() is not None


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_nobody_goes_back_through_is_not_held(ranks: int) -> None:
    assert not any(run_ranks(ranks, held_after_a_forward, fresh=True))
