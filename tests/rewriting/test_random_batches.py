"""Random batches are shared out; what is drawn with the size of a tensor that is there already goes with it."""

from __future__ import annotations

import pytest

from .helpers import converted

SCRIPT = """import torch

batch_size = 8
batch = 8


def mask_of(x):
    {size}
    return {drawn} < 0.5


model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), 0.1)
for step in range(10):
    x = torch.randn(batch_size, 4)
    loss = (model(x) * mask_of(x)).mean()
    loss.backward()
    opt.step()
"""


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ("batch, width = x.shape", "torch.rand(batch, width)"),
        ("batch, width, device = *x.shape, x.device", "torch.rand((batch, width), device=device)"),
        ("batch = x.size(0)", "torch.rand(batch, 1)"),
        ("batch_size = len(x)", "torch.rand(size=(batch_size, 1))"),
        ("b, *_ = x.shape\n    batch = b", "torch.rand(x.shape[0], 1)"),
    ],
)
def test_what_has_the_size_of_a_tensor_keeps_it(size: str, drawn: str) -> None:
    after = converted(SCRIPT.format(size=size, drawn=drawn))
    assert f"return {drawn} < 0.5" in after and "x = bmt.shard_batch(torch.randn(batch_size, 4))" in after


def test_what_has_a_size_of_its_own_is_shared() -> None:
    after = converted(SCRIPT.format(size="pass", drawn="torch.rand(batch, 1).float()"))
    assert "bmt.shard_batch(torch.rand(batch, 1)).float() < 0.5" in after


def test_a_limit_that_is_a_length_is_no_size() -> None:
    after = converted(SCRIPT.format(size="limit = len(x)", drawn="torch.randint(limit, (batch, 1)).float()"))
    assert "bmt.shard_batch(torch.randint(limit, (batch, 1))).float() < 0.5" in after
