"""Parameters of any name that Python reads outside of a forward are gathered, as the class says that they are some."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

MODEL = """import torch
from torch import nn
from torch.utils.data import DataLoader


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.t = nn.Parameter(torch.ones(()))
        self.logs = nn.ParameterDict({"a": nn.Parameter(torch.zeros(()))})
        self.alphas = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(2)])
        self.steps = 0

    def forward(self, x):
        return self.fc(x) * float(self.t)

    def told(self):
        return f"{self.t.item():.3f}"


"""
LOOP = """net = Net()
opt = torch.optim.Adam(net.parameters())
for x, y in DataLoader(data, batch_size=8):
    loss = nn.functional.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
RUNNER = """class Runner:
    def __init__(self, net):
        self.net = net
        self.opt = torch.optim.Adam(net.parameters())

    def fit(self, loader):
        for x, y in loader:
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            print({read})


Runner(Net()).fit(DataLoader(data, batch_size=8))
"""
READ = {
    "net.t.item()": "net.t.gather().item()",
    "float(net.t)": "float(net.t.gather())",
    'f"{net.t:.3f}"': 'f"{net.t.gather():.3f}"',
    '"%.3f" % net.t': '"%.3f" % net.t.gather()',
    '"{:.3f}".format(net.t)': '"{:.3f}".format(net.t.gather())',
    "net.t.detach().cpu().item()": "net.t.gather().detach().cpu().item()",
    'net.logs["a"].item()': 'net.logs["a"].gather().item()',
    "net.alphas[1].item()": "net.alphas[1].gather().item()",
}


@pytest.mark.parametrize(("before", "after"), READ.items(), ids=READ.keys())
def test_a_parameter_is_read(before: str, after: str) -> None:
    assert f"bmt.print_rank({after})" in converted(f"{MODEL}{LOOP}    print({before})\n")
    held = converted(MODEL + RUNNER.replace("{read}", before.replace("net.", "self.net.")))
    assert f"bmt.print_rank({after.replace('net.', 'self.net.')})" in held


@pytest.mark.parametrize(
    "before", ["net.steps", 'f"{net.steps:d}"', "net.t.exp().item()", "net.t.shape", "float(x[0])"]
)
def test_what_needs_no_help_stays(before: str) -> None:
    assert ".gather()" not in converted(f"{MODEL.replace('self.t.item()', 'self.steps')}{LOOP}    print({before})\n")


def test_methods_but_the_forward_gather() -> None:
    after = converted(MODEL + LOOP)
    assert 'f"{self.t.gather().item():.3f}"' in after and "float(self.t)\n" in after


@pytest.mark.parametrize(
    ("read", "held"),
    [
        ('" ".join(f"{p.item()}" for p in net.logs.values())', "net.logs"),
        ('" ".join(f"{p:.3f}" for p in net.alphas)', "net.alphas"),
        ("{k: round(p.item(), 3) for k, p in net.logs.items()}", "net.logs"),
        ("[float(p) for p in net.alphas]", "net.alphas"),
    ],
)
def test_lists_and_dicts_of_parameters(read: str, held: str) -> None:
    assert f"    with bmt.gathered({held}):\n        bmt.print_rank(" in converted(f"{MODEL}{LOOP}    print({read})\n")


def test_two_of_them_in_one_statement() -> None:
    both = "print([p.item() for p in net.alphas], [p.item() for p in net.logs.values()])"
    after = converted(f"{MODEL}{LOOP}    {both}\n")
    assert "bmt.gathered(net.alphas)" in after and "bmt.gathered(net.logs)" in after


@pytest.mark.parametrize("read", ["net.t.item()", "net.t.exp().item()", "[p.item() for p in net.alphas]"])
def test_they_are_no_share_of_the_batch(read: str) -> None:
    found = convert_text(f"{MODEL}{LOOP}    print({read})\n").reported
    assert not [f for f in found if f.code == "BMT037"]
