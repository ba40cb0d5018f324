"""Weights that are written after a model was built: initialisation, surgery, pruning, perturbation."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from .registry import idiom
from .user import Net, User


@idiom
def init_functions(k: User):
    """`nn.init` on each parameter, from the script"""
    model = k.net()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
        else:
            nn.init.zeros_(p)
    return k.train(model, k.sgd(model))


@idiom
def more_init_functions(k: User):
    """`kaiming_normal_`, `trunc_normal_`, `orthogonal_`, `constant_`, `eye_`"""
    model = k.net()
    nn.init.kaiming_normal_(model.enter.weight)
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.orthogonal_(model.layers[0].up.weight)
    nn.init.constant_(model.head.bias, 0.5)
    nn.init.eye_(model.layers[1].down.weight)
    return model


@idiom
def applied(k: User):
    """`model.apply(init_weights)` from the script"""
    model = k.net()

    def init_weights(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    model.apply(init_weights)
    return k.train(model, k.sgd(model))


@idiom
def applied_through_data(k: User):
    """`module.weight.data.normal_` and `bias.data.fill_` in `apply`"""
    model = k.net()

    def init_weights(module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, 0.02)
            module.bias.data.fill_(0.01)

    model.apply(init_weights)
    return model


@idiom
def written_through_data(k: User):
    """`p.data.normal_`, `uniform_`, `fill_`, `zero_` from the script"""
    model = k.net()
    model.enter.weight.data.normal_(0.0, 0.1)
    model.head.weight.data.uniform_(-0.1, 0.1)
    model.head.bias.data.fill_(0.3)
    model.enter.bias.data.zero_()
    return model


@idiom
def reset_parameters(k: User):
    """`module.reset_parameters()` of a part, from the script"""
    model = k.net()
    model.head.reset_parameters()
    for module in model.layers.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return k.train(model, k.sgd(model))


@idiom
def own_init_method(k: User):
    """`model.init_weights()` of a converted class, from the script"""

    class Model(k.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = Net(), k.Parameter(torch.ones(5))

        def init_weights(self):
            nn.init.normal_(self.net.head.weight, std=0.02)
            nn.init.uniform_(self.scale, 0.9, 1.1)
            self.net.enter.weight.data.mul_(0.5)

        def forward(self, x):
            return self.net(x) * self.scale

    model = k.shard(Model())
    model.init_weights()
    return k.train(model, k.sgd(model))


@idiom
def last_layer_to_zero(k: User):
    """`nn.init.zeros_` of each block's last layer"""
    model = k.net()
    for layer in model.layers:
        nn.init.zeros_(layer.down.weight)
        nn.init.zeros_(layer.down.bias)
    return k.train(model, k.sgd(model))


@idiom
def scaled_by_depth(k: User):
    """`layer.down.weight.data.div_(math.sqrt(2 * n))`"""
    model = k.net(layers=3)
    for number, layer in enumerate(model.layers):
        layer.down.weight.data.div_(math.sqrt(2.0 * (number + 1)))
    return model


@idiom
def scaled_under_no_grad(k: User):
    """`p *= 0.5`, `p /= 2`, `p += 1` under `no_grad`"""
    model = k.net()
    with torch.no_grad():
        model.head.weight *= 0.5
        model.enter.weight /= 2
        model.head.bias += 1
        model.norm.weight -= 0.1
    return model


@idiom(verdicts="right refused refused", says="bmt.gathered")
def one_row(k: User):
    """`weight.data[0] = 0`, `weight[1].fill_` and a bias's entry"""
    model = k.shard(nn.Sequential(nn.Embedding(7, 6), Net()))
    model[0].weight.data[0] = 0
    with torch.no_grad():
        model[0].weight[1].fill_(0.5)
        model[1].head.bias[2] = -1.0
    return model


@idiom(verdicts="right refused refused", says="bmt.gathered")
def rows_by_mask(k: User):
    """`weight.data[mask] = 0` and `weight.data.masked_fill_`"""
    model = k.net()
    mask = k.randn(5, 8) > 0.5
    model.head.weight.data[mask] = 0
    model.enter.weight.data.masked_fill_(k.randn(8, 6) > 0.5, 0.1)
    return model


@idiom
def pretrained_embedding(k: User):
    """`embedding.weight.data.copy_(vectors)`"""
    model = k.shard(nn.Sequential(nn.Embedding(7, 6), Net()))
    model[0].weight.data.copy_(k.randn(7, 6))
    return model


@idiom
def pretrained_embedding_assigned(k: User):
    """`embedding.weight.data = vectors`"""
    model = k.shard(nn.Sequential(nn.Embedding(7, 6), Net()))
    model[0].weight.data = k.randn(7, 6)
    return model


@idiom
def pretrained_embedding_as_parameter(k: User):
    """`embedding.weight = nn.Parameter(vectors, requires_grad=False)` after the model was wrapped"""
    model = k.shard(nn.Sequential(nn.Embedding(7, 6), Net()))
    model[0].weight = nn.Parameter(k.randn(7, 6), requires_grad=False)
    manager = k.sgd([p for p in model.parameters() if p.requires_grad])
    for step in range(2):
        y = k.share(k.randint(5, 12, seed=step))
        k.step(manager, F.cross_entropy(model(k.share(k.randint(7, 12, seed=step))), y))
    return model


@idiom
def embedding_is_resized(k: User):
    """A larger embedding: the old rows are copied into a new one, which takes its place"""
    model = k.shard(nn.Sequential(nn.Embedding(7, 6), Net()))
    old = model[0]
    new = nn.Embedding(9, 6).to(k.device)
    with k.gathered(old):
        new.weight.data[:7] = old.weight.data
    new.weight.data[7:] = 0.1
    model[0] = k.shard(new)
    manager = k.sgd(model)
    for step in range(2):
        y = k.share(k.randint(5, 12, seed=step))
        k.step(manager, F.cross_entropy(model(k.share(k.randint(9, 12, seed=step))), y))
    return model


@idiom
def head_is_replaced(k: User):
    """`model.head = nn.Linear(...)` after wrapping, then an optimizer over all"""
    model = k.net()
    model.head = nn.Linear(8, 5).to(k.device)
    return k.train(model, k.sgd(model))


@idiom
def head_is_replaced_and_sharded(k: User):
    """The same, and the new layer is wrapped"""
    model = k.net()
    model.head = k.shard(nn.Linear(8, 5))
    return k.train(model, k.sgd(model))


@idiom
def head_is_replaced_before(k: User):
    """The head is replaced before the model is wrapped"""
    plain = Net()
    plain.head = nn.Linear(8, 5)
    model = k.shard(plain)
    return k.train(model, k.sgd(model))


@idiom
def head_is_added_later(k: User):
    """A second head is added after some steps, with a group of its own"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = k.manage(optimizer)
    k.train(model, manager, steps=2)
    model.second = nn.Linear(8, 5).to(k.device)
    optimizer.add_param_group({"params": model.second.parameters()})
    for x, y in k.batches(2):
        k.step(manager, F.cross_entropy(model.second(model.features(x)), y))
    return model


@idiom
def layer_is_appended(k: User):
    """Progressive growing: `model.layers.append(Layer())` after some steps, and a new optimizer"""
    from .user import Layer

    model = k.net()
    k.train(model, k.sgd(model), steps=2)
    model.layers.append(Layer().to(k.device))
    return k.train(model, k.sgd(model), steps=2)


@idiom
def layers_are_cut(k: User):
    """`model.layers = model.layers[:2]` of four"""
    model = k.net(layers=4)
    model.layers = model.layers[:2]
    return k.train(model, k.sgd(model))


@idiom
def layer_becomes_identity(k: User):
    """`model.norm = nn.Identity()`"""
    model = k.net()
    model.norm = nn.Identity()
    return k.train(model, k.sgd(model))


@idiom
def tied_after(k: User):
    """Weights are tied after wrapping: `b.weight = a.weight`"""
    model = k.net(width=6, outputs=6)
    model.head.weight = model.enter.weight
    return k.train(model, k.sgd(model))


@idiom
def tied_before(k: User):
    """Weights are tied before wrapping"""
    plain = Net(width=6, outputs=6)
    plain.head.weight = plain.enter.weight
    model = k.shard(plain)
    return k.train(model, k.sgd(model))


@idiom
def two_parameters_of_one_storage(k: User):
    """Two Parameters made of one tensor stay tied"""
    plain = Net(width=6, outputs=6).to(k.device)
    plain.head.weight = nn.Parameter(plain.enter.weight.data)
    model = k.shard(plain)
    # One at a time: many at once, as on a GPU, write to the same memory at once.
    return k.train(model, k.manage(torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)))


@idiom
def copied_between_layers(k: User):
    """`b.weight.data.copy_(a.weight.data)` of two blocks"""
    model = k.net()
    model.layers[1].up.weight.data.copy_(model.layers[0].up.weight.data)
    with torch.no_grad():
        model.layers[1].down.weight.copy_(model.layers[0].down.weight)
    return model


@idiom
def vector_and_back(k: User):
    """`parameters_to_vector`, a change, `vector_to_parameters`"""
    model = k.net()
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 0.9, model.parameters())
    return {"vector": vector, "weights": k.weights(model)}


@idiom(verdicts="right refused refused", says="full_tensor")
def pruned(k: User):
    """`prune.l1_unstructured` on a layer, training, `prune.remove`"""
    model = k.net()
    prune.l1_unstructured(model.head, "weight", amount=0.4)
    k.train(model, k.sgd(model))
    prune.remove(model.head, "weight")
    return model


@idiom
def pruned_before(k: User):
    """`prune.random_unstructured` before wrapping"""
    plain = Net()
    prune.random_unstructured(plain.head, "weight", amount=0.4)
    model = k.shard(plain)
    return k.train(model, k.sgd(model))


@idiom
def pruned_by_hand(k: User):
    """A mask by size, `p.data.mul_(mask)` after each step"""
    model = k.net()
    masks = {n: (p.data.abs() > 0.1).float() for n, p in model.named_parameters() if p.dim() > 1}
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y))
        for n, p in model.named_parameters():
            if n in masks:
                p.data.mul_(masks[n])
    return model


@idiom(verdicts="right refused refused", says="bmt.gathered")
def pruned_by_quantile(k: User):
    """A threshold over all weights: `torch.cat(...).kthvalue`"""
    model = k.net()
    sizes = torch.cat([p.data.abs().flatten() for p in model.parameters() if p.dim() > 1])
    threshold = sizes.kthvalue(sizes.numel() // 2).values.item()
    for p in model.parameters():
        if p.dim() > 1:
            p.data[p.data.abs() < threshold] = 0
    return {"threshold": threshold, "weights": k.weights(model)}


@idiom
def evolution(k: User):
    """Evolution strategies: noise is added to the weights, taken away, and weighted by the loss"""
    model = k.net()
    x, y = k.batch()
    noise = {n: k.randn(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(noise[n], alpha=0.1)
        loss = k.mean(F.cross_entropy(model(x), y))
        for n, p in model.named_parameters():
            p.add_(noise[n], alpha=-0.1 - 0.01 * loss)
    return {"loss": loss, "weights": k.weights(model)}


@idiom
def loss_landscape(k: User):
    """The loss along a direction: `p.data = start[n] + a * d[n]`"""
    model, seen = k.net(), []
    x, y = k.batch()
    start = {n: p.data.clone() for n, p in model.named_parameters()}
    for a in (-0.5, 0.0, 0.5):
        for i, (n, p) in enumerate(model.named_parameters()):
            p.data = start[n] + a * k.randn(*p.shape, seed=i)
        with torch.no_grad():
            seen.append(k.mean(F.cross_entropy(model(x), y)))
    return {"seen": seen}


@idiom
def weights_are_quantised(k: User):
    """`p.data = (p.data / s).round() * s` with `s = p.data.abs().max() / 127`"""
    model = k.net()
    for p in model.parameters():
        s = p.data.abs().max() / 127 + 1e-8
        p.data = (p.data / s).round() * s
    return model


@idiom
def weights_are_clipped(k: User):
    """WGAN: `p.data.clamp_(-c, c)` after each step"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y))
        for p in model.parameters():
            p.data.clamp_(-0.1, 0.1)
    return model


@idiom(verdicts="right refused refused", says="full_tensor")
def weights_are_normalised(k: User):
    """`w.data = F.normalize(w.data, dim=1)` after each step"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y))
        model.head.weight.data = F.normalize(model.head.weight.data, dim=1)
    return model


@idiom
def frozen_by_name(k: User):
    """`p.requires_grad = False` for names, before the optimizer"""
    model = k.net()
    for name, p in model.named_parameters():
        p.requires_grad = "head" in name or "layers.1" in name
    return k.train(model, k.sgd([p for p in model.parameters() if p.requires_grad]))


@idiom
def frozen_and_unfrozen(k: User):
    """All but the head is frozen for two steps, then nothing"""
    model = k.net()
    manager = k.sgd(model)
    for p in model.parameters():
        p.requires_grad = False
    model.head.requires_grad_(True)
    k.train(model, manager, steps=2)
    for p in model.parameters():
        p.requires_grad = True
    return k.train(model, manager, steps=2)


@idiom
def frozen_in_the_middle(k: User):
    """A layer is frozen after two steps of SGD with momentum"""
    model = k.net()
    manager = k.sgd(model, momentum=0.9)
    k.train(model, manager, steps=2)
    model.layers[0].requires_grad_(False)
    return k.train(model, manager, steps=2)


@idiom
def two_models_mixed(k: User):
    """WiSE-FT: `a.data = 0.5 * a.data + 0.5 * b.data` of two models"""
    model, other = k.net(), k.net()
    k.train(other, k.sgd(other))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        a.data = 0.5 * a.data + 0.5 * b.data
    return model


@idiom
def task_vector(k: User):
    """Task arithmetic over state dicts: `base + 0.5 * (tuned - base)`"""
    model = k.net()
    base = {n: v.clone() for n, v in model.state_dict().items()}
    k.train(model, k.sgd(model))
    tuned = model.state_dict()
    model.load_state_dict({n: base[n] + 0.5 * (tuned[n] - base[n]) for n in base})
    return model
