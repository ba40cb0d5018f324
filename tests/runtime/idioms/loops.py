"""Whole small programs: GANs, reinforcement learning, several models."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt

from .registry import idiom
from .user import Net, User


@idiom
def gan(k: User):
    """A GAN: two optimizers, `fake.detach()`"""
    g, d = k.net(inputs=4, outputs=6), k.net(outputs=1)
    first, second = k.sgd(d), k.sgd(g)
    for step, (x, _) in enumerate(k.batches()):
        fake = g(k.share(k.randn(12, 4, seed=50 + step)))
        k.step(first, F.softplus(-d(x)).mean() + F.softplus(d(fake.detach())).mean())
        k.step(second, F.softplus(-d(fake)).mean())
    return {"g": k.weights(g), "d": k.weights(d)}


@idiom
def gan_frozen_discriminator(k: User):
    """A GAN whose discriminator is frozen by `requires_grad_` for the generator's step"""
    g, d = k.net(inputs=4, outputs=6), k.net(outputs=1)
    first, second = k.sgd(d), k.sgd(g)
    for step, (x, _) in enumerate(k.batches()):
        z = k.share(k.randn(12, 4, seed=50 + step))
        for p in d.parameters():
            p.requires_grad_(True)
        with torch.no_grad():
            fake = g(z)
        k.step(first, F.softplus(-d(x)).mean() + F.softplus(d(fake)).mean())
        for p in d.parameters():
            p.requires_grad_(False)
        k.step(second, F.softplus(-d(g(z))).mean())
    return {"g": k.weights(g), "d": k.weights(d)}


@idiom
def gan_one_manager(k: User):
    """A GAN whose two optimizers one manager holds, one loss after the other"""
    g, d = k.net(inputs=4, outputs=6), k.net(outputs=1)
    for_d, for_g = k.sgd(d), k.manage(k.adam(g.parameters()))
    for step, (x, _) in enumerate(k.batches()):
        z = k.share(k.randn(12, 4, seed=50 + step))
        k.step(for_d, F.softplus(-d(x)).mean() + F.softplus(d(g(z).detach())).mean())
        if step % 2:
            k.step(for_g, F.softplus(-d(g(z))).mean())
    return {"g": k.weights(g), "d": k.weights(d)}


@idiom
def wgan(k: User):
    """WGAN: several critic steps, weights clipped by `p.data.clamp_`"""
    g, d = k.net(inputs=4, outputs=6), k.net(outputs=1)
    first, second = k.manage(torch.optim.RMSprop(d.parameters(), lr=0.01, eps=1e-3)), k.sgd(g)
    for step, (x, _) in enumerate(k.batches(4)):
        z = k.share(k.randn(12, 4, seed=50 + step))
        k.step(first, d(g(z).detach()).mean() - d(x).mean())
        for p in d.parameters():
            p.data.clamp_(-0.1, 0.1)
        if step % 2:
            k.step(second, -d(g(z)).mean())
    return {"g": k.weights(g), "d": k.weights(d)}


@idiom
def wgan_gp(k: User):
    """WGAN-GP between real and generated samples"""
    g, d = k.net(inputs=4, outputs=6), k.net(outputs=1)
    first, second = k.sgd(d, lr=0.01), k.sgd(g)
    for step, (x, _) in enumerate(k.batches(2)):
        fake = g(k.share(k.randn(12, 4, seed=50 + step)))
        mixed = (0.3 * x + 0.7 * fake.detach()).requires_grad_()
        (grad,) = torch.autograd.grad(d(mixed).sum(), mixed, create_graph=True)
        k.step(first, d(fake.detach()).mean() - d(x).mean() + 10 * (grad.norm(dim=1) - 1).square().mean())
        k.step(second, -d(fake).mean())
    return {"g": k.weights(g), "d": k.weights(d)}


@idiom
def cycle(k: User):
    """CycleGAN: `itertools.chain` of two generators in one optimizer"""
    a, b = k.net(outputs=6), k.net(outputs=6)
    manager = k.manage(k.adam(itertools.chain(a.parameters(), b.parameters())))
    for x, _ in k.batches():
        k.step(manager, F.l1_loss(b(a(x)), x) + F.l1_loss(a(b(-x)), -x))
    return {"a": k.weights(a), "b": k.weights(b)}


@idiom
def autoencoder(k: User):
    """A VAE with given noise"""
    encoder, decoder = k.net(outputs=8), k.net(inputs=4, outputs=6)
    manager = k.sgd([*encoder.parameters(), *decoder.parameters()])
    for step, (x, _) in enumerate(k.batches()):
        mean, log = encoder(x).chunk(2, -1)
        z = mean + (0.5 * log).exp() * k.share(k.randn(12, 4, seed=50 + step))
        kl = -0.5 * (1 + log - mean.square() - log.exp()).sum(-1).mean()
        k.step(manager, F.mse_loss(decoder(z), x) + 0.01 * kl)
    return {"encoder": k.weights(encoder), "decoder": k.weights(decoder)}


@idiom
def diffusion(k: User):
    """Noise prediction with given noise and times"""
    model = k.net(inputs=7, outputs=6)
    manager = k.manage(k.adam(model.parameters()))
    for step, (x, _) in enumerate(k.batches()):
        noise, t = k.share(k.randn(12, 6, seed=50 + step)), k.share(k.randint(10, 12, seed=step)) / 10
        noisy = (1 - t)[:, None] * x + t[:, None] * noise
        k.step(manager, F.mse_loss(model(torch.cat([noisy, t[:, None]], 1)), noise))
    return model


@idiom
def soft_actor_critic(k: User):
    """SAC: actor, two critics, their targets, log_alpha, four optimizers"""
    actor, q1, q2 = k.net(outputs=5), k.net(), k.net()
    t1, t2 = copy.deepcopy(q1), copy.deepcopy(q2)
    for p in (*t1.parameters(), *t2.parameters()):
        p.requires_grad = False
    log_alpha = torch.tensor(0.1, requires_grad=True, device=k.device)
    for_q, for_actor = k.sgd([*q1.parameters(), *q2.parameters()]), k.sgd(actor)
    for_alpha = k.manage(torch.optim.SGD([log_alpha], lr=0.1))
    for x, y in k.batches():
        alpha = log_alpha.exp().detach()
        with torch.no_grad():
            p = actor(x).softmax(-1)
            wanted = 1 + 0.9 * (p * (torch.min(t1(x), t2(x)) - alpha * p.clamp(min=1e-6).log())).sum(-1)
        picked = [q(x).gather(1, y[:, None])[:, 0] for q in (q1, q2)]
        k.step(for_q, sum(F.mse_loss(q, wanted) for q in picked))
        p = actor(x).softmax(-1)
        log = p.clamp(min=1e-6).log()
        with torch.no_grad():
            q = torch.min(q1(x), q2(x))
        k.step(for_actor, (p * (alpha * log - q)).sum(-1).mean())
        k.step(for_alpha, (log_alpha * (-(p * log).sum(-1) - 1).detach()).mean())
        for q, t in ((q1, t1), (q2, t2)):
            for a, b in zip(q.parameters(), t.parameters(), strict=True):
                b.data.mul_(0.9).add_(a.data, alpha=0.1)
    return {"actor": k.weights(actor), "q1": k.weights(q1), "t1": k.weights(t1), "alpha": log_alpha}


@idiom
def policy_gradient(k: User):
    """PPO: several epochs over one batch, ratios of old and new, clipping"""

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pi, self.v = Net(outputs=8), nn.Linear(8, 5), nn.Linear(8, 1)

        def act(self, x):
            return self.pi(self.body(x)).log_softmax(-1)

        def value(self, x):
            return self.v(self.body(x))[:, 0]

        def forward(self, x):
            h = self.body(x)
            return self.pi(h).log_softmax(-1), self.v(h)[:, 0]

    model = k.shard(Policy())
    manager = k.manage(k.adam(model.parameters()))
    for x, y in k.batches(2):
        with torch.no_grad():
            old, value = model.act(x).gather(1, y[:, None])[:, 0], model.value(x)
        gain = x.sum(-1) - value
        for _ in range(2):
            log, v = model(x)
            ratio = (log.gather(1, y[:, None])[:, 0] - old).exp()
            policy = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            k.step(manager, policy + 0.5 * F.mse_loss(v, x.sum(-1)) + 0.01 * (log.exp() * log).sum(-1).mean())
    return model


@idiom
def actor_and_critic(k: User):
    """Two models, one loss with both, one of them detached"""
    actor, critic = k.net(), k.net(outputs=1)
    manager = k.manage(torch.optim.SGD(actor.parameters(), lr=0.1), torch.optim.SGD(critic.parameters(), lr=0.2))
    for x, y in k.batches():
        value = critic(x)[:, 0]
        policy = (F.cross_entropy(actor(x), y, reduction="none") * (1 - value.detach())).mean()
        k.step(manager, policy + F.mse_loss(value, y.float()))
    return {"actor": k.weights(actor), "critic": k.weights(critic)}


@idiom
def teacher_and_student(k: User):
    """Hidden states of a larger, frozen teacher are matched by a projection"""
    teacher, student = k.net(layers=3, width=12).eval(), k.net()
    for p in teacher.parameters():
        p.requires_grad = False
    projection = k.shard(nn.Linear(8, 12))
    manager = k.sgd([*student.parameters(), *projection.parameters()])
    for x, y in k.batches():
        with torch.no_grad():
            wanted = teacher.features(x)
        f = student.features(x)
        k.step(manager, F.mse_loss(projection(f), wanted) + F.cross_entropy(student.head(f), y))
    return {"student": k.weights(student), "projection": k.weights(projection)}


@idiom
def several_heads(k: User):
    """A shared body and a head for each task, one task a step"""

    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = Net(outputs=8), nn.ModuleDict({"a": nn.Linear(8, 5), "b": nn.Linear(8, 5)})

        def forward(self, x, task):
            return self.heads[task](self.body(x))

    model = k.shard(Tasks())
    manager = k.sgd(model, momentum=0.9)
    for step, (x, y) in enumerate(k.batches(4)):
        k.step(manager, F.cross_entropy(model(x, "ab"[step % 2]), y))
    return model


@idiom
def ensemble(k: User):
    """An ensemble in a Python list, each with an optimizer, means of outputs"""
    nets = [k.net() for _ in range(3)]
    for number, net in enumerate(nets):
        k.train(net, k.sgd(net, lr=0.1 * (number + 1)), steps=2)
    x, _ = k.batch(9)
    with torch.no_grad():
        return {"out": k.gather(torch.stack([net(x) for net in nets]).mean(0))}


@idiom
def folds(k: User):
    """Cross-validation: a new model and optimizer for each fold"""
    seen = []
    for fold in range(3):
        torch.manual_seed(fold)
        model = k.net()
        k.train(model, k.manage(k.adam(model.parameters())), steps=2)
        x, y = k.batch(5)
        with torch.no_grad():
            seen.append(k.mean(F.cross_entropy(model(x), y)))
    return {"seen": seen}


@idiom
def stopped_early(k: User):
    """Early stopping with the best weights restored"""
    model, best, wait = k.net(), None, 0
    manager = k.sgd(model, lr=1.0)
    x, y = k.batch(7)
    for inputs, targets in k.batches(6):
        k.step(manager, F.cross_entropy(model(inputs), targets))
        with torch.no_grad():
            loss = k.mean(F.cross_entropy(model(x), y))
        if best is None or loss < best[0] - 1e-3:
            best, wait = (loss, copy.deepcopy(model.state_dict())), 0
        else:
            wait += 1
            if wait == 2:
                break
    model.load_state_dict(best[1])
    return {"best": best[0], "weights": k.weights(model)}


@idiom
def parts_in_turn(k: User):
    """Body and head train in turn, by `requires_grad_`"""
    model = k.net()
    manager = k.sgd(model)
    for step, (x, y) in enumerate(k.batches(4)):
        model.layers.requires_grad_(step % 2 == 0)
        model.head.requires_grad_(step % 2 == 1)
        k.step(manager, F.cross_entropy(model(x), y))
    return model


@idiom
def chained_models(k: User):
    """The output of one sharded model goes into another"""
    first, second = k.net(outputs=6), k.net()
    manager = k.sgd([*first.parameters(), *second.parameters()])
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(second(first(x)), y))
    return {"first": k.weights(first), "second": k.weights(second)}


@idiom
def models_in_one_module(k: User):
    """Two sharded models as children of a plain module"""
    first, second = k.net(outputs=6), k.net()
    both = nn.Sequential(first, second)
    manager = k.sgd(both)
    return k.train(both, manager)


@idiom
def frozen_backbone(k: User):
    """Features of a frozen backbone under `no_grad`, a head of its own"""
    backbone = k.net().eval()
    head = k.shard(nn.Linear(8, 5))
    manager = k.sgd(head)
    for x, y in k.batches():
        with torch.no_grad():
            f = backbone.features(x)
        k.step(manager, F.cross_entropy(head(f), y))
    return {"head": k.weights(head)}


@idiom
def truncated_backpropagation(k: User):
    """A recurrent state is carried over steps, detached"""
    model = k.net(inputs=14, outputs=8)
    manager = k.sgd(model)
    state = k.share(torch.zeros(12, 8, device=k.device))
    for x, _ in k.batches():
        state = torch.tanh(model(torch.cat([x, state], 1)))
        k.step(manager, state.square().mean())
        state = state.detach()
    return model


@idiom
def unrolled(k: User):
    """The model is applied three times in a row before the backward"""
    model = k.net(outputs=6)
    manager = k.sgd(model)
    for x, _ in k.batches():
        h = x
        for _ in range(3):
            h = h + 0.1 * model(h)
        k.step(manager, (h - x).square().mean())
    return model


def _contrast(k: User, factor: float):
    """InfoNCE over all ranks' rows; the loss is shown without ``factor``."""
    model = k.net()
    manager = k.sgd(model)
    for x, _ in k.batches():
        a, b = F.normalize(model(x), dim=-1), F.normalize(model(x + 0.1), dim=-1)
        if k.sharded:
            a, b = (bmt.distributed.all_gather(v).flatten(0, 1) for v in (a, b))
        loss = F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a), device=k.device))
        manager.zero_grad()
        manager.backward(loss * factor)
        manager.step()
        k.losses.append(k.mean(loss))
    return model


@idiom
def contrast_over_all_ranks(k: User):
    """InfoNCE over the rows of all ranks by `bmt.distributed.all_gather`, its loss times the number of ranks"""
    return _contrast(k, k.ranks)


@idiom(verdicts="right said said", says="bmt.gather_batch")
def contrast_over_all_ranks_without_a_factor(k: User):
    """The same, the loss as it is"""
    return _contrast(k, 1.0)
