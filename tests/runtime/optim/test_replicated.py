"""Parameters of no distributed module: whole on every rank, their gradients averaged."""

from __future__ import annotations

import warnings
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt

OPTIMIZERS: dict[str, Any] = {
    "ours": lambda ps: bmt.optim.AdamOptimizer(ps, lr=1e-2, eps=1e-3),
    "offload": lambda ps: bmt.optim.AdamOffloadOptimizer(ps, lr=1e-2, eps=1e-3),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, eps=1e-3),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, eps=1e-3),
}
THEIRS = OPTIMIZERS | {
    name: lambda ps: torch.optim.AdamW(ps, lr=1e-2, eps=1e-3, weight_decay=0) for name in ("ours", "offload")
}


class Waves(nn.Module):
    """Complex, transposed, sparse in use, and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.complex(torch.linspace(-1, 1, 6), torch.linspace(0, 1, 6)))
        self.turned = nn.Parameter(torch.linspace(-1, 1, 12).view(2, 6).t())
        self.table = nn.Embedding(4, 6, sparse=True)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh((x * self.waves).abs()) @ self.turned
        return h.sum(1, keepdim=True) + self.table(torch.arange(2)).sum()


def both(build: Any) -> tuple[Any, Any]:
    torch.manual_seed(4)
    reference = build()
    torch.manual_seed(4)
    return reference, build()


@pytest.mark.parametrize("name", OPTIMIZERS)
@on_ranks(1, 2, 3)
def test_a_plain_model(name: str) -> None:
    reference, model = both(Waves)
    manager, theirs = bmt.optim.OptimManager(), THEIRS[name](reference.parameters())
    if bmt.rank() == 1:
        with torch.no_grad():
            model.turned.add_(1)  # rank 0's values count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager.add_optimizer(OPTIMIZERS[name](model.parameters()))
    for step in range(3):
        manager.zero_grad()
        theirs.zero_grad()
        oracle.mean(model(models.share(oracle.inputs(step)))).backward()
        manager.backward(oracle.mean(model(models.share(oracle.inputs(step + 9)))))
        oracle.mean(reference(oracle.inputs(step))).backward()
        oracle.mean(reference(oracle.inputs(step + 9))).backward()
        for p in reference.parameters():
            p.grad = p.grad.to_dense() if p.grad is not None else None
        norm = manager.clip_grad_norm(model.parameters(), 0.05)
        oracle.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.05), "the norm", 1e-4)
        manager.step()
        theirs.step()
    for (key, ours), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        oracle.assert_close(ours, expected, key, 1e-4)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(oracle.WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def run_policy(kind: str, sharded: bool, steps: range, states: Any = None) -> tuple[Any, Any, Any]:
    """A policy and its temperature, in one optimizer for both."""
    torch.manual_seed(2)
    policy = bmt.BMTrainModelWrapper(Policy()) if sharded else Policy()
    log_alpha = nn.Parameter(torch.zeros(1))
    makers = OPTIMIZERS if sharded else THEIRS
    optimizer = makers[kind]([*policy.parameters(), log_alpha])
    manager = bmt.optim.OptimManager()
    if sharded:
        manager.add_optimizer(optimizer)
    if states is not None:
        policy.load_state_dict(states[0])
        log_alpha.data.copy_(states[1])
        optimizer.load_state_dict(states[2])
    for step in steps:
        x = models.share(oracle.inputs(step)) if sharded else oracle.inputs(step)
        loss = (log_alpha.exp() * policy(x).square().mean(1) + log_alpha * x[:, 0]).mean()
        optimizer.zero_grad()
        loss.backward()
        if sharded:
            manager.clip_grad_norm(optimizer.param_groups, 0.5)
            manager.step()
        else:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
            optimizer.step()
    return policy.state_dict(), log_alpha.detach().clone(), optimizer.state_dict()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("before, after", [(1, 2), pytest.param(2, 3, marks=pytest.mark.long)])
def test_a_temperature_beside_a_sharded_policy(kind: str, before: int, after: int) -> None:
    found = run_ranks(before, run_policy, kind, True, range(3))
    (expected,) = run_ranks(1, run_policy, kind, False, range(3))
    then = run_ranks(after, run_policy, kind, True, range(3, 5), found[0])
    (later,) = run_ranks(1, run_policy, kind, False, range(3, 5), found[0])
    for ranks, (weights, alpha, _) in ((found, expected), (then, later)):
        for ours, log_alpha, _ in ranks:
            oracle.assert_close(log_alpha, alpha, "log_alpha", 1e-4)
            for key, value in weights.items():
                oracle.assert_close(ours[key], value, key, 1e-4)


@on_ranks(2, init={"gradients": "sum"})
def test_sums_are_refused() -> None:
    with pytest.raises(bmt.errors.ConfigurationError, match="averaged"):
        bmt.optim.AdamOptimizer([nn.Parameter(torch.zeros(2))])


@on_ranks(2)
def test_one_rank_without_a_gradient() -> None:
    p = nn.Parameter(torch.zeros(2))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD([p, nn.Parameter(torch.zeros(1))], lr=1.0))
    if bmt.rank() == 1:
        (p.sum() * 3).backward()
    manager.step()
    assert p.tolist() == [-1.5, -1.5]


@on_ranks(2, 3)
def test_a_plain_backward_through_a_model_gives_means() -> None:
    torch.manual_seed(2)
    policy, plain = bmt.BMTrainModelWrapper(Policy()), None
    torch.manual_seed(2)
    plain = Policy()
    scale, late, codes = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1), False), torch.ones(2).to(torch.int8)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD([*policy.parameters(), scale, late, nn.Parameter(codes, False)], lr=0.1))
    gone = nn.Parameter(torch.ones(3))
    manager.add_optimizer(torch.optim.SGD([gone], lr=0.1))
    if bmt.rank() == 1:
        manager.optimizers.pop()
        del gone  # garbage is collected on one rank before the others
    mine, whole = models.share(oracle.inputs(0)), oracle.inputs(0)
    for factor in (1, 2):
        late.requires_grad_(True)
        (policy(mine) * scale * late).square().mean().backward()
        theirs = [scale.detach().requires_grad_(), late.detach().requires_grad_()]
        (plain(whole) * theirs[0] * theirs[1]).square().mean().backward()
        for one, right in zip((scale, late), theirs, strict=True):
            assert one.grad is not None and right.grad is not None
            oracle.assert_close(one.grad, factor * right.grad, "a gradient", 1e-4)
    norm = nn.utils.clip_grad_norm_([*policy.parameters(), scale, late], 0.01)
    parts = [p.grad for p in (*plain.parameters(),)] + [2 * right.grad for right in theirs]
    oracle.assert_close(norm, torch.cat([part.flatten() for part in parts if part is not None]).norm(), "norm", 1e-4)


@on_ranks(2)
def test_steps_on_what_nobody_averages_are_said_once() -> None:
    policy = bmt.BMTrainModelWrapper(Policy())
    alpha = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=0.1)
    with oracle.heard("this rank's samples alone") as said:
        optimizer.step()  # nothing is stepped on yet
        for step in range(2):
            (alpha.exp() * policy(models.share(oracle.inputs(step))).detach().mean()).backward()
            optimizer.step()
    assert len(said) == (bmt.rank() == 0) and all("Adam" in one and "add_optimizer" in one for one in said)
    with oracle.heard("this rank's samples alone") as said:
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(optimizer)
        alpha.grad = torch.ones(1)
        manager.step()
    assert not said
