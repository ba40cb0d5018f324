"""What a script shows on the terminal comes from one rank, in every spelling."""

from __future__ import annotations

import pytest

from ...helpers import converted

HEAD = """import pprint
import sys
import click
import rich
import torch
import tqdm
from pprint import pprint as show
from sys import stderr, stdout
from tqdm import tqdm as bars
from tqdm.auto import tqdm as auto

net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
put = sys.stdout.write
bar = bars(loader)
for x, y in bar:
    loss = torch.nn.functional.mse_loss(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('sys.stdout.write(" [")', 'bmt.print_rank(" [", end="")'),
        ('stdout.write("a" + "b")', 'bmt.print_rank("a" + "b", end="")'),
        ('put("a")', 'bmt.print_rank("a", end="")'),
        ('sys.stderr.write("a")', 'bmt.print_rank("a", end="", file=sys.stderr)'),
        ('stderr.write("a")', 'bmt.print_rank("a", end="", file=stderr)'),
        ('print("a", file=sys.stderr)', 'bmt.print_rank("a", file=sys.stderr)'),
        ('sys.stdout.write("%.3f" % loss.item())', 'bmt.print_rank("%.3f" % bmt.sum_loss(loss).item(), end="")'),
    ],
)
def test_a_stream_is_written_by_one_rank(before: str, after: str) -> None:
    assert f"    {after}\n" in converted(f"{HEAD}    {before}\n")


@pytest.mark.parametrize(
    "statement",
    [
        'pprint.pprint({"a": 1})',
        'show({"a": 1})',
        'rich.print("a")',
        'click.echo("a")',
        'bars.write("a")',
        'tqdm.tqdm.write("a")',
        'auto.write("a")',
        'bar.write("a")',
    ],
)
def test_other_functions_that_print_are_left_to_one_rank(statement: str) -> None:
    assert f"    if bmt.rank() == 0:\n        {statement}\n" in converted(f"{HEAD}    {statement}\n")


def test_what_is_shown_above_a_bar_is_made_by_all_ranks() -> None:
    after = converted(f'{HEAD}    bars.write(f"{{loss.item():.3f}}")\n')
    assert "    value = bmt.sum_loss(loss).item()\n    if bmt.rank() == 0:\n" in after
    assert '        bars.write(f"{value:.3f}")\n' in after


@pytest.mark.parametrize(
    "statement",
    ["sys.stdout.flush()", 'n = sys.stdout.write("a")', 'held.write("a")', "sys.stdout.write(*parts)"],
)
def test_what_is_none_stays(statement: str) -> None:
    assert f"    {statement}\n" in converted(f"{HEAD}    {statement}\n")
