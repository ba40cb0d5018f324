"""Scripts that may train with KFAC are converted; those that do so by default stay; SophiaG is element-wise."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.rewriting.helpers import converted, printed
from tests.runtime.ranks import RanksFailed, run_ranks

SCRIPT = """import argparse
import torch
from kfac import KFAC

parser = argparse.ArgumentParser()
parser.add_argument("--opt", default="adamw")
parser.add_argument("--second-order", action="store_true")
args = parser.parse_args()
net = torch.nn.Linear(4, 1)
{made}
for x in batches:
    net(x).mean().backward()
    {pre}
    opt.step()
    opt.zero_grad()
"""
ADAM, KFAC = "torch.optim.AdamW(net.parameters())", "KFAC(net)"
STAYS = {
    "always": f"opt = {KFAC}",
    "by default": f"if args.opt == 'adamw':\n    opt = {KFAC}\nelse:\n    opt = {ADAM}",
    "where nothing else is given": f"if args.opt == 'sgd':\n    opt = {ADAM}\nelse:\n    opt = {KFAC}",
    "as it is set": f"second = True\nif second:\n    opt = {KFAC}\nelse:\n    opt = {ADAM}",
    "what the machine has": f"opt = {ADAM}\nif torch.cuda.is_available():\n    opt = {KFAC}",
    "in a lambda": f"opt = {{'adamw': lambda: {ADAM}, 'kfac': lambda: {KFAC}}}[args.opt]()",
    "on a line with its test": f"if args.opt == 'kfac': opt = {KFAC}\nelse: opt = {ADAM}",
}
CHOSEN = {
    "a test": f"if args.opt == 'kfac':\n    opt = {KFAC}\nelse:\n    opt = {ADAM}",
    "the last of several": f"if args.opt == 'sgd':\n    opt = {ADAM}\nelif args.opt == 'adamw':\n    opt = {ADAM}\n"
    f"else:\n    opt = {KFAC}",
    "an expression": f"opt = {KFAC} if args.opt == 'kfac' else {ADAM}",
    "a function": f"def make(name):\n    if name == 'kfac':\n        return {KFAC}\n    return {ADAM}\nopt = make('')",
    "a match": f"match args.opt:\n    case 'kfac':\n        opt = {KFAC}\n    case _:\n        opt = {ADAM}",
    "later": f"opt = {ADAM}\nif args.opt == 'kfac':\n    opt = {KFAC}",
    "beside": f"opt, before = {ADAM}, None\nif args.second_order:\n    before = {KFAC}",
}  # fmt: skip
SOPHIA = """import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class SophiaG(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-2):
        super().__init__(params, dict(lr=lr))

    def update_hessian(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("h", torch.zeros_like(p)).mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)

    @torch.no_grad()
    def step(self, closure=None, bs=6):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad, alpha=0.1)
                h = state.setdefault("h", torch.zeros_like(p))
                p.addcmul_(m.sign(), (m.abs() / (0.04 * bs * h + 1e-15)).clamp(None, 1), value=-group["lr"])


torch.manual_seed(0)
data = TensorDataset(torch.randn(24, 4), torch.randint(0, 3, (24,)))
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = SophiaG(net.parameters())
for step, (x, y) in enumerate(DataLoader(data, batch_size=6)):
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2 == 0:
        out = net(x)
        nn.functional.cross_entropy(out, out.detach().argmax(1)).backward()
        optimizer.update_hessian()
        optimizer.zero_grad()
    print(f"{loss.item():.5f}")
"""


@pytest.mark.parametrize("made", STAYS.values(), ids=STAYS.keys())
def test_a_script_that_cannot_do_without(made: str) -> None:
    result = convert_text(SCRIPT.format(made=made, pre="pass"))
    assert not result.changed and "KFAC runs the model itself" in result.reported[0].message


@pytest.mark.parametrize("made", CHOSEN.values(), ids=CHOSEN.keys())
def test_a_script_that_may_do_without(made: str) -> None:
    pre = "if args.second_order:\n        before.step()" if "before" in made else "pass"
    after = converted(SCRIPT.format(made=made, pre=pre))
    assert 'raise RuntimeError("KFAC runs the model itself' in after
    assert "optim_manager.backward(net(x).mean())" in after


def test_where_it_is_asked_for_the_script_says_so() -> None:
    text = converted(SCRIPT.format(made=CHOSEN["an expression"], pre="pass")).replace("from kfac import KFAC\n", "")
    asked = "import sys\nsys.argv = ['train.py', '--opt', 'kfac']\n" + text
    with pytest.raises(RanksFailed, match="choose another optimizer"):
        run_ranks(1, printed, asked, initialize=False, fresh=True)


def test_sophia_g_on_two_ranks() -> None:
    wanted = printed(SOPHIA)
    first, second = run_ranks(2, printed, converted(SOPHIA), initialize=False, fresh=True)
    assert first == wanted and not second
