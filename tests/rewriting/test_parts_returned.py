"""Numbers of a batch that a training step gives back are this rank's: reported, or made of all where it is clear."""

from __future__ import annotations

import pytest

from rewriter.convert import Result, convert_text

SCRIPT = """import torch
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def step(net, opt, {given}):
    {taken}
    out = net(x)
    part = out.abs().mean()
    loss = torch.nn.functional.mse_loss(out, y) + part
    opt.zero_grad()
    loss.backward()
    opt.step()
    {returned}


def endless(loader):
    while True:
        yield from loader


{loop}
"""
PULLED = {
    "given": "batches",
    "taken": "x, y = next(batches)",
    "loop": "batches = endless(DataLoader(data, 8))\nfor _ in range(9):\n    print(step(net, opt, batches))",
}
HANDED = {
    "given": "x, y",
    "taken": "x = x.float()",
    "loop": "for x, y in DataLoader(data, 8):\n    print(step(net, opt, x, y))",
}
OF_SHARE = {
    "alone": "return part.item()",
    "float": "return float(part)",
    "of two": "return loss, part.item()",
    "in a list of the step": "found = [loss.item(), part.item()]\n    return found",
    "cut off": "return part.detach().cpu().numpy()",
    "a count": "return (out.argmax(1) == y).sum().item()",
}
MADE_OF_ALL = {
    "in a dict": 'return {"loss": loss.item(), "part": part.item()}',
    "in a dict with others": 'return {**logs, "part": part.item()}',
    "in a dict of the step": 'log = {\n        "a": loss.item(),\n        "b": part.item(),\n    }\n    return log',
}
OF_ALL = {
    "the loss": "return loss.item()",
    "the loss in a dict": 'return {"loss": loss.item()}',
    "the loss to go back by": "return loss",
    "what is in the graph": "return part",
    "a rate": 'return {"rate": opt.param_groups[0]["lr"]}',
    "the mean over the ranks": "return bmt.sum_loss(part).item()",
    "nothing": "return",
}


def converted(returned: str, way: dict[str, str]) -> Result:
    return convert_text("import bmtrain as bmt\n" + SCRIPT.format(returned=returned, **way))


def reported(returned: str, way: dict[str, str]) -> bool:
    found = converted(returned, way).reported
    return any("of this rank's share of the batch" in said.message for said in found)


@pytest.mark.parametrize("way", [PULLED, HANDED], ids=["pulled", "handed"])
@pytest.mark.parametrize("returned", OF_SHARE.values(), ids=OF_SHARE.keys())
def test_a_number_of_this_rank(returned: str, way: dict[str, str]) -> None:
    assert reported(returned, way)


@pytest.mark.parametrize("way", [PULLED, HANDED], ids=["pulled", "handed"])
@pytest.mark.parametrize("returned", OF_ALL.values(), ids=OF_ALL.keys())
def test_a_number_of_all(returned: str, way: dict[str, str]) -> None:
    assert not reported(returned, way)


@pytest.mark.parametrize("way", [PULLED, HANDED], ids=["pulled", "handed"])
@pytest.mark.parametrize("returned", MADE_OF_ALL.values(), ids=MADE_OF_ALL.keys())
def test_a_mean_in_a_dict_becomes_that_of_all(returned: str, way: dict[str, str]) -> None:
    assert not reported(returned, way)
    assert "bmt.sum_loss(part.item())" in converted(returned, way).after.decode()


def test_a_dict_that_is_made_of_itself_is_followed_to_an_end() -> None:
    kept = "batch = {'x': batch[0], 'y': batch[1]}"
    loop = f"for batch in DataLoader(data, 8):\n    {kept}\n    print(step(net, opt, **batch))"
    way = {"given": "x, y", "taken": "x = x.float()", "loop": loop}
    assert "bmt.sum_loss(loss).item()" in converted("return loss.item()", way).after.decode()
