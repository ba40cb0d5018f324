"""``clip_grad_norm_`` takes one parameter as well as many, and in an optimizer's step it is torch's own."""

from __future__ import annotations

import pytest

from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

OWN = """class Own(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, dict(lr=0.1, limit=0.05))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                clip_grad_norm_(p, group["limit"])
                p.add_(p.grad, alpha=-group["lr"])


"""
SCRIPT = (
    ("import sys\n" + IMPORTS + "from torch.nn.utils import clip_grad_norm_\n\n\n" + NET + "\n\n" + OWN)
    + """torch.manual_seed(3)
net = Net()
opt = {optimizer}
params = list(net.parameters())
data = TensorDataset(torch.randn(16, 4), torch.randn(16, 3))
for x, y in DataLoader(data, batch_size=4):
    loss = F.mse_loss(net(x), y)
    opt.zero_grad()
    loss.backward()
    {clip}
    opt.step()
"""
)
SGD = "torch.optim.SGD(net.parameters(), lr=0.5)"
CLIPS = {
    "each in a step": ("Own(net.parameters())", "pass"),
    "each": (SGD, "for p in net.parameters():\n        clip_grad_norm_(p, 0.1)"),
    "by name": (
        SGD,
        'for name, p in net.named_parameters():\n        if "weight" in name:\n            clip_grad_norm_(p, 0.1)',
    ),
    "one": (SGD, "clip_grad_norm_(net.a.weight, 0.1)"),
    "one of a list": (SGD, "clip_grad_norm_(params[0], 0.1)"),
    "a list": (SGD, "clip_grad_norm_(params, 0.1)"),
    "a group": (SGD, 'for group in opt.param_groups:\n        clip_grad_norm_(group["params"], 0.1)'),
    "a part": (SGD, "clip_grad_norm_(net.b.parameters(), 0.1)"),
    "a generator": (SGD, "some = (p for p in params if p.ndim > 1)\n    clip_grad_norm_(some, 0.1)"),
    "in each of a list": (SGD, "[clip_grad_norm_(p, 0.1) for p in params]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLIPS)
def test_what_is_clipped_is_that_of_the_script(name: str) -> None:
    optimizer, clip = CLIPS[name]
    text = SCRIPT.format(optimizer=optimizer, clip=clip)
    after = converted(text)
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    (unclipped,) = run_ranks(1, weights_after, text.replace("clip_grad_norm_(", "print("), initialize=False, fresh=True)
    assert abs(one - unclipped) > 1e-3
    assert run_ranks(1, weights_after, after, initialize=False, fresh=True) == pytest.approx([one], rel=1e-6)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)
