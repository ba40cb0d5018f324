"""EMA, SWA, teachers, target networks: weights that follow other weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils

from .registry import idiom
from .user import Net, User


def _train(k: User, model, follow, steps: int = 2):
    """Training with ``follow()`` after each step."""
    manager = k.sgd(model)
    for x, y in k.batches(steps):
        k.step(manager, F.cross_entropy(model(x), y))
        follow()


@idiom
def ema_in_a_dict(k: User):
    """`ema[n].mul_(d).add_(p.data, alpha=1 - d)` over a dict of clones"""
    model = k.net()
    ema = {n: p.data.clone() for n, p in model.named_parameters()}

    def follow():
        for n, p in model.named_parameters():
            ema[n].mul_(0.9).add_(p.data, alpha=0.1)

    _train(k, model, follow)
    return {"ema": ema, "weights": k.weights(model)}


@idiom
def ema_in_a_list(k: User):
    """A list of detached clones, by `lerp_`"""
    model = k.net()
    ema = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def follow():
        for e, p in zip(ema, model.parameters(), strict=True):
            e.lerp_(p, 0.1)

    _train(k, model, follow)
    return {"ema": ema}


@idiom
def ema_by_assignment(k: User):
    """`shadow[n] = d * shadow[n] + (1 - d) * p.data`"""
    model = k.net()
    shadow = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad}

    def follow():
        for n, p in model.named_parameters():
            shadow[n] = 0.9 * shadow[n] + (1.0 - 0.9) * p.data

    _train(k, model, follow)
    return {"ema": shadow}


@idiom
def ema_that_subtracts(k: User):
    """`s.sub_((1 - d) * (s - p))`, as torch_ema does"""
    model = k.net()
    shadow = [p.clone().detach() for p in model.parameters()]

    def follow():
        with torch.no_grad():
            for s, p in zip(shadow, model.parameters(), strict=True):
                s.sub_(0.1 * (s - p))

    _train(k, model, follow)
    return {"ema": shadow}


@idiom
def ema_model(k: User):
    """A deep copy follows, parameter by parameter"""
    model = k.net()
    ema = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def follow():
        for e, p in zip(ema.parameters(), model.parameters(), strict=True):
            e.mul_(0.9).add_(p, alpha=0.1)

    _train(k, model, follow)
    x, _ = k.batch(9)
    return {"ema": k.weights(ema), "out": k.gather(ema(x))}


@idiom
def ema_model_through_data(k: User):
    """`e.data = d * e.data + (1 - d) * p.data`"""
    model = k.net()
    ema = copy.deepcopy(model)

    def follow():
        for e, p in zip(ema.parameters(), model.parameters(), strict=True):
            e.data = 0.9 * e.data + 0.1 * p.data

    _train(k, model, follow)
    return {"ema": k.weights(ema)}


@idiom
def ema_model_copy(k: User):
    """`e.data.copy_(e.data * d + p.data * (1 - d))`"""
    model = k.net()
    ema = copy.deepcopy(model)

    def follow():
        for e, p in zip(ema.parameters(), model.parameters(), strict=True):
            e.data.copy_(e.data * 0.9 + p.data * 0.1)

    _train(k, model, follow)
    return {"ema": k.weights(ema)}


@idiom
def ema_of_the_state_dict(k: User):
    """timm's ModelEma: `ema_v.copy_` over two state dicts, buffers too"""
    model = k.shard(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).eval())
    ema = copy.deepcopy(model)

    @torch.no_grad()
    def follow():
        for e, v in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
            e.copy_(0.9 * e + 0.1 * v)

    _train(k, model, follow)
    return {"ema": k.weights(ema)}


@idiom
def ema_by_loading(k: User):
    """A new state dict is computed from two, and loaded"""
    model = k.net()
    ema = copy.deepcopy(model)

    def follow():
        new, old = model.state_dict(), ema.state_dict()
        ema.load_state_dict({n: old[n] * 0.9 + new[n] * 0.1 for n in new})

    _train(k, model, follow)
    return {"ema": k.weights(ema)}


@idiom
def ema_of_many_at_once(k: User):
    """`torch._foreach_lerp_` over two models"""
    model = k.net()
    ema = copy.deepcopy(model).requires_grad_(False)

    def follow():
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight=0.1)

    _train(k, model, follow)
    return {"ema": k.weights(ema)}


@idiom
def ema_lists_at_once(k: User):
    """`torch._foreach_mul_` and `_foreach_add_` over clones"""
    model = k.net()
    ema = [p.detach().clone() for p in model.parameters()]

    def follow():
        with torch.no_grad():
            torch._foreach_mul_(ema, 0.9)
            torch._foreach_add_(ema, [p.detach() for p in model.parameters()], alpha=0.1)

    _train(k, model, follow)
    return {"ema": ema}


@idiom
def ema_is_stored(k: User):
    """The averages are saved, read again and loaded into a model of plain torch"""
    model = k.net()
    ema = {n: p.data.clone() for n, p in model.named_parameters()}

    def follow():
        for n, p in model.named_parameters():
            ema[n].mul_(0.9).add_(p.data, alpha=0.1)

    _train(k, model, follow)
    plain = Net()
    plain.load_state_dict(k.stored(ema))
    return {"ema": k.weights(plain)}


@idiom
def ema_swapped_in(k: User):
    """The averages are swapped in to evaluate, and the weights back"""
    model, seen = k.net(), []
    ema = {n: p.data.clone() for n, p in model.named_parameters()}
    x, y = k.batch(9)

    def follow():
        for n, p in model.named_parameters():
            ema[n].mul_(0.9).add_(p.data, alpha=0.1)
        kept = {n: p.data.clone() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            p.data.copy_(ema[n])
        with torch.no_grad():
            seen.append(k.mean(F.cross_entropy(model(x), y)))
        for n, p in model.named_parameters():
            p.data.copy_(kept[n])

    _train(k, model, follow)
    return {"seen": seen, "weights": k.weights(model)}


@idiom
def ema_assigned(k: User):
    """`p.data = ema[n]` to evaluate, `p.data = backup[n]` after"""
    model, seen = k.net(), []
    ema = {n: p.data.clone() for n, p in model.named_parameters()}
    x, y = k.batch(9)

    def follow():
        backup = {}
        for n, p in model.named_parameters():
            ema[n] = 0.9 * ema[n] + 0.1 * p.data
            backup[n] = p.data
            p.data = ema[n]
        with torch.no_grad():
            seen.append(k.mean(F.cross_entropy(model(x), y)))
        for n, p in model.named_parameters():
            p.data = backup[n]

    _train(k, model, follow)
    return {"seen": seen, "weights": k.weights(model)}


@idiom
def averaged_model(k: User):
    """`AveragedModel`"""
    model = k.net()
    average = swa_utils.AveragedModel(model)
    _train(k, model, lambda: average.update_parameters(model))
    x, _ = k.batch(9)
    return {"average": k.weights(average), "out": k.gather(average(x))}


@idiom
def averaged_model_ema(k: User):
    """`AveragedModel` with `get_ema_multi_avg_fn`"""
    model = k.net()
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    _train(k, model, lambda: average.update_parameters(model))
    return {"average": k.weights(average)}


@idiom
def averaged_model_own_function(k: User):
    """`AveragedModel` with a function of the user's"""
    model = k.net()
    average = swa_utils.AveragedModel(model, avg_fn=lambda a, p, count: 0.7 * a + 0.3 * p)
    _train(k, model, lambda: average.update_parameters(model))
    return {"average": k.weights(average.module)}


@idiom
def averaged_model_with_buffers(k: User):
    """`AveragedModel(use_buffers=True)` of a model with a batch norm in evaluation"""
    model = k.shard(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).eval())
    average = swa_utils.AveragedModel(model, use_buffers=True)
    _train(k, model, lambda: average.update_parameters(model))
    return {"average": k.weights(average)}


@idiom
def swa(k: User):
    """SWA: `AveragedModel` and `SWALR` from some step on"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = k.manage(optimizer)
    average, schedule = swa_utils.AveragedModel(model), swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    for step, (x, y) in enumerate(k.batches(4)):
        k.step(manager, F.cross_entropy(model(x), y))
        if step > 0:
            average.update_parameters(model)
            schedule.step()
    return {"average": k.weights(average), "rate": optimizer.param_groups[0]["lr"]}


@idiom
def mean_teacher(k: User):
    """Mean teacher: a consistency loss with the EMA's outputs"""
    model = k.net()
    teacher = copy.deepcopy(model)
    for p in teacher.parameters():
        p.requires_grad = False
    manager = k.sgd(model)
    for x, y in k.batches():
        with torch.no_grad():
            wanted = teacher(x).softmax(-1)
        out = model(x)
        k.step(manager, F.cross_entropy(out, y) + F.mse_loss(out.softmax(-1), wanted))
        for t, p in zip(teacher.parameters(), model.parameters(), strict=True):
            t.data.mul_(0.9).add_(p.data, alpha=0.1)
    return {"teacher": k.weights(teacher), "weights": k.weights(model)}


@idiom
def target_network(k: User):
    """DQN: `target.load_state_dict(net.state_dict())` every second step"""
    model, target = k.net(), k.net()
    target.load_state_dict(model.state_dict())
    manager = k.sgd(model)
    for step, (x, y) in enumerate(k.batches(4)):
        with torch.no_grad():
            wanted = target(x).max(1).values
        k.step(manager, F.smooth_l1_loss(model(x).gather(1, y[:, None])[:, 0], 0.9 * wanted + 1))
        if step % 2:
            target.load_state_dict(model.state_dict())
    return {"target": k.weights(target), "weights": k.weights(model)}


@idiom
def soft_update(k: User):
    """Polyak: `t.data.copy_(tau * p.data + (1 - tau) * t.data)`"""
    model, target = k.net(), k.net()
    for t, p in zip(target.parameters(), model.parameters(), strict=True):
        t.data.copy_(p.data)

    def follow():
        for t, p in zip(target.parameters(), model.parameters(), strict=True):
            t.data.copy_(0.1 * p.data + (1.0 - 0.1) * t.data)

    _train(k, model, follow)
    return {"target": k.weights(target)}


@idiom
def momentum_encoder(k: User):
    """MoCo: a momentum encoder and a queue of keys in a buffer"""

    class MoCo(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = Net(), Net()
            for q, p in zip(self.query.parameters(), self.key.parameters(), strict=True):
                p.data.copy_(q.data)
                p.requires_grad = False
            self.register_buffer(
                "queue", F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(1)), dim=0)
            )

        @torch.no_grad()
        def follow(self):
            for q, p in zip(self.query.parameters(), self.key.parameters(), strict=True):
                p.data = p.data * 0.9 + q.data * 0.1

        @torch.no_grad()
        def enqueue(self, keys):
            self.queue[:, : keys.shape[0]] = keys.T

        def forward(self, x):
            q = F.normalize(self.query(x), dim=1)
            with torch.no_grad():
                self.follow()
                p = F.normalize(self.key(x), dim=1)
            near, far = (q * p).sum(1, keepdim=True), q @ self.queue.clone().detach()
            return torch.cat([near, far], 1) / 0.2, p

    model = k.shard(MoCo())
    manager = k.sgd([p for p in model.parameters() if p.requires_grad])
    for x, _ in k.batches():
        logits, keys = model(x)
        k.step(manager, F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=k.device)))
        model.enqueue(k.gather(keys))
    return model


@idiom
def byol(k: User):
    """BYOL: an online network predicts what a target, its EMA, gives"""
    online, target = k.net(), k.net()
    predictor = k.shard(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5)))
    manager = k.sgd([*online.parameters(), *predictor.parameters()])
    for x, _ in k.batches():
        with torch.no_grad():
            wanted = F.normalize(target(x + 0.1), dim=-1)
        k.step(manager, 2 - 2 * (F.normalize(predictor(online(x)), dim=-1) * wanted).sum(-1).mean())
        with torch.no_grad():
            for t, p in zip(target.parameters(), online.parameters(), strict=True):
                t.data = 0.9 * t.data + 0.1 * p.data
    return {"target": k.weights(target), "online": k.weights(online), "predictor": k.weights(predictor)}


@idiom
def lookahead(k: User):
    """Lookahead: slow weights every second step"""
    model = k.net()
    slow = [p.data.clone() for p in model.parameters()]
    count = [0]

    def follow():
        count[0] += 1
        if count[0] % 2 == 0:
            for s, p in zip(slow, model.parameters(), strict=True):
                s.add_(p.data - s, alpha=0.5)
                p.data.copy_(s)

    _train(k, model, follow, steps=4)
    return {"slow": slow, "weights": k.weights(model)}


@idiom
def mean_of_checkpoints(k: User):
    """The mean of three state dicts is loaded"""
    model, kept = k.net(), []
    _train(k, model, lambda: kept.append(copy.deepcopy(model.state_dict())))
    model.load_state_dict({n: torch.stack([state[n] for state in kept]).mean(0) for n in kept[0]})
    return model


@idiom
def best_weights(k: User):
    """The best weights are kept in memory and loaded at the end"""
    model, best = k.net(), {}
    count = [0]

    def follow():
        count[0] += 1
        if count[0] == 2:
            best.update(copy.deepcopy(model.state_dict()))

    _train(k, model, follow)
    model.load_state_dict(best)
    return model


@idiom
def reptile(k: User):
    """Reptile: some steps inside, then a part of the way"""
    model = k.net()
    for _ in range(2):
        old = {n: p.clone().detach() for n, p in model.named_parameters()}
        _train(k, model, lambda: None, steps=2)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(old[n] + 0.5 * (p - old[n]))
    return model


@idiom
def distance_is_printed(k: User):
    """How far the weights moved: `(p.data - old[n]).norm().item()`"""
    model, seen = k.net(), []
    old = {n: p.data.clone() for n, p in model.named_parameters()}
    _train(k, model, lambda: seen.append(sum((p.data - old[n]).norm().item() for n, p in model.named_parameters())))
    return {"seen": seen}
