"""Roots, logarithms and the like of a mean are no means: of losses they are made of all ranks'; others are said."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted

SCRIPT = """import math
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
X = torch.randn(24, 4)
Y = 0.3 * X.sum(1, keepdim=True)
net = nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.05)
rows = []
for x, y in DataLoader(TensorDataset(X, Y), batch_size=8):
    loss = nn.functional.mse_loss(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    {body}
"""


def script(body: str) -> str:
    return SCRIPT.format(body=body.replace("; ", "\n    "))


def told(text: str) -> list[str]:
    return [found.message for found in convert_text(text).reported if "share of the data" in found.message]


LEFT = {
    "a multiple": ("bits = loss / 0.693; print(bits.item())", "bits = loss / 0.693\n"),
    "what is trained on": ("root = loss.sqrt(); root.backward()", "root = loss.sqrt()\n"),
    "what another is made of": (
        "root = loss.sqrt(); more = root + net(x).mean(); more.backward()", "root = loss.sqrt()\n"
    ),
    "what is handed on": ("root = loss.sqrt(); keep(root)", "root = loss.sqrt()\n"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "kept"), LEFT.values(), ids=LEFT)
def test_other_values_are_made_as_they_were(body: str, kept: str) -> None:
    assert kept in converted(script(body))


SAID = {
    "by name": "mse = (net(x) - y).pow(2).mean(); rmse = torch.sqrt(mse); print(rmse.item())",
    "by another name": "mse = (net(x) - y).pow(2).mean(); z = mse.sqrt(); print(z.item())",
    "at once": "print((net(x) - y).pow(2).mean().sqrt().item())",
    "a power": "rmse = (net(x) - y).pow(2).mean() ** 0.5; print('%.3f' % rmse)",
    "collected": "rows.append((net(x) - y).pow(2).mean().sqrt().item())",
    "of a number": "rows.append(math.sqrt((net(x) - y).pow(2).mean().item()))",
    "of numpy": "z = np.sqrt((net(x) - y).pow(2).mean().item()); print(z)",
    "a ratio": "d = (net(x) - y).pow(2).mean(); psnr = 10 * torch.log10(1 / d); rows.append(psnr.item())",
    "a ratio of means": "snr = y.pow(2).mean() / (net(x) - y).pow(2).mean(); print(snr.item())",
}


@pytest.mark.parametrize("body", SAID.values(), ids=SAID)
def test_functions_of_other_means_are_said(body: str) -> None:
    text = script(body)
    after = convert_text(text).after.decode()
    assert told(text) and not {"sum_loss", "gather_samples"} & set(after.replace("(", ".").split("."))


MADE = {
    "an exponential": "ppl = torch.exp(loss); print('%.4f' % ppl.item())",
    "as a number": "ppl = torch.exp(loss); print('%.4f' % float(ppl))",
    "in a text": "ppl = loss.exp(); print(f'{ppl:.4f}')",
    "cut off": "ppl = torch.exp(loss.detach()); print('%.4f' % ppl.item())",
    "of math": "ppl = math.exp(loss); print('%.4f' % ppl)",
    "a root": "rmse = loss.sqrt(); rows.append(rmse.item()); print('%.4f' % rows[-1])",
    "a power": "rmse = loss ** 0.5; print('%.4f' % rmse)",
    "a ratio": "psnr = 10 * torch.log10(1 / loss); print('%.4f' % psnr.item())",
    "of its number": "psnr = 10 * math.log10(1 / loss.item()); print('%.4f' % psnr)",
    "of numpy": "rows.append(np.sqrt(loss.item())); print('%.4f' % rows[-1])",
    "a power of its number": "rows.append(loss.item() ** 0.5); print('%.4f' % rows[-1])",
}


def play(text: str) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(text, "program.py", "exec"), {"__name__": "__main__"})
    return shown.getvalue()


@pytest.mark.parametrize("body", MADE.values(), ids=MADE)
def test_functions_of_losses_are_those_of_the_batchs(body: str) -> None:
    text = script(body)
    after = converted(text)
    assert not told(text) and after.count("sum_loss(") == 1
    (one,) = run_ranks(1, play, text, initialize=False, fresh=True)
    two = run_ranks(2, play, after, initialize=False, fresh=True)
    assert two[0] == one and one.count("\n") == 3
