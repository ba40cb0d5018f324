"""Averages and tables of losses that are read already: nothing is said of them, and nothing else is made of them."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.plan import Options

HEAD = """import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

net = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=8)
ema = None
bar = tqdm(loader)
for step, (x, y) in enumerate(bar):
    out = net(x)
    loss = torch.nn.functional.cross_entropy(out, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
SHOW = '    bar.set_description(f"{ema:.4f}")\n'
BLENDS = {
    "under a test": "if ema is None:\n    ema = {}\nelse:\n    ema = 0.9 * ema + 0.1 * {}",
    "the test alone": "if step == 0:\n    ema = {}\nema = 0.9 * ema + 0.1 * {}",
    "in one line": "ema = {} if ema is None else 0.9 * ema + 0.1 * {}",
    "turned round": "ema = 0.9 * ema + 0.1 * {} if ema else {}",
    "of two": "if ema is None:\n    ema = {0}\nelif ema > 0:\n    ema = ema * 0.9 + {1} * 0.1",
    "from nothing": "ema = 0.9 * ema + 0.1 * {}",
    "a number's name": "now = {}\nema = now if ema is None else 0.9 * ema + 0.1 * now",
}
TABLES = {
    "a table": 'logs = {"loss": loss.item(), "step": step}\nbar.set_postfix(**logs)',
    "a name in it": 'now = loss.detach().item()\nlogs = {"loss": now, "lr": opt.param_groups[0]["lr"]}\nprint(logs)',
    "a pair": "both = (step, loss.item())\nprint(both)",
    "a float": 'logs = dict()\nlogs = {"loss": float(loss)}\nprint(logs)',
}


def said(body: str) -> tuple[str, list[str]]:
    text = HEAD + "".join(f"    {line}\n" for line in body.splitlines())
    result = convert_text(text, Options())
    assert not result.error
    return result.after.decode(), [finding.message for finding in result.reported]


@pytest.mark.parametrize("blend", BLENDS.values(), ids=BLENDS.keys())
def test_an_average_of_losses(blend: str) -> None:
    after, remarks = said(blend.format("loss.item()", "loss.item()") + "\n" + SHOW.strip())
    assert not remarks and "bmt.sum_loss(loss).item()" in after and "bmt.total" not in after
    assert after.count("bmt.sum_loss(loss)") == blend.count("{")


@pytest.mark.parametrize("blend", BLENDS.values(), ids=BLENDS.keys())
def test_an_average_of_hits(blend: str) -> None:
    hits = "(out.argmax(1) == y).float().mean().item()"
    after, _ = said(blend.format(hits, hits) + "\n" + SHOW.strip())
    assert after.count("bmt.sum_loss(") == max(after.count(hits), after.count("now") - 1) and after.count(hits)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_a_table_of_losses(table: str) -> None:
    after, remarks = said(table)
    assert not remarks and "bmt.sum_loss(loss)" in after


@pytest.mark.parametrize("value", ["(out.argmax(1) == y).sum().item()", "len(x)"])
def test_a_count_in_a_table_is_that_of_all_ranks(value: str) -> None:
    after, remarks = said(f'logs = {{"loss": loss.item(), "hits": {value}}}\nbar.set_postfix(**logs)')
    assert not remarks and f'"hits": bmt.total({value})' in after


@pytest.mark.parametrize("value", ["out.max().item()", "out.std().item()"])
def test_a_table_of_anything_else_is_reported(value: str) -> None:
    _, remarks = said(f'logs = {{"loss": loss.item(), "hits": {value}}}\nbar.set_postfix(**logs)')
    assert any("this rank's share of the data" in remark for remark in remarks)
