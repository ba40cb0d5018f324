"""Means where ranks count differently: the mean of the whole batch on one process is right."""

from __future__ import annotations

import warnings
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bmtrain as bmt

ROWS, CLASSES = 7, 5


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, oracle.WIDTH, generator=generator)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    y[1] = y[5] = -100
    return x, y


def share(x: torch.Tensor) -> torch.Tensor:
    return x.tensor_split(bmt.world_size())[bmt.rank()]


def both() -> tuple[Any, Any]:
    torch.manual_seed(1)
    plain = nn.Linear(oracle.WIDTH, CLASSES)
    torch.manual_seed(1)
    return plain, bmt.BMTrainModelWrapper(nn.Linear(oracle.WIDTH, CLASSES))


def check(plain: Any, model: Any, whole: torch.Tensor, loss: torch.Tensor, managed: bool) -> None:
    whole.backward()  # type: ignore[no-untyped-call]
    if managed:
        bmt.optim.OptimManager().backward(loss)
    else:
        loss.backward()  # type: ignore[no-untyped-call]
    oracle.assert_close(loss.detach(), whole.detach(), "the loss")
    oracle.assert_close(bmt.sum_loss(loss.detach()), whole.detach(), "the loss over ranks")
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        found = bmt.gather_grad(ours)
        assert found is not None and theirs.grad is not None
        oracle.assert_close(found, theirs.grad, "a gradient")


@pytest.mark.parametrize("managed", [True, False])
@on_ranks(1, 2, 3)
def test_means_count_every_element_once(managed: bool) -> None:
    x, y = data()
    counted = y != -100
    weights = torch.linspace(0.1, 2, ROWS)

    def squares(model: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(x).square()
        return out

    plain, model = both()
    check(plain, model, squares(plain, x).mean(), bmt.mean(squares(model, share(x))), managed)
    plain, model = both()
    check(
        plain, model, squares(plain, x)[counted].mean(),
        bmt.mean(squares(model, share(x)), share(counted)[:, None]), managed,
    )  # fmt: skip
    plain, model = both()
    expected = (squares(plain, x) * weights[:, None]).sum() / weights.sum() / CLASSES
    check(plain, model, expected, bmt.mean(squares(model, share(x)), share(weights)[:, None]), managed)
    plain, model = both()
    first = torch.zeros(ROWS, dtype=torch.bool)
    first[0] = True  # on one rank alone
    check(plain, model, squares(plain, x)[0].mean(), bmt.mean(squares(model, share(x)), share(first)[:, None]), managed)


@pytest.mark.parametrize("options", [
    {}, {"ignore_index": -100, "label_smoothing": 0.1}, {"weight": torch.linspace(0.2, 2, CLASSES)},
    {"weight": torch.linspace(0.2, 2, CLASSES), "label_smoothing": 0.2},
])  # fmt: skip
@on_ranks(1, 2, 3)
def test_cross_entropy(options: dict[str, Any]) -> None:
    x, y = data()
    plain, model = both()
    loss = bmt.loss.FusedCrossEntropy(**options)
    check(plain, model, F.cross_entropy(plain(x), y, **options), loss(model(share(x)), share(y)), True)
    plain, model = both()
    rows = F.one_hot(y.clamp(min=0), CLASSES).float().lerp(torch.full((ROWS, CLASSES), 0.2), 0.3)
    options.pop("ignore_index", None)
    check(plain, model, F.cross_entropy(plain(x), rows, **options), loss(model(share(x)), share(rows)), False)


@on_ranks(2)
def test_a_ranks_own_mean() -> None:
    x, y = data()
    _, model = both()
    logits = model(share(x))
    for loss, given in (
        (bmt.loss.FusedCrossEntropy(over_ranks=False), logits),
        (bmt.loss.FusedCrossEntropy(), logits.detach()),
    ):
        oracle.assert_close(loss(given, share(y)), F.cross_entropy(logits, share(y)), "the loss")


@on_ranks(1, 2, 3)
def test_the_average_of_shown_losses() -> None:
    values = torch.linspace(1, 2, ROWS)
    mine = share(values)
    assert bmt.sum_loss(mine.mean().item(), count=len(mine)) == pytest.approx(values.mean().item())
    oracle.assert_close(bmt.sum_loss(mine.mean(), count=len(mine)), values.mean(), "the average")
    nothing = torch.tensor(float("nan")) if bmt.rank() else torch.tensor(3.0)
    assert float(bmt.sum_loss(nothing, count=0 if bmt.rank() else 4)) == 3.0


@on_ranks(2)
def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(bmt.errors.ConfigurationError, match="mask"):
        bmt.mean(torch.ones(3), torch.ones(2, dtype=torch.bool))


@on_ranks(1, 2)
def test_uneven_batches_are_told_of_once() -> None:
    x, y = data()
    for options, expected in (({"batch_size": 3}, 1), ({"batch_size": 2, "drop_last": True}, 0)):
        loader = bmt.shard_loader(DataLoader(TensorDataset(x, y), **options))  # type: ignore[arg-type]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                list(loader)
        told = [w for w in seen if "evenly" in str(w.message)]
        assert len(told) == (expected if bmt.rank() == 0 and bmt.world_size() > 1 else 0)


@on_ranks(2)
def test_samples_that_ranks_have_in_common_are_told_of() -> None:
    for rows, expected in ((3, False), (1, True)):
        loader = bmt.shard_loader(DataLoader(TensorDataset(torch.arange(rows)), batch_size=3))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            list(loader)
        told = [str(w.message) for w in seen if "evenly" in str(w.message)]
        assert len(told) == (bmt.rank() == 0)
        assert all(("several ranks" in text) == expected for text in told)
