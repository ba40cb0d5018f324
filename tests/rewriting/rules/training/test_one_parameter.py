# ruff: noqa: E501 - tables of code are easier to read on one line
"""The values of one parameter, ``net.head.weight.data``, that a loop reads or writes outside of a forward."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted, printed

SCRIPT = """import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 5, bias=False)
        self.temp = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.head(F.normalize(self.body(x), dim=1)) * self.temp.mean()


def rows(net):
    return net.head.weight.data[:2]


torch.manual_seed(0)
data = TensorDataset(torch.randn(16, 6), torch.randint(5, (16,)))
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x, y in DataLoader(data, batch_size=8):
    # before
    loss = F.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    # behind
print(" ".join(f"{p.double().abs().sum().item():.4f}" for p in net.state_dict().values()))
"""

STAYS = {
    "element-wise": "net.temp.data.clamp_(0.5, 0.9)",
    "element-wise, by a name": "w = net.head.weight.data\nw.mul_(0.99)\nw.clamp_(-0.4, 0.4)",
    "a shape": "print(net.head.weight.data.shape)",
    "a buffer": "print(net.scale.data[0])",
    "another tensor": "w = x.data\nprint(w[0].sum())",
}


def script(code: str, before: str = "") -> str:
    return SCRIPT.replace("# before", before.replace("\n", "\n    ")).replace("# behind", code.replace("\n", "\n    "))


@pytest.mark.parametrize("code", STAYS.values(), ids=STAYS.keys())
def test_what_needs_no_help_stays(code: str) -> None:
    result = convert_text(script(code))
    text = result.after.decode().replace("bmt.print_rank(", "print(")
    assert code.replace("\n", "\n    ") in text and "gathered(" not in text.split("for x, y")[1]
    assert not [f for f in result.reported if f.code == "BMT036"]


@pytest.mark.parametrize("held", ["w[0, 0].item()", "(w @ w.t()).sum().item()"])
def test_a_name_that_outlives_a_step_is_told(held: str) -> None:
    result = convert_text(script(f"print({held})", before="w = net.head.weight.data"))
    (told,) = [f for f in result.reported if f.code == "BMT036"]
    assert "w.full_tensor()" in told.message and b"w = net.head.weight.data\n" in result.after


NORMALISED = "with torch.no_grad():\n    w = net.head.weight.data.clone()\n    w = F.normalize(w, dim=1)\n    net.head.weight.copy_(w)"
GATHERED = {
    "rows are made of length 1": (NORMALISED, "w = net.head.weight.gather().data.clone()"),
    "given back": ("net.head.weight.data = F.normalize(net.head.weight.data, dim=1)", "= F.normalize(net.head.weight.gather().data, dim=1)"),
    "divided": ("net.head.weight.data /= net.head.weight.data.norm(dim=1, keepdim=True)", "/= net.head.weight.gather().data.norm("),
    "read by a name": ("w = net.body[0].weight.data\nnet.body[0].weight.data = w / w.norm(dim=1, keepdim=True)", "w = net.body[0].weight.gather().data"),
    "written by a name": (
        "w = net.head.weight.data\nn = w.norm(dim=1, keepdim=True)\nw.div_(n)",
        "    with bmt.gathered(net.head.weight, write=True):\n        w = net.head.weight.data\n        n = w.norm(dim=1, keepdim=True)\n        w.div_(n)\n",
    ),
    "parts are written": ("net.head.weight.data[0].fill_(0.5)", "    with bmt.gathered(net.head.weight, write=True):\n        net.head.weight.data[0].fill_(0.5)\n"),
    "singular values": ('print("%.4f" % torch.linalg.svdvals(net.head.weight.detach())[0].item())', "svdvals(net.head.weight.gather().detach())"),
    "a product": ("w = net.head.weight.detach()\nprint(f'{(w @ w.t()).mean().item():.5f}')", "w = net.head.weight.gather().detach()"),
    "of any name": ("print([f'{v:.4f}' for v in net.temp.detach().sort()[0].tolist()])", "net.temp.gather().detach().sort()"),
    "in a function": ("print(f'{rows(net).sum().item():.4f}')", "return net.head.weight.gather().data[:2]"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "after"), GATHERED.values(), ids=GATHERED.keys())
def test_it_is_whole(code: str, after: str) -> None:
    assert after in converted(script(code))


def test_on_two_ranks() -> None:
    text = script("\n".join(code for code, _ in GATHERED.values()), before=NORMALISED)
    (wanted,) = run_ranks(1, printed, text, initialize=False, fresh=True)
    first, second = run_ranks(2, printed, converted(text), initialize=False, fresh=True)
    assert first == wanted and second == []
