"""Parameters that got no gradient in a step: torch has None, and optimizers leave them out."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import Net, User


class Two(nn.Module):
    """Two heads, of which a forward uses those that it is told."""

    def __init__(self):
        super().__init__()
        self.body = Net(1, outputs=8)
        self.one, self.other = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x, heads=("one",)):
        x = self.body(x)
        return sum(getattr(self, head)(x) for head in heads)


def _which(model):
    return {name: p.grad is None for name, p in model.named_parameters()}


def _turns(k: User, make, both_first=True):
    """A head that was used before gets no gradient for two steps, and then again."""
    model = k.shard(Two())
    manager, seen = k.manage(make(model.parameters())), []
    for step, (x, y) in enumerate(k.batches(5)):
        used = ("one", "other") if (step == 0 and both_first) or step == 4 else ("one",)
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x, used), y))
        seen.append(_which(model))
        manager.step()
    return {"weights": k.weights(model), "none": seen}


@idiom
def none_where_nothing_came(k: User):
    """`p.grad is None` of a head that no forward has used"""
    model = k.shard(Two())
    seen = [_which(model) for _ in k.after_backward(model, k.sgd(model), steps=3)]
    return {"none": seen, "weights": k.weights(model)}


@idiom
def none_beside_a_used_one(k: User):
    """The same of one parameter in a layer whose others are used"""

    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.extra = Net(1), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.net(x)

    model = k.shard(Some())
    seen = [_which(model) for _ in k.after_backward(model, k.sgd(model), steps=3)]
    return {"none": seen, "weights": k.weights(model)}


@idiom
def norms_of_those_with_gradients(k: User):
    """`[p.grad.norm() for p in model.parameters() if p.grad is not None]`"""
    model, seen = k.shard(Two()), []
    for _ in k.after_backward(model, k.sgd(model), steps=3):
        seen.append([float(p.grad.norm()) for p in model.parameters() if p.grad is not None])
    return {"seen": seen}


@idiom
def names_without_a_gradient(k: User):
    """Unused parameters are printed after a plain backward"""
    model, seen = k.shard(Two()), []
    for x, y in k.batches(2):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        seen.append(", ".join(name for name, p in model.named_parameters() if p.grad is None))
    return {"seen": seen}


@idiom
def decay_by_hand_where_gradients_are(k: User):
    """No optimizer: weights with a gradient decay and step, the others stay"""
    model = k.shard(Two())
    for x, y in k.batches(3):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.mul_(0.9).add_(p.grad, alpha=-0.1)
    return model


@idiom
def heads_take_turns_sgd(k: User):
    """Momentum and decay of SGD pause for a head that is not used for some steps"""
    return _turns(k, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1))


@idiom
def heads_take_turns_adamw(k: User):
    """The same with torch's AdamW"""
    return _turns(k, lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1))


@idiom
def heads_take_turns_adam_of_ours(k: User):
    """The same with AdamW, converted"""
    return _turns(k, lambda p: k.adam(p, weight_decay=0.1))


@idiom
def a_head_comes_late(k: User):
    """A head that is used for the first time in the fifth step"""
    return _turns(k, lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1), both_first=False)


@idiom
def heads_take_turns_rmsprop(k: User):
    """The same with RMSprop and momentum"""
    return _turns(k, lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-2, momentum=0.9, weight_decay=0.1))


class Expert(nn.Module):
    """Chooses in the forward who uses the second head."""

    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, x, first):
        body = self.two.body(x)
        out = self.two.one(body)
        if bool(first.any()):
            rows = first.nonzero()[:, 0]
            out = out.index_add(0, rows, self.two.other(body[rows]))
        return out


def _expert(k: User, make):
    model, seen = k.shard(Expert()), []
    manager = k.manage(make(model.parameters()))
    for step in range(4):
        first = (torch.arange(12, device=k.device) < 4) & (step != 2)
        x, y = k.share(k.randn(12, 6, seed=step)), k.share(k.randint(5, 12, seed=step))
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x, k.share(first)), y))
        seen.append(_which(model))
        manager.step()
    return {"weights": k.weights(model), "none": seen}


@idiom
def expert_of_one_rank_sgd(k: User):
    """An expert that samples of one rank alone reach, and in one step nobody's: momentum and decay of SGD"""
    return _expert(k, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1))


@idiom
def expert_of_one_rank_adamw(k: User):
    """The same with torch's AdamW"""
    return _expert(k, lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1))


@idiom
def expert_of_one_rank_adam_of_ours(k: User):
    """The same with AdamW, converted"""
    return _expert(k, lambda p: k.adam(p, weight_decay=0.1))
