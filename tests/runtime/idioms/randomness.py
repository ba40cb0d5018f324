"""Random numbers: equal where ranks must agree, different where samples do."""

from __future__ import annotations

import functools
import random

import numpy
import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import Layer, Net, User


def _differ(k: User, value: torch.Tensor) -> bool:
    """Whether no two ranks hold the same."""
    rows = k.gather(value.detach().reshape(1, -1))
    return all(not torch.equal(a, b) for n, a in enumerate(rows) for b in rows[:n])


@idiom
def same_start(k: User):
    """`torch.manual_seed(seed)`: the weights of one process"""
    torch.manual_seed(5)
    return k.net()


@idiom
def ranks_seeded_apart(k: User):
    """`torch.manual_seed(seed + rank)` before the model is built: rank 0's weights"""
    torch.manual_seed(5 + k.rank)
    model = k.net()
    return k.train(model, k.sgd(model))


@idiom
def dropout_masks_differ(k: User):
    """Dropout in a training model: the ranks' masks differ"""
    model = k.net(dropout=0.5)
    x = torch.ones(4, 6, device=k.device)
    return {"differ": _differ(k, model(x))}


@idiom
def dropout_in_evaluation(k: User):
    """Dropout does nothing in evaluation"""
    model = k.net(dropout=0.5).eval()
    return k.train(model, k.sgd(model))


@idiom
def dropout_of_nothing(k: User):
    """Dropout with p = 0 in training"""
    model = k.net(dropout=0.0)
    return k.train(model, k.sgd(model))


@idiom
def noise_in_a_block_differs(k: User):
    """`torch.randn_like` in a block's forward: the ranks' noise differs"""

    class Noisy(Layer):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    class Model(Net):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Noisy() for _ in range(2)])

    model = k.shard(Model())
    return {"differ": _differ(k, model(torch.ones(4, 6, device=k.device)))}


class Noisy(Net):
    """Adds noise to its inputs."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


@idiom
def noise_in_forward_differs(k: User):
    """`torch.randn_like` in a model's own forward, inside `bmt.own_random`: the ranks' noise differs"""
    model = k.shard(Noisy())
    with k.own_random():
        return {"differ": _differ(k, model(torch.ones(4, 6, device=k.device)))}


@idiom(verdicts="right said said", says="bmt.own_random")
def noise_in_unconverted_forward_differs(k: User):
    """The same without `bmt.own_random`"""
    model = k.shard(Noisy())
    return {"differ": _differ(k, model(torch.ones(4, 6, device=k.device)))}


@idiom
def shared_numbers_in_the_script(k: User):
    """`random.random()` and `random.choice` in the script decide the same on all ranks, after training with dropout"""
    model = k.net(dropout=0.5)
    manager = k.sgd(model)
    for x, y in k.batches():
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        manager.step()
    seen = random.random()
    rows = k.gather(torch.tensor([[seen]], dtype=torch.float64))
    return {"equal": bool((rows == seen).all()), "number": seen}


@idiom
def recomputed_dropout(k: User):
    """A gradient under dropout is that of the masks that the forward drew"""

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.up(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Kept() for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = k.shard(Model())
    x = torch.ones(4, 8, device=k.device)
    out = model(x)
    kept = (out != 0).float().sum(0)
    out.sum().backward()
    share = k.grads(model)["layers.1.up.bias"]
    total = k.gather(kept[None]).sum(0) * 2
    return {"same": bool(torch.allclose(share, total / k.ranks))}


@idiom
def own_generator(k: User):
    """Numbers of a generator of the user's, the same on all"""
    model = k.net()
    generator = torch.Generator().manual_seed(3)
    manager = k.sgd(model)
    for x, y in k.batches():
        noise = torch.randn(6, generator=generator).to(k.device)
        k.step(manager, F.cross_entropy(model(x + noise), y))
    return model


@idiom
def forked_numbers(k: User):
    """`torch.random.fork_rng` with a seed, inside forward"""

    class Projected(Net):
        def forward(self, x):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                matrix = torch.randn(6, 6)
            return super().forward(x @ matrix.to(x.device))

    model = k.shard(Projected())
    return k.train(model, k.sgd(model))


@idiom
def state_put_back(k: User):
    """`torch.get_rng_state` and `set_rng_state` around an evaluation"""
    state = torch.get_rng_state()
    a = torch.randn(3)
    torch.set_rng_state(state)
    return {"same": bool(torch.equal(a, torch.randn(3)))}


@idiom
def parameters_made_later(k: User):
    """A layer made after training with dropout starts alike on all ranks"""
    model = k.net(dropout=0.5)
    manager = k.sgd(model)
    for x, y in k.batches():
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        manager.step()
    later = nn.Linear(4, 4)
    rows = k.gather(later.weight.detach().reshape(1, -1))
    return {"equal": bool((rows == rows[:1]).all())}


@idiom
def permutation_of_an_epoch(k: User):
    """`torch.randperm` of the script's seed orders the epoch alike on all ranks"""
    data, targets = k.randn(24, 6), k.randint(5, 24)
    torch.manual_seed(9)
    order = torch.randperm(24).to(k.device)
    model = k.net()
    manager = k.sgd(model)
    for start in (0, 12):
        rows = order[start : start + 12]
        k.step(manager, F.cross_entropy(model(k.share(data[rows])), k.share(targets[rows])))
    return model


@idiom
def stochastic_depth(k: User):
    """Layers are dropped for all samples by `torch.rand(())` of the user's own generator"""

    class Dropped(Net):
        def __init__(self):
            super().__init__(3)
            self.generator = torch.Generator().manual_seed(2)

        def features(self, x):
            x = self.enter(x)
            for layer in self.layers:
                if torch.rand((), generator=self.generator) > 0.4:
                    x = layer(x)
            return self.norm(x)

    model = k.shard(Dropped())
    return k.train(model, k.sgd(model), steps=4)


class NoisyByNumpy(Net):
    """Adds noise of numpy's to its inputs."""

    def forward(self, x):
        noise = numpy.random.standard_normal(x.shape)
        return super().forward(x + torch.from_numpy(noise).to(x.device, x.dtype))


@idiom(verdicts="right said said", says="bmt.own_random")
def noise_of_numpy_in_forward_differs(k: User):
    """`numpy.random.standard_normal` in a model's forward: the ranks' noise differs"""
    model = k.shard(NoisyByNumpy())
    return {"differ": _differ(k, model(torch.ones(4, 6, device=k.device)))}


class Jittered(Layer):
    """Scales by numbers of a generator that it was given."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return super().forward(x) * self.draw().to(x.device, x.dtype)


def _train_jittered(k: User, draw, layers=None):
    model = Net()
    model.layers = layers or nn.ModuleList([Jittered(draw) for _ in range(2)])
    model = k.shard(model)
    return k.train(model, k.sgd(model))


@idiom
def numpy_in_a_block(k: User):
    """`numpy.random.rand` in a block's forward, the same on all, drawn again for its gradient"""
    numpy.random.seed(5)
    return _train_jittered(k, lambda: torch.from_numpy(1 + numpy.random.rand(8)))


class OfItsOwn(Layer):
    """Scales by numbers of generators of its own."""

    def __init__(self):
        super().__init__()
        self.rng, self.generator = numpy.random.default_rng(3), torch.Generator().manual_seed(3)

    def forward(self, x):
        noise = torch.from_numpy(self.rng.random(8)) + torch.rand(8, generator=self.generator)
        return super().forward(x) * (1 + noise).to(x.device, x.dtype)


@idiom
def generators_of_a_block(k: User):
    """`self.rng = numpy.random.default_rng(3)` and a `torch.Generator` of a block's own draw in its forward"""
    return _train_jittered(k, None, nn.ModuleList([OfItsOwn() for _ in range(2)]))


@idiom(verdicts="refused", says="gave other values")
def generator_outside_of_a_block(k: User):
    """A generator that is no attribute draws in a recomputed block: nobody can draw the same again"""
    generator = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.rand, 8, generator=generator)
    return _train_jittered(k, draw)
