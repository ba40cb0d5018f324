"""Scalers that stay while functions are given the optimizers that they step: ``loss_scaler(loss, optimizer)``."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import IMPORTS, NET, converted

SCALER = """class Scaler:
    def __init__(self):
        self._scaler = torch.cuda.amp.GradScaler()

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, update_grad=True):
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if update_grad:
            if clip_grad is not None:
                self._scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()

    def state_dict(self):
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict):
        self._scaler.load_state_dict(state_dict)


"""
LOOP = """net = Net()
opt = torch.optim.AdamW(net.parameters(), lr=0.01)
loss_scaler = Scaler()
for x in xs:
    opt.zero_grad()
    loss_scaler(net(x).mean(), opt, clip_grad=1.0, parameters=net.parameters())
"""
TOLD = """        if optimizer not in self.optim_manager.optimizers:
            self.optim_manager.add_optimizer(optimizer)
"""


def test_a_scaler_of_the_project_is_told_the_optimizer_that_it_is_called_with() -> None:
    after = converted(IMPORTS + NET + SCALER + LOOP)
    assert TOLD in after
    assert after.index(TOLD) < after.index("self.optim_manager.scale_loss(loss).backward")


def test_its_state_is_that_of_a_scaler() -> None:
    result = convert_text(IMPORTS + NET + SCALER + LOOP)
    after = result.after.decode()
    assert "return self.optim_manager.scaler_state_dict()" in after
    assert "self.optim_manager.load_scaler_state_dict(state_dict)" in after
    assert not any("layout" in said.message for said in result.reported)


STEPS = {
    "another method": ("__call__", "step"),
    "another name": ("optimizer", "optim"),
}


@pytest.mark.parametrize(("old", "new"), STEPS.values(), ids=STEPS.keys())
def test_it_is_told_in_whatever_method_steps(old: str, new: str) -> None:
    text = IMPORTS + NET + SCALER.replace(old, new) + LOOP.replace("loss_scaler(", "loss_scaler.step(")
    assert TOLD.replace("optimizer not", f"{new} not").replace("(optimizer)", f"({new})") in converted(text) or (
        new == "step" and TOLD in converted(text)
    )


def test_a_scaler_of_the_module_is_told_too() -> None:
    text = """scaler = torch.amp.GradScaler()


def train(net, opt, xs):
    for x in xs:
        opt.zero_grad()
        scaler.scale(net(x).mean()).backward()
        scaler.step(opt)
        scaler.update()


net = Net()
train(net, torch.optim.SGD(net.parameters(), lr=0.1), xs)
"""
    after = converted(IMPORTS + NET + text)
    assert "    if opt not in optim_manager.optimizers:\n        optim_manager.add_optimizer(opt)\n    for x" in after


def test_a_scaler_that_is_handed_on_with_its_optimizer_is_told_where_both_are_made() -> None:
    text = """def train(net, opt, scaler, xs):
    for x in xs:
        scaler.scale(net(x).mean()).backward()
        scaler.step(opt)
        scaler.update()


net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
scaler = torch.amp.GradScaler()
train(net, opt, scaler, xs)
"""
    after = converted(IMPORTS + NET + text)
    assert "not in" not in after
    assert after.count("add_optimizer(opt)") == 1


def test_a_scaler_with_its_own_optimizer_is_told_once() -> None:
    text = """class Trainer:
    def __init__(self, net):
        self.net = net
        self.opt = torch.optim.SGD(net.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler()

    def step(self, x):
        self.scaler.scale(self.net(x).mean()).backward()
        self.scaler.step(self.opt)
        self.scaler.update()
        return self.scaler.state_dict()


trainer = Trainer(Net())
"""
    after = converted(IMPORTS + NET + text)
    assert "not in" not in after
    assert "self.optim_manager.state_dict()" in after


TIMM = {
    "by name": ("from timm.utils import NativeScaler\n", "NativeScaler()"),
    "by another name": ("from timm.utils import NativeScaler as Scaler\n", "Scaler()"),
    "of the package": ("import timm.utils\n", "timm.utils.NativeScaler()"),
    "of its module": ("from timm.utils.cuda import NativeScaler\n", "NativeScaler(device='cuda')"),
}


@pytest.mark.parametrize(("line", "call"), TIMM.values(), ids=TIMM.keys())
@pytest.mark.parametrize("held", ["loss_scaler = {}", "loss_scaler = {} if amp else None"])
def test_timms_becomes_bmtrains(line: str, call: str, held: str) -> None:
    after = converted(IMPORTS + line + NET + LOOP.replace("loss_scaler = Scaler()", held.format(call)))
    given = call[call.index("(") :]
    assert f"    {held.format('bmt.optim.NativeScaler' + given)}\n".strip() in after


def test_a_scaler_of_the_same_name_is_the_projects() -> None:
    after = converted(
        IMPORTS + NET + SCALER.replace("Scaler:", "NativeScaler:") + LOOP.replace("Scaler()", "NativeScaler()")
    )
    assert "bmt.optim.NativeScaler" not in after
    assert TOLD in after
