"""Optimizers that step another inside (SAM, Lookahead) keep their steps: the one inside gets the manager."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

SAM = """class Sharp(torch.optim.Optimizer):
    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, dict(rho=rho, **kwargs))
        self.{inner} = base(self.param_groups, **kwargs)
        self.param_groups = self.{inner}.param_groups

    def trained(self):
        return [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for _, p in self.trained()]).norm()
        for g, p in self.trained():
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * (g["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for _, p in self.trained():
            p.data = self.state[p]["old"]
        self.{inner}.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
"""
SLOW = """class Slow(torch.optim.Optimizer):
    def __init__(self, base, k=2):
        super().__init__(base.param_groups, {{}})
        self.{inner}, self.k, self.count = base, k, 0
        self.param_groups = base.param_groups
        self.kept = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    def step(self, closure=None):
        loss = self.{inner}.step({closure})
        self.count += 1
        if self.count % self.k == 0:
            for group, kept in zip(self.param_groups, self.kept):
                for p, q in zip(group["params"], kept):
                    q.add_(p.data - q, alpha=0.5)
                    p.data.copy_(q)
        return loss
"""
OWN = """class Sharp(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        for g in self.param_groups:
            for p in g["params"]:
                self.state[p]["e"] = p.grad * (0.05 / norm)
                p.add_(self.state[p]["e"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for g in self.param_groups:
            for p in g["params"]:
                p.sub_(self.state[p]["e"])
                p.add_(p.grad, alpha=-g["lr"])
        self.zero_grad()
"""
SCRIPT = """{imports}

{cls}

{net}

torch.manual_seed(0)
net = Net()
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
{made}
for x, y in DataLoader(data, batch_size=12):
{body}
"""
TWICE = """    F.cross_entropy(net(x), y).backward()
    opt.first_step()
    F.cross_entropy(net(x), y).backward()
    opt.second_step()
"""
CLOSURE = """    def again():
        F.cross_entropy(net(x), y).backward()
    F.cross_entropy(net(x), y).backward()
    opt.step(again)
"""
ONCE = "    opt.zero_grad()\n    F.cross_entropy(net(x), y).backward()\n    opt.step()\n"
CLIPPED = TWICE.replace("    opt.first", "    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)\n    opt.first")
SHARP = "opt = Sharp(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)"
SLOWLY = "opt = Slow(torch.optim.Adam(net.parameters(), 0.05))"


def script(cls: str, made: str, body: str, inner: str = "optimizer", closure: str = "") -> str:
    text = cls if cls is OWN else cls.format(inner=inner, closure=closure)
    return SCRIPT.format(imports=IMPORTS, net=NET, cls=text, made=made, body=body)


WORKING = {
    "two steps": script(SAM, SHARP, TWICE),
    "of another name": script(SAM, SHARP, TWICE, "base"),
    "a closure": script(SAM, SHARP, CLOSURE, "inner"),
    "of AdamW": script(SAM, "opt = Sharp(net.parameters(), torch.optim.AdamW, lr=0.01)", TWICE),
    "clipped": script(SAM, SHARP, CLIPPED),
    "a schedule": script(SAM, f"{SHARP}\ns = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)", f"{TWICE}    s.step()\n"),
    "given one": script(SLOW, SLOWLY, ONCE),
    "given one by another name": script(SLOW, SLOWLY, ONCE, "fast"),
    "given one with a name": script(SLOW, "base = torch.optim.SGD(net.parameters(), 0.1)\nopt = Slow(base)", ONCE),
    "a closure that is none": script(SLOW, SLOWLY, ONCE, "optimizer", "closure"),
    "a closure by keyword": script(SLOW, SLOWLY, ONCE, "optimizer", "closure=closure"),
    "a schedule's number": script(
        SLOW,
        f"{SLOWLY}\ns = torch.optim.lr_scheduler.ReduceLROnPlateau(opt)",
        f"{ONCE}    s.step(0.5)\n",
        "optimizer",
        "closure",
    ),
    "a closure that is handed on": script(SLOW, SLOWLY, CLOSURE, closure="closure"),
    "nothing inside": script(OWN, "opt = Sharp(net.parameters())", TWICE),
}


@pytest.mark.parametrize("text", WORKING.values(), ids=WORKING.keys())
def test_two_ranks_train_as_one_process(text: str) -> None:
    after = converted(text)
    assert "add_optimizer(opt)" not in after
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)


def reasons(text: str) -> list[str]:
    result = convert_text(text, Options())
    assert not result.error and not result.changed
    return [finding.message for finding in result.reported]


def test_one_of_another_package_that_makes_its_own_is_refused() -> None:
    package = "from sharpness import Sharp\n"
    for made in (SHARP, f"base = torch.optim.SGD\n{SHARP.replace('torch.optim.SGD', 'base')}"):
        (reason,) = reasons(SCRIPT.format(imports=IMPORTS, net=NET, cls=package, made=made, body=TWICE))
        assert "Sharp is a package's and makes another optimizer inside" in reason


def test_a_loss_scale_around_one_is_refused() -> None:
    body = "    opt.zero_grad()\n    scaler.scale(F.cross_entropy(net(x), y)).backward()\n    scaler.step(opt)\n"
    text = script(SLOW, f"{SLOWLY}\nscaler = torch.amp.GradScaler()", body + "    scaler.update()\n")
    assert "opt steps another optimizer inside" in reasons(text)[0]
