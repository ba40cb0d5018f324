"""A dict of numbers that each pass of a loop writes out holds those of all ranks, however it is gone through."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 3)
opt = torch.optim.Adam(net.parameters())
train_loader = DataLoader(data, batch_size=8, shuffle=True)
history, sums, logs = [], {"loss": 0.0, "n": 0}, {}
for i, (x, y) in enumerate(train_loader):
    out = net(x)
    acc = (out.argmax(1) == y).float().mean()
    loss = F.cross_entropy(out, y)
    loss.backward()
    opt.step()
    opt.zero_grad()
"""
LOSS, ACC, SIZE = "bmt.sum_loss(loss).item()", "bmt.sum_loss(acc.item())", "bmt.total(len(x))"
SHOW = "for k, v in logs.items():\n        print(k, v)"
NAME = "top = (out.detach().argmax(1) == y).float().mean().item()\n    "
WHOLE = {
    "beside a rate": ("logs = {'loss': loss.item(), 'lr': opt.param_groups[0]['lr'], 'step': i}", SHOW, LOSS),
    "a mean beside a rate": ("logs = {'acc': acc.item(), 'lr': 0.1}", SHOW, ACC),
    "sorted": ("logs = {'acc': acc.item(), 'lr': 0.1}", SHOW.replace("logs.items()", "sorted(logs.items())"), ACC),
    "keywords": ("logs = dict(loss=loss.item(), acc=acc.item())", SHOW, f"dict(loss={LOSS}, acc={ACC})"),
    "a size": ("logs = {'loss': loss.item(), 'n': len(x)}", SHOW, f"'n': {SIZE}"),
    "a size that is kept": ("logs = {'loss': loss.item(), 'n': len(x)}", "history.append(logs)", f"'n': {SIZE}"),
    "a size that weighs": (
        "logs = {'loss': loss.item(), 'n': len(x)}",
        "sums['loss'] += logs['loss'] * logs['n']\n    sums['n'] += logs['n']",
        f"'n': {SIZE}",
    ),
    "its keys": ("logs = {'loss': loss.item(), 'acc': acc.item()}", "for k in logs:\n        print(k, logs[k])", ACC),
    "rounded": ("logs = {'acc': round(acc.item(), 4)}", SHOW, f"round({ACC}, 4)"),
    "in percent": ("logs = {'acc': 100 * acc.item()}", SHOW, "bmt.sum_loss(100 * acc.item())"),
    "now and then": ("logs = {'lr': 0.1}\n    if i % 2 == 0:\n        logs['acc'] = acc.item()", SHOW, ACC),
    "a name": (f"{NAME}logs = {{'acc': top, 'lr': 0.1}}", SHOW, "{'acc': bmt.sum_loss(top), 'lr'"),
    "a name, by a keyword": (f"{NAME}logs = dict(acc=top)", "history.append(logs)", "dict(acc=bmt.sum_loss(top))"),
    "a name beside a loss": (
        f"{NAME}logs = {{'acc': top, 'loss': loss.item()}}",
        SHOW,
        f"bmt.sum_loss(top), 'loss': {LOSS}",
    ),
    "a name, filled": (f"{NAME}logs = {{}}\n    logs['acc'] = top", "print(logs)", "logs['acc'] = bmt.sum_loss(top)"),
    "a name, nested": (f"{NAME}logs = {{'m': {{'acc': top}}}}", "print(logs['m'])", "{'acc': bmt.sum_loss(top)}"),
    "filled": ("logs = {}\n    logs['loss'] = loss.item()\n    logs['acc'] = acc.item()", "print(logs)", ACC),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_of_all_ranks_is_not_reported_where_it_is_shown(name: str) -> None:
    made, used, expected = WHOLE[name]
    result = convert_text(f"{HEAD}    {made}\n    {used}\n")
    assert expected in (after := result.after.decode())
    assert "sum_loss(k)" not in after and "gather_samples" not in after
    assert not any("share of" in finding.message for finding in result.reported)


@pytest.mark.parametrize(
    ("made", "used"),
    [
        ("logs = {'loss': loss, 'acc': acc}", "print(logs)"),
        ("logs = {'loss': loss, 'acc': acc}", "pass\nprint(logs)"),
        ("logs = {'loss': loss.item(), 'top': out.max().item()}", SHOW),
        ("logs = {'loss': loss.item(), 'top': out.max().item()}", "pass\nprint(logs)"),
        ("logs = dict(zip('abc', out.mean(0).tolist()))", SHOW),
        (f"{NAME}logs = locals()", "note(logs)"),
        ("logs = {}", "print(2 ** len(x))"),
        (f"{NAME}note(['top'], values=locals())", "pass"),
        (f"{NAME}logs = {{'acc': top}}\n    top = out.max()", "print(logs)"),
    ],
)
def test_a_dict_of_anything_else_is_reported_where_it_is_shown(made: str, used: str) -> None:
    result = convert_text(f"{HEAD}    {made}\n    {used}\n")
    assert any("share of" in finding.message for finding in result.reported)


def test_a_dict_of_data_is_left() -> None:
    line = "logs = {'x': x, 'n': len(x)}\n    history.append(net(logs['x']).argmax(1).tolist())\n"
    assert "'n': len(x)}" in convert_text(f"{HEAD}    {line}").after.decode()


def test_a_size_is_reported_where_the_loader_has_no_name() -> None:
    head = HEAD.replace("train_loader = DataLoader(", "def get():\n    return DataLoader(").replace(
        "(train_loader)", "(get())"
    )
    result = convert_text(f"{head}    logs = {{'loss': loss.item(), 'n': len(x)}}\n    print(logs)\n")
    assert "'n': len(x)" in result.after.decode()
    assert any("len(x) is the size of this rank's share" in finding.message for finding in result.reported)


def test_how_long_a_line_is_is_no_size_of_a_batch() -> None:
    head = HEAD.replace(
        "net = ", "\ndef table(columns):\n    line = '|'\n    for column in columns:\n{lines}\n\nnet = ", 1
    )
    shown = ["line += column", "print('-' * len(line))", "print(len(line) * '=')", "print(len(line))", "print(line)"]
    head = head.replace("{lines}", "\n".join(f"{'        ' if n < 1 else '    '}{one}" for n, one in enumerate(shown)))
    result = convert_text(f"{head}    table([f'{{loss.item()}} |', f'{{acc.item()}} |'])\n")
    assert "print_rank(len(line) * '=')" in result.after.decode() and not result.reported
