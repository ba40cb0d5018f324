"""A text of numbers that are made those of all ranks where it is put together is nothing of a share any more."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch.utils.data import DataLoader

model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
criterion = torch.nn.CrossEntropyLoss()
step = 0
form = "{{:.3f}}"
old = "%.3f"
for x, y in DataLoader(data, batch_size=4):
    loss = criterion(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    seen = len(x)
    acc = (model(x).argmax(1) == y).float().mean().item()
    text = {text}
    print(text)
    logger.info(text)
"""
OF_ALL = [
    'f"{loss.item():.3f}"',
    'f"{step} {loss.item():.3f} {acc:.2f}"',
    'f"{loss.item():.2f} after {seen}"',
    'f"{(model(x).argmax(1) == y).sum().item()} of {len(x)}"',
    '"{} {}".format(step, loss.item())',
    '"{a}".format(a=loss.item())',
    "form.format(loss.item())",
    '" ".join([str(step), str(loss.item())])',
    '"%d %.3f" % (step, loss.item())',
    '"loss " + str(loss.item())',
    '"nothing of the batch"',
]
OF_A_SHARE = [
    'f"{x.max().item()}"',
    'f"{loss.item():.3f} {x.max().item()}"',
    '"{}".format(y.tolist())',
    'f"{loss.item():.2f} {x.norm().item():.2f}"',
    '"{} {}".format(loss.item(), x.std().item())',
    "form.format(x.max().item())",
    "old % x.norm().item()",
    "str(x.max().item())",
    '" ".join([str(x.std().item())])',
    '" ".join(f"{v:.2f}" for v in (acc, step))',
]


MADE_WHOLE = {
    "form.format(acc)": "form.format(bmt.sum_loss(acc))",
    "old % acc": "old % bmt.sum_loss(acc)",
    "names.form % (step, acc)": "names.form % (step, bmt.sum_loss(acc))",
    "str(acc)": "str(bmt.sum_loss(acc))",
    "repr(acc)": "repr(bmt.sum_loss(acc))",
    "str(round(acc, 2))": "str(round(bmt.sum_loss(acc), 2))",
    'format(acc, ".2f")': 'format(bmt.sum_loss(acc), ".2f")',
    'format(seen, "d")': 'format(bmt.total(seen), "d")',
    '"acc " + format(acc, ".2f")': '"acc " + format(bmt.sum_loss(acc), ".2f")',
    '" ".join(["a", str(acc)])': '" ".join(["a", str(bmt.sum_loss(acc))])',
    '" ".join(map(str, (acc, step)))': '" ".join(map(str, (bmt.sum_loss(acc), step)))',
}


def said(text: str) -> list[str]:
    return [remark.message for remark in convert_text(SCRIPT.format(text=text)).reported if remark.code == "BMT037"]


@pytest.mark.parametrize("text", OF_ALL)
def test_nothing_is_said(text: str) -> None:
    assert not said(text)


@pytest.mark.parametrize("text", OF_A_SHARE)
def test_a_share_is_said(text: str) -> None:
    assert any("may be of this rank's share" in message for message in said(text))


@pytest.mark.parametrize("text", MADE_WHOLE)
def test_numbers_are_those_of_all_ranks(text: str) -> None:
    result = convert_text(SCRIPT.format(text=text))
    assert f"    text = {MADE_WHOLE[text]}\n    bmt.print_rank(text)\n" in result.after.decode()
    assert not said(text)


@pytest.mark.parametrize("text", MADE_WHOLE)
def test_so_they_are_where_it_is_printed(text: str) -> None:
    script = SCRIPT.format(text="None").replace("print(text)", f"print({text})")
    assert f"bmt.print_rank({MADE_WHOLE[text]})" in convert_text(script).after.decode()
