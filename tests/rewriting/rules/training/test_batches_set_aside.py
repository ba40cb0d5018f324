"""Batches that are taken with ``next`` inside a loop that trains, to look at the model only."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import torch
from torch.utils.data import DataLoader


def cycle(loader):
    while True:
        for batch in loader:
            yield batch


model = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(model.parameters())
train = {first}(DataLoader(data, batch_size=8, shuffle=True))
valid = {first}(DataLoader(held_out, batch_size=8))
for step in range(10):
    for _ in range(2):
        x, y = next(train)
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
    opt.step()
    opt.zero_grad()
    print(loss.item())
"""
ASIDE = [
    """    if step % 5 == 0:
        model.eval()
        with torch.no_grad():
            x, y = next(valid)
            print(torch.nn.functional.mse_loss(model(x), y).item())
""",
    """    if step % 5 == 0:
        x, y = next(valid)
        valid_loss = torch.nn.functional.mse_loss(model(x), y)
        print(valid_loss.item())
""",
    """    with torch.inference_mode():
        batch = next(valid)
        valid_loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        print(valid_loss.item())
""",
    """    with torch.no_grad():
        loss = model(next(valid)[0]).mean()
        print(loss.item())
""",
]
TRAINED = [
    """    if step % 5 == 0:
        x, y = next(valid)
        torch.nn.functional.mse_loss(model(x), y).backward()
""",
    """    if step % 5 == 0:
        extra = next(valid)
    torch.nn.functional.mse_loss(model(extra[0]), extra[1]).backward()
""",
    """    if step:
        model(extra[0]).mean().backward()
    with torch.no_grad():
        extra = next(valid)
""",
]


@pytest.mark.parametrize("first", ["cycle", "iter"])
@pytest.mark.parametrize("block", ASIDE)
def test_every_rank_sees_all_of_what_is_only_looked_at(block: str, first: str) -> None:
    after = converted(HEAD.format(first=first) + block)
    assert f"train = {first}(bmt.shard_loader(DataLoader(data, " in after
    assert f"valid = {first}(DataLoader(held_out, " in after


@pytest.mark.parametrize("block", TRAINED)
def test_what_is_trained_on_is_shared(block: str) -> None:
    assert "valid = cycle(bmt.shard_loader(DataLoader(held_out, " in converted(HEAD.format(first="cycle") + block)


def test_a_loop_through_another_loader_that_looks_at_some_batches() -> None:
    after = converted("""import torch
from torch.utils.data import DataLoader

model = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(model.parameters())
loader = DataLoader(data, batch_size=8, shuffle=True)
test_loader = DataLoader(held_out, batch_size=8, shuffle=True)
for i, batch in enumerate(loader):
    x, y = batch
    opt.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    opt.step()
    if i % 10 == 0:
        j, batch = next(enumerate(test_loader, 0))
        x, y = batch
        loss = torch.nn.functional.mse_loss(model(x), y)
        print(loss.item())
""")
    assert "\ntest_loader = DataLoader(held_out, " in after


def test_a_generator_of_batches_does_not_evaluate() -> None:
    text = HEAD.format(first="cycle").replace("train = cycle(DataLoader", "train_loader = (DataLoader")
    text = text.replace("valid = ", "train = cycle(train_loader)\nvalid = ")
    result = convert_text(text)
    assert not any("gets the training data" in finding.message for finding in result.reported)
