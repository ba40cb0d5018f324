"""Optimizers that run a closure themselves (LBFGS), also on request only, step as they do in one process."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

LBFGS = "torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=3)"
ADAM = "torch.optim.Adam(net.parameters(), lr=0.05)"
CHOSEN = f"if kind == 'lbfgs':\n    opt = {LBFGS}\nelse:\n    opt = {ADAM}\n"
CLOSURE = """    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        seen.append(loss.item())
        return loss
    loss = opt.step(closure)
    seen.append(loss.item())
"""
PLAIN = """    opt.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
"""
EITHER = "    if kind == 'lbfgs':\n{}    else:\n{}".format(
    *("".join(f"    {line}\n" for line in text.splitlines()) for text in (CLOSURE, PLAIN))
)
METHOD = """class Trainer:
    def __init__(self):
        self.opt = {}

    def again(self):
        self.opt.zero_grad()
        loss = F.cross_entropy(net(self.x), self.y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        return loss

    def train(self, loader):
        for self.x, self.y in loader:
            self.opt.step(self.again)


"""


def script(kind: str, made: str, body: str, before: str = "") -> str:
    data = "TensorDataset(torch.randn(12, 4, generator=g), torch.arange(12) % 3)"
    return (
        f"{IMPORTS}\n\n{NET}\n\n{before}torch.manual_seed(0)\nkind = {kind!r}\nseen = []\nnet = Net()\n{made}\n"
        f"g = torch.Generator().manual_seed(1)\nloader = DataLoader({data}, batch_size=6)\n{body}"
    )


LOOP = "for x, y in loader:\n"
WORKING = {
    "alone": script("lbfgs", f"opt = {LBFGS}", LOOP + CLOSURE),
    "a line search": script("", f"opt = {LBFGS[:-1]}, line_search_fn='strong_wolfe')", LOOP + CLOSURE),
    "of Adam": script("", f"opt = {ADAM}", LOOP + CLOSURE),
    "on request, and not asked for": script("adam", CHOSEN, LOOP + EITHER),
    "on request": script("lbfgs", CHOSEN, LOOP + EITHER),
    "on request in one line": script("adam", f"opt = {LBFGS} if kind == 'lbfgs' else {ADAM}", LOOP + EITHER),
    "on request from a table": script(
        "lbfgs",
        "opt = {'lbfgs': torch.optim.LBFGS, 'adam': torch.optim.Adam}[kind](net.parameters(), lr=0.1)",
        LOOP + EITHER,
    ),
    "a method": script("", "", "Trainer().train(loader)\n", METHOD.format(LBFGS)),
    "of Adam, a method": script("", "", "Trainer().train(loader)\n", METHOD.format(ADAM)),
    "behind another": script(
        "lbfgs", f"first = {ADAM}\nopt = {LBFGS}", LOOP + PLAIN.replace("opt.", "first.") + LOOP + CLOSURE
    ),
}


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.filterwarnings("ignore:LBFGS may look at several tensors")
def test_ranks_train_as_one_process(name: str) -> None:
    text = WORKING[name]
    after = converted(text)
    assert not any("cannot be converted" in finding.message for finding in convert_text(text).reported)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=2e-4)


def test_the_loss_that_a_step_gives_back_is_the_mean_over_the_ranks() -> None:
    after = converted(WORKING["of Adam"])
    assert "loss = opt.step(closure)\n    seen.append(bmt.sum_loss(loss).item())" in after
    assert "optim_manager.backward(loss)" in after and "optim_manager.step" not in after


def test_a_closure_beside_a_loss_scale_is_refused() -> None:
    scaled = PLAIN.replace("loss.backward()", "scaler.scale(loss).backward()").replace("opt.step", "scaler.step")
    scaled = scaled.replace("scaler.step()", "scaler.step(opt)\n    scaler.update()")
    text = script("", f"opt = {ADAM}\nscaler = torch.amp.GradScaler()", LOOP + scaled + LOOP + CLOSURE)
    result = convert_text(text)
    assert not result.changed and "step with a closure and a loss scale" in result.reported[0].message
