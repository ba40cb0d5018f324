"""``clip_grad_norm_`` that gets its numbers in a dict, as trainers made of hooks call it, and what it may raise."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, weights_after

SCRIPT = """{imports}
{net}

torch.manual_seed(0)
net = Net()
clip = dict(max_norm=0.1, norm_type=2)
opt = torch.optim.SGD(net.parameters(), lr=0.5)
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
for x, y in DataLoader(data, batch_size=12):
    loss = F.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    {clips}
    opt.step()
"""
CONVERTED = {
    "torch.nn.utils.clip_grad_norm_(net.parameters(), **clip)": (
        "optim_manager.clip_grad_norm(opt.param_groups, **clip)"
    ),
    "torch.nn.utils.clip_grad_norm_(parameters=net.parameters(), **clip)": (
        "optim_manager.clip_grad_norm(opt.param_groups, **clip)"
    ),
    "params = list(net.parameters())\n    norm = torch.nn.utils.clip_grad.clip_grad_norm_(params, **clip)": (
        "norm = optim_manager.clip_grad_norm(params, **clip)"
    ),
    "torch.nn.utils.clip_grad_norm_(net.parameters(), **dict(max_norm=0.1))": (
        "optim_manager.clip_grad_norm(opt.param_groups, **dict(max_norm=0.1))"
    ),
    "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, **{'norm_type': 2})": (
        "optim_manager.clip_grad_norm(opt.param_groups, 0.1, **{'norm_type': 2})"
    ),
    "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, norm_type=float('inf'))": (
        "optim_manager.clip_grad_norm(opt.param_groups, 0.1, norm_type=float('inf'))"
    ),
}
REFUSED = [
    "torch.nn.utils.clip_grad_norm_(*given)",
    "torch.nn.utils.clip_grad_norm_(net.parameters())",
    "torch.nn.utils.clip_grad_norm_(net.parameters(), **clip, **more)",
]
RAISES = [
    "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, error_if_nonfinite=True)",
    "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, 2.0, True)",
    "torch.nn.utils.clip_grad_norm_(net.parameters(), **clip, error_if_nonfinite=strict)",
]
LOOKS_NOT = [
    "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, error_if_nonfinite=False, foreach=False)",
    "torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, 2.0, False)",
]


def script(clips: str) -> str:
    return SCRIPT.format(imports=IMPORTS, net=NET, clips=clips)


def said(clips: str) -> list[str]:
    return [remark.message for remark in convert_text(script(clips)).reported if remark.code == "BMT022"]


@pytest.mark.parametrize("clips", REFUSED)
def test_what_is_not_seen_is_refused(clips: str) -> None:
    assert any("not understood" in message for message in said(clips))


@pytest.mark.parametrize("clips", LOOKS_NOT)
def test_nothing_is_said_of_what_raises_nothing(clips: str) -> None:
    assert not said(clips)


@pytest.mark.parametrize("clips", RAISES)
def test_an_error_that_is_asked_for_is_said(clips: str) -> None:
    assert any("raises no error" in message for message in said(clips))


@pytest.mark.parametrize("clips", CONVERTED)
def test_the_manager_gets_the_settings(clips: str) -> None:
    assert CONVERTED[clips] in convert_text(script(clips)).after.decode()


@pytest.mark.parametrize("clips", list(CONVERTED)[:3])
def test_weights_are_those_of_the_script(clips: str) -> None:
    text = script(clips)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    after = convert_text(text).after.decode()
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)
