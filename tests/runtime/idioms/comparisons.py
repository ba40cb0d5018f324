"""Losses that compare the samples of a batch, or are made of its statistics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt

from .registry import idiom
from .user import Net, User


def _trained(k: User, loss, steps: int = 3, model=None):
    """Steps on ``loss(model(x), y)``, by the manager."""
    model = k.net(outputs=8) if model is None else k.shard(model)
    return k.train(model, k.sgd(model), steps, loss)


def _rows(k: User, *values):
    """As converted: of all ranks."""
    return tuple(map(bmt.gather_batch, values)) if k.sharded else values


def _contrast(a, b):
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    labels = torch.arange(len(a), device=a.device)
    return F.cross_entropy(a @ b.T / 0.2, labels)


@idiom(verdicts="right said said", says="compares the samples of a batch")
def in_batch_negatives(k: User):
    """InfoNCE: `F.cross_entropy(z @ z.T / t, arange)`"""
    return _trained(k, lambda z, y: _contrast(z, z.tanh()))


@idiom
def in_batch_negatives_gathered(k: User):
    """The same, of `bmt.gather_batch(z)`"""
    return _trained(k, lambda z, y: _contrast(*_rows(k, z, z.tanh())))


@idiom(verdicts="right said said", says="compares samples with rows without a gradient")
def keys_without_gradients(k: User):
    """InfoNCE with keys that need no gradient: `z @ keys.detach().T`"""
    return _trained(k, lambda z, y: _contrast(z, z.tanh().detach()))


@idiom
def keys_without_gradients_gathered(k: User):
    """The same, of `bmt.gather_batch`"""
    return _trained(k, lambda z, y: _contrast(*_rows(k, z, z.tanh().detach())))


@idiom(verdicts="right said said", says="compares the samples of a batch")
def two_views(k: User):
    """SimCLR: two views, `F.cosine_similarity(z[:, None], z[None])`"""
    model = k.net(outputs=8)
    manager = k.sgd(model)
    for x, _ in k.batches(3):
        z = torch.cat([model(x), model(x + 0.1)])
        similar = F.cosine_similarity(z[:, None], z[None], dim=-1) / 0.5
        similar = similar.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -1e9)
        k.step(manager, F.cross_entropy(similar, torch.arange(len(z), device=z.device).roll(len(x))))
    return model


class Towers(nn.Module):
    """Gives logits of every pair."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.scale = Net(1, outputs=4), Net(1, outputs=4), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(x.flip(-1)), dim=-1)
        logits = self.scale.exp() * image @ text.t()
        return logits, logits.t()


@idiom(verdicts="right said said", says="compares the samples of a batch")
def logits_of_pairs_in_a_model(k: User):
    """CLIP: the model gives logits of each image with each text"""
    model = k.shard(Towers())
    manager = k.sgd(model)
    for x, _ in k.batches(3):
        a, b = model(x)
        labels = torch.arange(len(a), device=a.device)
        k.step(manager, (F.cross_entropy(a, labels) + F.cross_entropy(b, labels)) / 2)
    return model


class Inside(nn.Module):
    """Gives its loss."""

    def __init__(self):
        super().__init__()
        self.net = Net(1, outputs=8)

    def forward(self, x):
        z = self.net(x)
        return _contrast(z, z.tanh())


@idiom(verdicts="right said said", says="compares the samples of a batch")
def loss_of_pairs_in_a_model(k: User):
    """The model gives its contrastive loss"""
    model = k.shard(Inside())
    manager = k.sgd(model)
    for x, _ in k.batches(3):
        k.step(manager, model(x))
    return model


@idiom(verdicts="right said said", says="compares the samples of a batch")
def pairs_by_a_plain_backward(k: User):
    """InfoNCE, `loss.backward()`"""
    model = k.net(outputs=8)
    manager = k.sgd(model)
    for x, _ in k.batches(3):
        manager.zero_grad()
        z = model(x)
        _contrast(z, z.tanh()).backward()
        manager.step()
    return model


def _mined(z, y):
    distances = torch.cdist(z, z)
    same = y[:, None] == y[None]
    far = distances.masked_fill(~same, 0).max(1)[0]
    near = distances.masked_fill(same, 1e3).min(1)[0]
    return F.relu(far - near + 0.5).mean()


@idiom(verdicts="right said said", says="compares the samples of a batch")
def triplets_mined_in_the_batch(k: User):
    """Batch-hard triplets: `torch.cdist(z, z)`"""
    return _trained(k, _mined)


@idiom
def triplets_mined_in_the_gathered_batch(k: User):
    """The same, of `bmt.gather_batch`"""
    return _trained(k, lambda z, y: _mined(*_rows(k, z, y)))


@idiom(verdicts="right said said", says="compares the samples of a batch")
def differences_of_pairs(k: User):
    """A pairwise ranking loss: `s[:, None] - s[None, :]`"""
    return _trained(k, lambda z, y: F.softplus(z[:, 0][:, None] - z[:, 0][None, :]).mean())


@idiom(verdicts="right said said", says="compares the samples of a batch")
def kernel_of_pairs(k: User):
    """Maximum mean discrepancy to noise, by a Gaussian kernel"""
    noise = k.randn(12, 8)

    def loss(z, y):
        other = k.share(noise)
        kernel = lambda a, b: torch.exp(-(a[:, None] - b[None]).square().sum(-1) / 8).mean()  # noqa: E731
        return kernel(z, z) - 2 * kernel(z, other)

    return _trained(k, loss)


@idiom(verdicts="right said said", says="compares the samples of a batch")
def hardest_of_the_batch(k: User):
    """The largest losses alone train: `losses.topk(k)`"""
    return _trained(k, lambda z, y: F.cross_entropy(z, y, reduction="none").topk(2)[0].mean())


def _barlow(z, other):
    a, b = ((v - v.mean(0)) / (v.std(0) + 1e-2) for v in (z, other))
    c = a.T @ b / len(a)
    return (c - torch.eye(len(c), device=c.device)).square().mean()


@idiom(verdicts="right said said", says="is made of a batch's statistics")
def correlations_of_features(k: User):
    """Barlow Twins: correlations of features over the batch"""
    return _trained(k, lambda z, y: _barlow(z, z.tanh()))


@idiom
def correlations_of_gathered_features(k: User):
    """The same, of `bmt.gather_batch`"""
    return _trained(k, lambda z, y: _barlow(*_rows(k, z, z.tanh())))


def _vicreg(z):
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    apart = covariance - torch.diag(torch.diagonal(covariance))
    return F.relu(1 - torch.sqrt(z.var(0) + 1e-2)).mean() + apart.square().sum() / z.shape[1]


@idiom(verdicts="right said said", says="is made of a batch's statistics")
def variances_of_features(k: User):
    """VICReg: variance and covariance over the batch"""
    return _trained(k, lambda z, y: _vicreg(z))


@idiom
def variances_of_gathered_features(k: User):
    """The same, of `bmt.gather_batch`"""
    return _trained(k, lambda z, y: _vicreg(*_rows(k, z)))


@idiom(verdicts="right said said", says="is made of a batch's statistics")
def means_of_features_are_matched(k: User):
    """Feature matching: squares of the batch's mean features"""
    return _trained(k, lambda z, y: (z.mean(0) - 0.5).square().sum())


@idiom(verdicts="right said said", says="is made of a batch's statistics")
def entropy_of_the_mean_prediction(k: User):
    """A bonus for diverse predictions: the entropy of their mean"""

    def loss(z, y):
        mean = z.softmax(1).mean(0)
        return F.cross_entropy(z, y) + (mean * mean.log()).sum()

    return _trained(k, loss)


@idiom
def rows_are_gathered_by_hand(k: User):
    """Own rows against those of all ranks: `z @ bmt.gather_batch(z).T`"""
    model = k.net(outputs=8)
    manager = k.sgd(model)
    for x, _ in k.batches(3):
        z = F.normalize(model(x), dim=-1)
        (every,) = _rows(k, z.tanh())
        labels = torch.arange(len(z), device=z.device) + k.rank * len(z)
        k.step(manager, F.cross_entropy(z @ every.T / 0.2, labels))
    return model


@idiom
def compared_with_prototypes(k: User):
    """As many prototypes as two ranks have rows: distances to a parameter"""

    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.points = Net(1, outputs=8), nn.Parameter(0.1 * torch.randn(6, 8))

        def forward(self, x):
            z = self.net(x)
            return -torch.cdist(z, self.points) - (z[:, None] - self.points[None]).square().sum(-1)

    return _trained(k, F.cross_entropy, model=Prototypes())
