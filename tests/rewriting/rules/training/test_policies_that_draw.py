"""Policies that draw in their forward: where every rank does all the work, all are to act alike."""

from __future__ import annotations

import pytest

from ...helpers import converted

TEXT = """import gym
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal

START
class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.drop = nn.Identity()

    def act(self, x):
        return Normal(x, 1.0).sample()

    def forward(self, x):
        x = self.drop(self.body(x))
        return BODY


def main():
    SEED
    env = gym.make("Pendulum-v1")
    pi = Policy()
    opt = torch.optim.Adam(pi.parameters())
    s = env.reset()
    for step in range(9):
        a = pi(torch.tensor(s))
        s, r, done, info = env.step(a.item())
        opt.zero_grad()
        (-r * a.sum()).backward()
        opt.step()


if __name__ == "__main__":
    main()
"""


def script(body: str, seed: str = "torch.manual_seed(3)", **changes: str) -> str:
    text = TEXT.replace("BODY", body).replace("SEED", seed).replace("START\n", "")
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    return text


DRAWS = {
    "rsample": "Normal(x, 1.0).rsample()",
    "sample": "Categorical(logits=x).sample()",
    "multinomial": "torch.multinomial(x.softmax(-1), 1)",
    "gumbel": "F.gumbel_softmax(x)",
    "noise": "x + torch.randn_like(x)",
    "noise of a size": "x + torch.randn(2)",
    "in place": "x + torch.empty(2).normal_()",
    "another method": "self.act(x)",
    "dropout": "F.dropout(x)",
}


@pytest.mark.parametrize("body", DRAWS.values(), ids=DRAWS.keys())
def test_ranks_draw_alike(body: str) -> None:
    assert 'bmt.init_distributed(seed=3, random="shared")' in converted(script(body))


def test_a_layer_that_draws() -> None:
    after = converted(script("x", layer=("nn.Identity()", "nn.Dropout(0.1)")))
    assert 'bmt.init_distributed(seed=3, random="shared")' in after


def test_without_a_seed() -> None:
    assert 'bmt.init_distributed(random="shared")' in converted(script("Normal(x, 1.0).rsample()", seed="pass"))


OTHERS = {
    "no draws": script("x"),
    "drawn outside of forwards": script("x", act=("a = pi(", "a = pi.act(")),
    "no environment": script("x + torch.randn_like(x)", env=("s, r, done, info = env.step(a.item())", "r = a.item()")),
    "shared data": script(
        "x + torch.randn_like(x)",
        data=("for step in range(9):", "for s in torch.utils.data.DataLoader(rows, batch_size=8):"),
    ),
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS.keys())
def test_ranks_draw_apart_elsewhere(text: str) -> None:
    assert "random=" not in converted(text)
