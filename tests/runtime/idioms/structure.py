"""Models of every build."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .registry import idiom
from .user import CLASSES, Layer, Net, User


def _trained(k: User, model, steps: int = 2):
    model = k.shard(model)
    return k.train(model, k.sgd(model), steps)


class Base(nn.Module):
    """Something between two linear layers."""

    def __init__(self, middle=None, layers: int = 3):
        super().__init__()
        self.enter, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])
        if middle is not None:
            self.middle = middle

    def body(self, x):
        return self.middle(x)

    def forward(self, x):
        return self.head(self.body(self.enter(x)))


@idiom
def converted_class(k: User):
    """A converted class with a stack and a parameter of its own"""

    class Model(k.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
            self.layers = k.stack([Layer() for _ in range(2)])
            self.gain = k.Parameter(torch.ones(8))

        def forward(self, x):
            x = self.enter(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(x * self.gain)

    return _trained(k, Model())


@idiom
def used_twice(k: User):
    """A block is called twice in a row (ALBERT)"""

    class Model(Base):
        def body(self, x):
            for layer in self.layers:
                x = layer(layer(x))
            return x

    return _trained(k, Model())


@idiom
def stack_twice(k: User):
    """The whole stack runs twice"""

    class Model(Base):
        def body(self, x):
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x)
            return x

    return _trained(k, Model())


@idiom
def backwards_order(k: User):
    """`reversed(self.layers)`, slices, an index"""

    class Model(Base):
        def body(self, x):
            for layer in reversed(self.layers):
                x = layer(x)
            for layer in self.layers[1:]:
                x = layer(x)
            return self.layers[-1](x)

    return _trained(k, Model())


@idiom
def early_exit(k: User):
    """The loop is left when all outputs are small, by a batch's number"""

    class Model(Base):
        calls = 0

        def body(self, x):
            self.calls += 1
            for number, layer in enumerate(self.layers):
                x = layer(x)
                if number >= self.calls % 3:
                    break
            return x

    return _trained(k, Model(), 4)


@idiom
def layers_skipped(k: User):
    """Layer drop by `random.random()` of a shared seed"""

    class Model(Base):
        def body(self, x):
            for layer in self.layers:
                if not self.training or random.random() > 0.4:
                    x = layer(x)
            return x

    return _trained(k, Model(), 4)


@idiom
def hidden_states(k: User):
    """All hidden states are collected and mixed"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.zeros(4))

        def body(self, x):
            states = [x]
            for layer in self.layers:
                states.append(layer(states[-1]))
            return (torch.stack(states) * self.mix.softmax(0)[:, None, None]).sum(0)

    return _trained(k, Model())


@idiom
def skip_connections(k: User):
    """A U-Net's connections between blocks"""

    class Model(Base):
        def body(self, x):
            kept = []
            for layer in self.layers:
                kept.append(x)
                x = layer(x)
            for layer in self.layers:
                x = layer(x + kept.pop())
            return x

    return _trained(k, Model())


@idiom
def unused_layer(k: User):
    """A layer that no forward uses"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(8, 8)

        def body(self, x):
            return self.layers[0](x)

    return _trained(k, Model())


@idiom
def results_as_dicts(k: User):
    """Blocks take keywords and give dicts"""

    class Dicts(Layer):
        def forward(self, *, hidden, scale=1.0, mask=None):
            return {"hidden": super().forward(hidden) * scale, "mask": mask, "mean": hidden.mean(-1, keepdim=True)}

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Dicts() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                out = layer(hidden=x, scale=0.9)
                x = out["hidden"] + out["mean"]
            return x

    return _trained(k, Model())


@dataclass
class Output:
    """A dataclass of results."""

    hidden: torch.Tensor
    first: torch.Tensor | None = None


@idiom
def results_as_dataclasses(k: User):
    """Blocks give dataclasses and tuples with None"""

    class Data(Layer):
        def forward(self, x):
            return Output(super().forward(x), None), (x.mean(-1), None)

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Data() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                out, (mean, _) = layer(x)
                x = out.hidden + mean[:, None]
            return x

    return _trained(k, Model())


@idiom
def nested_blocks(k: User):
    """Stacks inside the blocks of a stack"""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.ModuleList([Layer() for _ in range(2)]), nn.LayerNorm(8)

        def forward(self, x):
            for layer in self.inner:
                x = layer(x)
            return self.norm(x)

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Outer() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model())


@idiom
def parameter_list(k: User):
    """`nn.ParameterList` in a loop"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.gains = nn.ParameterList([nn.Parameter(torch.ones(8) * (n + 1)) for n in range(3)])

        def body(self, x):
            for layer, gain in zip(self.layers, self.gains, strict=True):
                x = layer(x) * gain
            return x / 6

    return _trained(k, Model())


@idiom
def parameter_dict(k: User):
    """`nn.ParameterDict` by key"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterDict({"a": nn.Parameter(torch.eye(8)), "b": nn.Parameter(torch.zeros(8))})

        def body(self, x):
            return torch.tanh(x @ self.weights["a"] + self.weights["b"])

    return _trained(k, Model())


@idiom
def module_dict(k: User):
    """`nn.ModuleDict` by task"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.tasks = nn.ModuleDict({"one": Layer(), "two": Layer()})
            self.calls = 0

        def body(self, x):
            self.calls += 1
            return self.tasks["one" if self.calls % 2 else "two"](x)

    return _trained(k, Model())


@idiom
def sequential(k: User):
    """`nn.Sequential` inside and outside"""
    return _trained(
        k, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 5))
    )


@idiom
def shared_module(k: User):
    """One module under two names"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.one = Layer()
            self.two = self.one

        def body(self, x):
            return self.two(self.one(x))

    return _trained(k, Model())


@idiom
def encoder_and_decoder(k: User):
    """torch's `nn.Transformer`, dropout 0"""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.head = nn.Linear(2, 8), nn.Linear(8, 5)
            self.body = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x):
            x = self.enter(x.view(-1, 3, 2))
            return self.head(self.body(x, x.flip(1)).mean(1))

    return _trained(k, Model())


@idiom
def encoder_layers_with_masks(k: User):
    """`nn.TransformerEncoder` with a causal and a padding mask"""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.head = nn.Linear(2, 8), nn.Linear(8, 5)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3))

        def forward(self, x):
            x = x.view(-1, 3, 2)
            padding = torch.zeros(x.shape[:2], device=x.device).masked_fill(x[..., 0] > 2, float("-inf"))
            padding[:, 0] = 0
            return self.head(self.body(self.enter(x), mask=self.mask, src_key_padding_mask=padding)[:, -1])

    return _trained(k, Model())


@idiom
def attention(k: User):
    """`nn.MultiheadAttention` with its weights returned"""

    class Model(Base):
        def body(self, x):
            x = x.view(-1, 2, 4)
            out, weights = self.middle(x, x, x, need_weights=True)
            return (out + weights.amax(-1, keepdim=True)).reshape(-1, 8)

    return _trained(k, Model(nn.MultiheadAttention(4, 2, batch_first=True)))


@idiom
def lstm(k: User):
    """`nn.LSTM` of two layers, state kept"""

    class Model(Base):
        def body(self, x):
            out, (h, _) = self.middle(x.view(-1, 2, 4))
            return torch.cat([out[:, -1], h[0]], -1)

    return _trained(k, Model(nn.LSTM(4, 4, 2, batch_first=True)))


@idiom
def gru_cells(k: User):
    """`nn.GRUCell` in a loop over time"""

    class Model(Base):
        def body(self, x):
            h = x.new_zeros(x.shape[0], 8)
            for part in x.view(-1, 2, 4).unbind(1):
                h = self.middle(part, h)
            return h

    return _trained(k, Model(nn.GRUCell(4, 8)))


@idiom
def convolutions(k: User):
    """Convolutions, group norm, pooling, channels last"""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            x = x.view(-1, 1, 2, 3).contiguous(memory_format=torch.channels_last)
            return self.head(self.body(x).mean((2, 3)))

    return _trained(k, Model())


@idiom
def batch_norm_evaluated(k: User):
    """Fine-tuning with batch norms in evaluation"""
    model = k.shard(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return k.train(model, k.sgd(model))


@idiom(verdicts="right said said", says="each rank's share of the batch alone")
def batch_norm_trained(k: User):
    """A batch norm in training sees the whole batch"""
    return _trained(k, nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)))


@idiom
def batch_norm_statistics(k: User):
    """A batch norm's running mean after training is the mean of all samples"""
    model = k.shard(nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 5)))
    for x, _ in k.batches():
        model(x)
    return {"mean": k.weights(model)["0.running_mean"], "count": k.weights(model)["0.num_batches_tracked"]}


@idiom(verdicts="right said said", says="SyncBatchNorm")
def sync_batch_norm(k: User):
    """`SyncBatchNorm` sees the batches of all ranks"""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    if k.sharded:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _trained(k, model)


@idiom
def weight_norm(k: User):
    """`parametrizations.weight_norm`"""
    return _trained(k, Base(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))))


@idiom
def old_weight_norm(k: User):
    """`torch.nn.utils.weight_norm`"""
    return _trained(k, Base(nn.utils.weight_norm(nn.Linear(8, 8))))


@idiom
def spectral_norm(k: User):
    """`parametrizations.spectral_norm`, inside a block"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            for layer in self.layers:
                nn.utils.parametrizations.spectral_norm(layer.up)

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model())


@idiom
def old_spectral_norm(k: User):
    """`torch.nn.utils.spectral_norm`, inside a block"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            for layer in self.layers:
                nn.utils.spectral_norm(layer.up)

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model())


@idiom
def orthogonal(k: User):
    """`parametrizations.orthogonal`"""
    return _trained(k, Base(nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))))


@idiom
def own_parametrization(k: User):
    """`register_parametrization` of the user's own"""

    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).T

    middle = nn.Linear(8, 8)
    nn.utils.parametrize.register_parametrization(middle, "weight", Symmetric())
    return _trained(k, Base(middle))


@idiom
def mixture_of_experts(k: User):
    """Top-1 routing; some experts get nothing on some ranks"""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(8, 4), nn.ModuleList([Layer() for _ in range(4)])

        def forward(self, x):
            weights, chosen = self.router(x).softmax(-1).max(-1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero()[:, 0]
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, None])
            return out

    return _trained(k, Base(Experts()))


@idiom
def hypernetwork(k: User):
    """One network makes the weights of another"""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.maker, self.code = nn.Linear(4, 64), nn.Parameter(torch.randn(4))

        def body(self, x):
            return F.linear(x, self.maker(self.code).view(8, 8))

    return _trained(k, Model())


@idiom
def siamese(k: User):
    """Two inputs through one network, and a distance"""
    model = k.net()
    manager = k.sgd(model)
    for x, _ in k.batches():
        a, b = model(x), model(x.flip(-1))
        k.step(manager, F.relu(1 - F.pairwise_distance(a, b)).mean() + (a - b).square().mean())
    return model


@idiom
def counter_in_forward(k: User):
    """A buffer counts forwards, in a block that is recomputed"""

    class Counting(Layer):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.count += 1
            return super().forward(x) / self.count

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Counting() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model())


@idiom
def counter_in_python(k: User):
    """A number of Python's counts forwards and decides what a block computes"""

    class Counting(Layer):
        count = 0

        def forward(self, x):
            self.count += 1
            return super().forward(x) / self.count

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Counting() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = _trained(k, Model())
    return {"counts": [layer.count for layer in model.layers], "weights": k.weights(model)}


@idiom
def data_dependent_start(k: User):
    """ActNorm: the first batch sets a scale, the same batch for all"""

    class ActNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.up = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)
            self.register_buffer("ready", torch.tensor(False))

        def forward(self, x):
            if not self.ready:
                self.scale.data.copy_(torch.full((8,), 0.5, device=x.device))
                self.ready.fill_(True)
            return x + torch.tanh(self.up(x * self.scale))

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([ActNorm() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model())


class Centred(nn.Module):
    """Takes off a moving mean of what it is given, `reduced` over the ranks."""

    def __init__(self, reduced):
        super().__init__()
        self.linear, self.reduced = nn.Linear(CLASSES, CLASSES), reduced
        self.register_buffer("center", torch.zeros(CLASSES))

    def forward(self, x):
        x = self.linear(x)
        with torch.no_grad():
            self.center.mul_(0.9).add_(self.reduced(x.mean(0)), alpha=0.1)
        return x - self.center


def _centred(k, reduced):
    net = Net()
    net.head = nn.Sequential(net.head, Centred(reduced))
    model = k.shard(net)
    return k.train(model, k.sgd(model), steps=3)


@idiom(verdicts="right said said", says="different buffers")
def centre(k: User):
    """DINO: a buffer follows the mean of the outputs"""
    return _centred(k, lambda mean: mean)


@idiom
def centre_averaged(k: User):
    """The same, of the mean over ranks"""
    return _centred(k, k.average)


@idiom
def codebook(k: User):
    """VQ: nearest rows of a trained codebook, straight-through"""

    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Embedding(6, 8)

        def forward(self, x):
            nearest = torch.cdist(x, self.codes.weight).argmin(1)
            q = self.codes(nearest)
            self.loss = F.mse_loss(q, x.detach()) + 0.25 * F.mse_loss(x, q.detach())
            return x + (q - x).detach()

    model = k.shard(Base(Codebook()))
    manager = k.sgd(model)
    for x, y in k.batches():
        out = model(x)
        k.step(manager, F.cross_entropy(out, y) + model.middle.loss)
    return model


@idiom
def embeddings(k: User):
    """`nn.Embedding` with `padding_idx`, and `nn.EmbeddingBag`"""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.bag = nn.Embedding(9, 6, padding_idx=0), nn.EmbeddingBag(9, 6, mode="mean")
            self.net = Net()

        def forward(self, ids):
            return self.net(self.one(ids).mean(1) + self.bag(ids))

    model = k.shard(Model())
    manager = k.sgd(model)
    for step in range(3):
        y = k.share(k.randint(5, 12, seed=step))
        k.step(manager, F.cross_entropy(model(k.share(k.randint(9, 12, 3, seed=step))), y))
    return model


@idiom
def embedding_with_max_norm(k: User):
    """`nn.Embedding(max_norm=1)`, which changes its rows in forward"""
    model = k.shard(nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), Net()))
    manager = k.sgd(model)
    for step in range(3):
        y = k.share(k.randint(5, 12, seed=step))
        k.step(manager, F.cross_entropy(model(k.share(k.randint(9, 12, seed=step))), y))
    return model


@idiom
def embedding_scaled_by_frequency(k: User):
    """`nn.Embedding(scale_grad_by_freq=True)`, called twice, one row padding"""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 6, padding_idx=2, scale_grad_by_freq=True)

        def forward(self, ids):
            return self.words(ids) + self.words(ids.flip(1)).mean(1, keepdim=True)

    model = k.shard(nn.Sequential(k.block(Words()), nn.Flatten(), nn.Linear(18, 5)))
    manager = k.sgd(model)
    for step in range(3):
        y = k.share(k.randint(5, 12, seed=step))
        k.step(manager, F.cross_entropy(model(k.share(k.randint(9, 12, 3, seed=step))), y))
    return model


@idiom(verdicts="right refused refused", says="EmbeddingBag")
def bags_scaled_by_frequency(k: User):
    """`nn.EmbeddingBag(scale_grad_by_freq=True)`"""
    model = k.shard(nn.Sequential(nn.EmbeddingBag(9, 6, scale_grad_by_freq=True), Net()))
    k.step(k.sgd(model), F.cross_entropy(model(k.share(k.randint(9, 12, 3))), k.share(k.randint(5, 12))))
    return model


@idiom
def sparse_embedding(k: User):
    """`nn.Embedding(sparse=True)` with SGD"""
    model = k.shard(nn.Sequential(nn.Embedding(9, 6, sparse=True), Net()))
    manager = k.sgd(model)
    for step in range(3):
        y = k.share(k.randint(5, 12, seed=step))
        k.step(manager, F.cross_entropy(model(k.share(k.randint(9, 12, seed=step))), y))
    return model


@idiom
def complex_parameter(k: User):
    """A complex parameter (a spectral layer)"""

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, dtype=torch.cfloat))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8)

    return _trained(k, Base(Spectral()))


@idiom
def checkpoints_of_the_user(k: User):
    """`torch.utils.checkpoint` around the blocks, `use_reentrant=False`"""

    class Model(Base):
        def body(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    return _trained(k, Model())


@idiom
def reentrant_checkpoints(k: User):
    """`torch.utils.checkpoint` around the blocks, `use_reentrant=True`"""

    class Model(Base):
        def body(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=True)
            return x

    return _trained(k, Model())


@idiom
def checkpoint_inside_a_block(k: User):
    """`torch.utils.checkpoint` inside a block that is recomputed itself"""

    class Checked(Layer):
        def forward(self, x):
            return x + checkpoint(lambda h: self.down(F.gelu(self.up(self.norm(h)))), x, use_reentrant=False)

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Checked() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model())


@idiom
def checkpointed_sequence(k: User):
    """`checkpoint_sequential`"""

    class Model(Base):
        def body(self, x):
            return checkpoint_sequential(self.middle, 2, x, use_reentrant=False)

    return _trained(k, Model(nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])))


@torch.jit.script
def _gated(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = x + bias
    return y * torch.sigmoid(1.702 * y)


@idiom
def scripted_function(k: User):
    """A `torch.jit.script` function inside blocks"""

    class Scripted(Layer):
        def forward(self, x):
            return x + self.down(_gated(F.linear(self.norm(x), self.up.weight), self.up.bias))

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Scripted() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model(), 5)


class Double(torch.autograd.Function):
    """A user's own function."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return 2 * x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return 2 * grad @ w, 2 * grad.T @ x


@idiom
def autograd_function(k: User):
    """An `autograd.Function` of the user's on a weight, in blocks"""

    class Own(Layer):
        def forward(self, x):
            return x + self.down(F.gelu(Double.apply(self.norm(x), self.up.weight)))

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Own() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model())


@idiom
def tensor_attributes(k: User):
    """A block keeps a tensor of its forward as an attribute, which the loss uses"""

    class Keeping(Layer):
        def forward(self, x):
            out = super().forward(x)
            self.kept = out.square().mean()
            return out

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Keeping() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = k.shard(Model())
    manager = k.sgd(model)
    for x, y in k.batches():
        out = model(x)
        k.step(manager, F.cross_entropy(out, y) + 0.1 * sum(layer.kept for layer in model.layers))
    return model


@idiom(verdicts="refused", says="in place")
def in_place_on_inputs(k: User):
    """Blocks that change their input in place"""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            x[:, :2] = 0
            x = x + torch.tanh(self.up(x))
            return x.mul_(0.9)

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([InPlace() for _ in range(2)])

        def body(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return _trained(k, Model())


@idiom
def two_batches_before_backward(k: User):
    """Two forwards, then one backward of their sum"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y) + F.cross_entropy(model(-x), y))
    return model


@idiom
def built_under_a_device(k: User):
    """A model built inside `with torch.device(...)` and moved by `.to(device)`"""
    with torch.device(k.device):
        model = Net()
    return _trained(k, model.to(k.device))


def _changed_when_sharded(k: User, change, steps=3, finish=None):
    """A layer of a model that is ready to train gets a parametrization."""
    model = k.net()
    change(model)
    model = k.train(model, k.sgd(model), steps)
    if finish is not None:
        finish(model)
    x, _ = k.batch()
    return {"weights": k.weights(model), "out": k.gather(model(x))}


@idiom(verdicts="right refused refused", says="before its model is sharded")
def weight_norm_when_sharded(k: User):
    """`parametrizations.weight_norm` of a layer of a sharded model"""
    return _changed_when_sharded(k, lambda m: nn.utils.parametrizations.weight_norm(m.head))


@idiom(verdicts="right refused refused", says="before its model is sharded")
def weight_norm_of_a_block_when_sharded(k: User):
    """The same of a layer in each block"""

    def change(model):
        for layer in model.layers:
            nn.utils.parametrizations.weight_norm(layer.up)

    return _changed_when_sharded(k, change)


@idiom(verdicts="right refused refused", says="bmt.gathered")
def old_weight_norm_when_sharded(k: User):
    """`nn.utils.weight_norm` of a layer of a sharded model"""
    return _changed_when_sharded(k, lambda m: nn.utils.weight_norm(m.head))


@idiom(verdicts="right refused refused", says="bmt.gathered")
def old_weight_norm_removed_when_sharded(k: User):
    """The same, and removed after training"""
    return _changed_when_sharded(
        k, lambda m: nn.utils.weight_norm(m.head), finish=lambda m: nn.utils.remove_weight_norm(m.head)
    )


@idiom
def spectral_norm_when_sharded(k: User):
    """`parametrizations.spectral_norm` of a layer of a sharded model"""
    return _changed_when_sharded(k, lambda m: nn.utils.parametrizations.spectral_norm(m.head))


@idiom
def old_spectral_norm_when_sharded(k: User):
    """`nn.utils.spectral_norm` of a layer of a sharded model"""
    return _changed_when_sharded(k, lambda m: nn.utils.spectral_norm(m.head))


@idiom(verdicts="right refused refused", says="bmt.gathered")
def orthogonal_when_sharded(k: User):
    """`parametrizations.orthogonal` of a layer of a sharded model"""
    return _changed_when_sharded(k, lambda m: nn.utils.parametrizations.orthogonal(m.head))


@idiom
def own_parametrization_when_sharded(k: User):
    """`register_parametrization` of the user's own (symmetric)"""

    class Half(nn.Module):
        def forward(self, w):
            return 0.5 * w.tanh()

    return _changed_when_sharded(k, lambda m: nn.utils.parametrize.register_parametrization(m.head, "weight", Half()))


@idiom(verdicts="right refused refused", says="before its model is sharded")
def parametrization_removed_when_sharded(k: User):
    """Weight norm, removed after training with `remove_parametrizations`"""
    return _changed_when_sharded(
        k,
        lambda m: nn.utils.parametrizations.weight_norm(m.head),
        finish=lambda m: nn.utils.parametrize.remove_parametrizations(m.head, "weight"),
    )


@idiom(verdicts="right refused refused", says="bmt.gathered")
def pruned_by_magnitude_when_sharded(k: User):
    """`prune.l1_unstructured` of a layer of a sharded model"""
    return _changed_when_sharded(k, lambda m: prune.l1_unstructured(m.head, "weight", amount=0.3))


@idiom(verdicts="right refused refused", says="bmt.gathered")
def pruned_by_chance_when_sharded(k: User):
    """`prune.random_unstructured`"""
    return _changed_when_sharded(k, lambda m: prune.random_unstructured(m.head, "weight", amount=0.3))


@idiom(verdicts="right refused refused", says="bmt.gathered")
def pruned_in_rows_when_sharded(k: User):
    """`prune.ln_structured`"""
    return _changed_when_sharded(k, lambda m: prune.ln_structured(m.head, "weight", amount=2, n=2, dim=0))


@idiom(verdicts="right refused refused", says="bmt.gathered")
def pruned_globally_when_sharded(k: User):
    """`prune.global_unstructured` of several layers"""

    def change(model):
        those = [(model.head, "weight"), (model.layers[0].up, "weight")]
        prune.global_unstructured(those, pruning_method=prune.L1Unstructured, amount=0.3)

    return _changed_when_sharded(k, change)


@idiom(verdicts="right refused refused", says="bmt.gathered")
def pruning_removed_when_sharded(k: User):
    """`prune.remove` after training"""
    return _changed_when_sharded(
        k,
        lambda m: prune.l1_unstructured(m.head, "weight", amount=0.3),
        finish=lambda m: prune.remove(m.head, "weight"),
    )


@idiom(verdicts="right refused refused", says="bmt.gathered")
def pruned_in_turns_when_sharded(k: User):
    """Pruned, trained, pruned again and trained (a lottery ticket)"""
    model = k.net()
    manager = k.sgd(model)
    for _ in range(2):
        prune.l1_unstructured(model.head, "weight", amount=0.2)
        k.train(model, manager)
    return model


@idiom
def old_weight_norm_in_gathered(k: User):
    """`nn.utils.weight_norm` inside `bmt.gathered`"""

    def change(model):
        with k.gathered(model.head):
            nn.utils.weight_norm(model.head)

    return _changed_when_sharded(k, change)


@idiom(verdicts="right refused refused", says="before its model is sharded")
def weight_norm_in_gathered(k: User):
    """`parametrizations.weight_norm` inside `bmt.gathered`"""

    def change(model):
        with k.gathered(model.head):
            nn.utils.parametrizations.weight_norm(model.head)

    return _changed_when_sharded(k, change)


@idiom
def orthogonal_in_gathered(k: User):
    """`parametrizations.orthogonal` inside `bmt.gathered`"""

    def change(model):
        with k.gathered(model.head, write=True):
            nn.utils.parametrizations.orthogonal(model.head)

    return _changed_when_sharded(k, change)


@idiom
def parameter_of_gathered_values(k: User):
    """`nn.Parameter(model.head.weight.data.clone())` inside `bmt.gathered`, as another layer's weight"""
    model = k.net()
    with k.gathered(model.head):
        weight = nn.Parameter(model.head.weight.data.clone())
    manager = k.sgd([*model.parameters(), weight])
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x) + F.linear(model.features(x), weight), y))
    return {"weights": k.weights(model), "weight": weight.detach().clone()}


@idiom
def pruned_in_gathered(k: User):
    """`prune.l1_unstructured` inside `bmt.gathered`, and removed after training"""

    def change(model):
        with k.gathered(model.head):
            prune.l1_unstructured(model.head, "weight", amount=0.3)

    def finish(model):
        with k.gathered(model.head, write=True):
            prune.remove(model.head, "weight")

    return _changed_when_sharded(k, change, finish=finish)


@idiom
def pruned_globally_in_gathered(k: User):
    """`prune.global_unstructured` of several layers inside `bmt.gathered`"""

    def change(model):
        those = [(model.head, "weight"), (model.layers[0].up, "weight")]
        with k.gathered(model):
            prune.global_unstructured(those, pruning_method=prune.L1Unstructured, amount=0.3)

    return _changed_when_sharded(k, change)
