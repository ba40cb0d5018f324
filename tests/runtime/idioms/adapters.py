"""LoRA and other small parts that train beside frozen weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import Net, User


class Lora(nn.Module):
    """A linear layer with a product of two small matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.merged = False

    def delta(self):
        return self.b @ self.a

    def merge(self):
        self.base.weight.data += self.delta()
        self.merged = True

    def unmerge(self):
        self.base.weight.data -= self.delta()
        self.merged = False

    def forward(self, x):
        out = self.base(x)
        return out if self.merged else out + x @ self.a.T @ self.b.T


def _with_lora(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        p.requires_grad = False
    for layer in net.layers:
        layer.up = Lora(layer.up)
    return net


def _tuned(k: User, model, steps: int = 2):
    return k.train(model, k.sgd([p for p in model.parameters() if p.requires_grad], lr=0.5), steps)


@idiom
def lora(k: User):
    """LoRA put in before wrapping, all else frozen"""
    return _tuned(k, k.shard(_with_lora(Net())))


@idiom
def lora_after(k: User):
    """LoRA put in after wrapping, and wrapped again"""
    model = _with_lora(k.net())
    return _tuned(k, k.shard(model))


@idiom
def lora_after_unwrapped(k: User):
    """LoRA put in after wrapping, not wrapped again"""
    model = _with_lora(k.net())
    return _tuned(k, model.to(k.device))


@idiom
def lora_merged(k: User):
    """`merge()`: `base.weight.data += b @ a`, evaluated"""
    model = k.shard(_with_lora(Net()))
    _tuned(k, model)
    for layer in model.layers:
        layer.up.merge()
    x, _ = k.batch()
    with torch.no_grad():
        return {"out": k.gather(model(x)), "weights": k.weights(model)}


@idiom
def lora_merged_and_back(k: User):
    """`merge()`, `unmerge()`, more training"""
    model = k.shard(_with_lora(Net()))
    _tuned(k, model)
    for layer in model.layers:
        layer.up.merge()
        layer.up.unmerge()
    return _tuned(k, model, 2)


@idiom
def lora_merged_gathered(k: User):
    """The merge inside `bmt.gathered(write=True)`"""
    model = k.shard(_with_lora(Net()))
    _tuned(k, model)
    with k.gathered(model, write=True):
        for layer in model.layers:
            layer.up.merge()
    return model


@idiom
def lora_called_by_itself(k: User):
    """`lora.forward(x)` is called directly, and `lora.delta()` in the loss"""
    model = k.shard(_with_lora(Net()))
    manager = k.sgd([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for x, _ in k.batches():
        h = model.layers[0].up.forward(x.repeat(1, 2)[:, :8])
        k.step(manager, h.tanh().square().mean() + 0.1 * model.layers[1].up.delta().sum())
    return model


@idiom
def lora_saved_alone(k: User):
    """Only the adapter's weights are saved, and loaded into another"""
    model = k.shard(_with_lora(Net()))
    _tuned(k, model)
    adapter = {n: v for n, v in model.state_dict().items() if n.endswith((".a", ".b"))}
    other = k.shard(_with_lora(Net()))
    other.load_state_dict(adapter, strict=False)
    return {"adapter": adapter, "b": [layer.up.b.detach().abs().sum().item() for layer in other.layers]}


@idiom
def lora_on_rounded_weights(k: User):
    """A frozen base whose weights were rounded to bf16 by `p.data = ...` before wrapping"""
    net = Net()
    for p in net.layers.parameters():
        p.data = p.data.bfloat16().float()
    net = _with_lora(net)
    return _tuned(k, k.shard(net))


@idiom
def two_adapters(k: User):
    """Two adapters of which one is on at a time"""

    class Two(Lora):
        def __init__(self, base):
            super().__init__(base)
            self.c, self.d = nn.Parameter(self.a.detach() * 0.5), nn.Parameter(torch.zeros_like(self.b))
            self.active = 0

        def forward(self, x):
            a, b = ((self.a, self.b), (self.c, self.d))[self.active]
            return self.base(x) + x @ a.T @ b.T

    net = Net()
    net.requires_grad_(False)
    for layer in net.layers:
        layer.up = Two(layer.up)
    model = k.shard(net)
    manager = k.sgd([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step, _ in enumerate(k.after_backward(model, manager, steps=4)):
        for layer in model.layers:
            layer.up.active = (step + 1) % 2
    return model


@idiom
def dora(k: User):
    """DoRA: norms of `W + BA` in forward"""

    class Dora(Lora):
        def __init__(self, base):
            super().__init__(base)
            self.size = nn.Parameter(base.weight.detach().norm(dim=1))

        def forward(self, x):
            w = self.base.weight + self.delta()
            return F.linear(x, w * (self.size / w.norm(dim=1))[:, None], self.base.bias)

    net = Net()
    net.requires_grad_(False)
    for layer in net.layers:
        layer.up = Dora(layer.up)
    return _tuned(k, k.shard(net))


@idiom
def biases_alone(k: User):
    """BitFit: only biases train"""
    model = k.net()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return _tuned(k, model)


@idiom
def prompts(k: User):
    """Prompt tuning: trained vectors before a frozen model"""

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.prompt = Net().requires_grad_(False), nn.Parameter(torch.randn(2, 6) * 0.1)

        def forward(self, x):
            x = torch.cat([self.prompt.unsqueeze(0).expand(len(x), -1, -1), x.unsqueeze(1)], 1)
            return self.model(x).mean(1)

    return _tuned(k, k.shard(Prompted()))


@idiom
def bottlenecks(k: User):
    """Adapters after each block, wired by a forward hook"""
    model = Net().requires_grad_(False)
    model.adapters = nn.ModuleList([nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)) for _ in model.layers])
    model = k.shard(model)
    for layer, adapter in zip(model.layers, model.adapters, strict=True):
        layer.register_forward_hook(lambda m, a, out, adapter=adapter: out + adapter(out))
    return _tuned(k, model)


@idiom
def modules_to_save(k: User):
    """PEFT's `modules_to_save`: a copy of the head trains, the original stays"""
    import copy

    class Saved(nn.Module):
        def __init__(self, original):
            super().__init__()
            self.original, self.copy = original, copy.deepcopy(original).requires_grad_(True)

        def forward(self, x):
            return self.copy(x)

    net = _with_lora(Net())
    net.head = Saved(net.head)
    return _tuned(k, k.shard(net))


@idiom
def modules_to_save_after(k: User):
    """The same, made of a sharded head"""
    import copy

    class Saved(nn.Module):
        def __init__(self, original):
            super().__init__()
            self.original, self.copy = original, copy.deepcopy(original).requires_grad_(True)

        def forward(self, x):
            return self.copy(x)

    model = k.net()
    model.requires_grad_(False)
    model.head = Saved(model.head)
    return _tuned(k, model)


@idiom
def layer_by_layer(k: User):
    """Gradual unfreezing: one more block trains after each step"""
    model = k.net(layers=3)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    manager = k.sgd(model)
    for number, (x, y) in enumerate(k.batches()):
        model.layers[-1 - number].requires_grad_(True)
        k.step(manager, F.cross_entropy(model(x), y))
    return model
