"""What functions of the project make that of all ranks: it is no share any more."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


"""
REDUCERS = {
    "a dict": """def over(values, average=True):
    if world_size() < 2:
        return values
    with torch.no_grad():
        names, held = [], []
        for name in sorted(values.keys()):
            names.append(name)
            held.append(values[name])
        held = torch.stack(held, dim=0)
        dist.all_reduce(held)
        if average:
            held /= world_size()
        reduced = {name: value for name, value in zip(names, held)}
    return reduced
""",
    "what is given": """def over(values):
    if not dist.is_initialized():
        return values
    found = {}
    for name, value in values.items():
        value = value.clone()
        dist.all_reduce(value)
        found[name] = value / dist.get_world_size()
    return found
""",
    "all that is gathered": """def all_of(value):
    held = [torch.zeros_like(value) for _ in range(world_size())]
    dist.all_gather(held, value)
    return torch.stack(held).mean()


def over(values):
    return {name: all_of(value) for name, value in values.items()}
""",
}
NO_REDUCERS = {
    "nothing": "def over(values):\n    return {name: value.detach() for name, value in values.items()}\n",
    "another": """def over(values):
    ready = torch.ones(1)
    dist.all_reduce(ready)
    return {name: value.detach() for name, value in values.items()}
""",
    "some of it": """def over(values, all_of=False):
    if all_of:
        total = torch.stack(list(values.values()))
        dist.all_reduce(total)
        return dict(zip(values, total))
    return values
""",
}
LOOP = """

def criterion(out, y):
    return {"ce": nn.functional.cross_entropy(out, y), "size": out.square().mean(), "err": out.abs().mean()}


net = nn.Linear(4, 3)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=4)
weights = {"ce": 1.0, "size": 0.1}
for x, y in loader:
    losses = criterion(net(x), y)
    loss = sum(losses[k] * weights[k] for k in losses.keys() if k in weights)
    reduced = over(losses)
    scaled = {k: v * weights[k] for k, v in reduced.items() if k in weights}
    shown = sum(scaled.values())
    value = shown.item()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(value)
"""


def converted_and_told(reducer: str) -> tuple[str, list[str]]:
    result = convert_text(HEAD + reducer + LOOP)
    assert not result.error
    return result.after.decode(), [said.message for said in result.reported if said.code == "BMT037"]


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS.keys())
def test_it_is_shown_as_it_is(reducer: str) -> None:
    after, told = converted_and_told(reducer)
    assert "bmt.print_rank(value)" in after
    assert "value = shown.item()" in after
    assert told == []


@pytest.mark.parametrize("reducer", NO_REDUCERS.values(), ids=NO_REDUCERS.keys())
def test_what_is_a_share_still_is_no_batchs(reducer: str) -> None:
    after, told = converted_and_told(reducer)
    assert told or "bmt.sum_loss" in after or "bmt.total" in after


@pytest.mark.parametrize("collected", ["y = y.cpu()", "y = y", "y = y.float().cpu()\n        y = y.long()"])
def test_what_is_made_of_itself_is_collected(collected: str) -> None:
    text = f"""import torch
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def embed(net, loader):
    outs, labels = [], []
    for x, y in loader:
        with torch.no_grad():
            out = net(x).cpu()
        {collected}
        outs.append(out)
        labels.append(y)
        print(y)
    return torch.cat(outs), torch.cat(labels)


loader = DataLoader(data, batch_size=4)
for x, y in loader:
    net(x).mean().backward()
    opt.step()
embed(net, loader)
"""
    assert not convert_text(text).error
