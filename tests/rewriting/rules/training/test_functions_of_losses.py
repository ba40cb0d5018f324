"""A perplexity, a root or a logarithm of a loss that is shown is that of the mean over the ranks."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

SCRIPT = """import math
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)
for epoch in range(2):
    total = 0
    for (x,) in loader:
        {loss}
        total += loss.detach()
        loss.backward()
        opt.step()
        opt.zero_grad()
    mean = total / len(loader)
    {shown}
"""


def script(shown: str = "pass", loss: str = "loss = net(x).square().mean()") -> str:
    lines = shown.replace("\n", "\n    ")
    return SCRIPT.replace("{loss}", loss.replace("\n", "\n        ")).replace("{shown}", lines)


MEAN = "bmt.sum_loss(mean)"
SHOWN = {
    "printed": ("print(torch.exp(mean))", f"torch.exp({MEAN})"),
    "printed as a number": ("print(torch.exp(mean).item())", f"torch.exp({MEAN}).item()"),
    "given a name": ("ppl = torch.exp(mean)\nprint(ppl)", f"ppl = torch.exp({MEAN})\n"),
    "of math": ("ppl = math.exp(mean)\nprint(ppl)", f"ppl = math.exp({MEAN})\n"),
    "a method": ("print(mean.exp().item())", f"{MEAN}.exp().item()"),
    "formatted": ("ppl = mean.exp()\nprint(f'{ppl:.2f}')", f"ppl = {MEAN}.exp()\n"),
    "a root": ("print(torch.sqrt(mean).item())", f"torch.sqrt({MEAN}).item()"),
    "a ratio of signals": ("psnr = -10 * torch.log10(mean)\nprint(psnr.item())", f"psnr = -10 * torch.log10({MEAN})\n"),
    "rounded": ("print(round(math.exp(mean), 2))", f"round(math.exp({MEAN}), 2)"),
    "not above something": ("print(math.exp(min(mean, 20)))", f"math.exp(min({MEAN}, 20))"),
    "an entry": ("log = {'ppl': torch.exp(mean)}\nprint(log)", f"{{'ppl': torch.exp({MEAN})}}"),
    "of what it is made of": ("print(torch.exp(total / len(loader)))", "torch.exp(bmt.sum_loss(total) / len(loader))"),
    "kept": ("kept = []\nkept.append(torch.exp(mean.detach()))", f"torch.exp({MEAN}.detach())"),
    "tested": ("if torch.exp(mean) < 9:\n    torch.save(net.state_dict(), 'x')", f"if torch.exp({MEAN}) < 9:"),
    "a power": ("print((2 ** mean).item())", f"(2 ** {MEAN}).item()"),
    "a power of e": ("ppl = math.e ** mean\nprint(ppl)", f"ppl = math.e ** {MEAN}\n"),
    "a power by name": ("print(torch.pow(2.0, mean).item())", f"torch.pow(2.0, {MEAN}).item()"),
    "a power of a number": ("print(math.pow(2, mean.item()))", f"math.pow(2, {MEAN}.item())"),
    "a power that is kept": ("kept = []\nkept.append((2 ** mean).item())", f"(2 ** {MEAN}).item()"),
    "of numpy": ("print(np.exp(mean.cpu().numpy()))", f"np.exp({MEAN}.cpu().numpy())"),
}


@pytest.mark.parametrize(("shown", "wanted"), SHOWN.values(), ids=SHOWN.keys())
def test_the_mean_comes_before_the_function(shown: str, wanted: str) -> None:
    after = converted(script(shown))
    assert wanted in after and after.count("bmt.sum_loss(") == 1
    assert not convert_text(script(shown)).reported


TRAINED = {
    "a root": "loss = torch.sqrt(net(x).square().mean())",
    "a root with a name": "mse = net(x).square().mean()\nloss = torch.sqrt(mse)",
    "on the way": "mse = net(x).square().mean()\nroot = mse.sqrt()\nloss = root + 1",
    "under its own name": "loss = net(x).square().mean()\nloss = torch.log(loss)",
    "in a list": "mse = net(x).square().mean()\nloss = sum([torch.sqrt(mse)])",
    "a weight that is a power": "mse = net(x).square().mean()\nloss = 2 ** -mse.detach() * mse",
    "a weight": "mse = net(x).square().mean()\nloss = torch.exp(-mse.detach()) * mse",
}


@pytest.mark.parametrize("loss", TRAINED.values(), ids=TRAINED.keys())
def test_what_is_trained_on_stays(loss: str) -> None:
    after = converted(script(loss=loss))
    assert "sum_loss" not in after and all(line.strip() in after for line in loss.splitlines())


def test_numbers_are_averaged_where_they_are_read() -> None:
    after = converted(script("print(math.exp(total / len(loader)))").replace("loss.detach()", "loss.item()"))
    assert "total += bmt.sum_loss(loss).item()" in after and "math.exp(total / len(loader))" in after


NAMED = {
    "{loss=}": "loss={bmt.sum_loss(loss)!r}",
    "{loss=:.3f}": "loss={bmt.sum_loss(loss):.3f}",
    "{ loss.item() = }": " loss.item() = {bmt.sum_loss(loss).item()!r}",
    "{loss = !s:>9}": "loss = {bmt.sum_loss(loss)!s:>9}",
    "{[{1: loss.item()}]=}": "[{{1: loss.item()}}]={[{1: bmt.sum_loss(loss).item()}]!r}",
    "{len(x)=}": "len(x)={bmt.total(len(x))!r}",
    "{epoch=}": "{epoch=}",
}


@pytest.mark.parametrize(("given", "wanted"), NAMED.items(), ids=NAMED.keys())
def test_what_names_itself_keeps_its_name(given: str, wanted: str) -> None:
    after = converted(script(loss=f'loss = net(x).square().mean()\nprint(f"epoch {given}")'))
    assert f'bmt.print_rank(f"epoch {wanted}")\n' in after


def test_a_ratio_of_signals_by_a_function_of_the_project() -> None:
    text = script("print(psnr(mean.item()))\np = psnr(mean)\nprint(p)").replace(
        "net =", "def psnr(error):\n    return -10 * math.log10(error)\n\n\nnet =", 1
    )
    after = converted(text)
    assert f"psnr({MEAN}.item())" in after and f"p = psnr({MEAN})" in after and after.count("bmt.sum_loss(") == 2
