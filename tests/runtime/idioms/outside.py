"""Parameters used where no forward of their module runs, and methods other than forward."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import Net, User


class Clip(nn.Module):
    """Two towers and a temperature."""

    def __init__(self):
        super().__init__()
        self.image, self.text = Net(outputs=4), Net(outputs=4)
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))
        self.logit_bias = nn.Parameter(torch.zeros(1))

    def encode_image(self, x):
        return F.normalize(self.image(x), dim=-1)

    def encode_text(self, x):
        return F.normalize(self.text(x), dim=-1)

    def forward(self, x):
        return self.encode_image(x), self.encode_text(x.flip(-1))


class Vit(nn.Module):
    """Tokens with a class token and positions."""

    def __init__(self, tokens: int = 3):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, 8) * 0.1)
        self.embed = nn.Linear(2, 8)
        self.blocks = nn.ModuleList([Net(1, 8, 8, 8) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward_features(self, x):
        x = self.embed(x.view(x.shape[0], 3, 2))
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def get_features(self, x):
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        return self.head(torch.cat((cls, self.embed(x.view(x.shape[0], 3, 2))), dim=1).mean(1))

    def forward(self, x):
        return self.head(self.forward_features(x)[:, 0])


@idiom
def features_in_a_loss(k: User):
    """A loss of `model.features(x)`, no forward"""
    model = k.net()
    manager = k.sgd(model)
    for x, _ in k.batches():
        k.step(manager, model.features(x).tanh().square().mean())
    return model


@idiom
def features_and_head(k: User):
    """`model.head(model.features(x))`, from the script"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model.head(model.features(x)), y))
    return model


@idiom
def class_token_first(k: User):
    """A method that begins with `self.cls_token.expand`"""
    model = k.shard(Vit())
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model.get_features(x), y))
    return model


@idiom
def class_token_in_forward(k: User):
    """The same in forward, and features without gradients"""
    model = k.shard(Vit())
    k.train(model, k.sgd(model))
    x, _ = k.batch()
    with torch.no_grad():
        return {"features": k.gather(model.forward_features(x)), "weights": k.weights(model)}


@idiom
def logit_scale(k: User):
    """CLIP: `model.logit_scale.exp() * a @ b.T` in the script"""
    model = k.shard(Clip())
    manager = k.sgd(model, lr=0.01)
    for x, _ in k.batches():
        a, b = model(x)
        logits = model.logit_scale.exp() * (a * b).sum(-1) + model.logit_bias
        k.step(manager, F.softplus(-logits).mean())
    return model


@idiom(verdicts="right refused refused", says="bmt.gathered")
def logit_scale_clamped(k: User):
    """CLIP: `model.logit_scale.data.clamp_` after each step, its value printed"""
    model, seen = k.shard(Clip()), []
    manager = k.sgd(model, lr=5.0)
    for x, _ in k.batches():
        a, b = model(x)
        k.step(manager, F.softplus(-(a * b).sum(-1) * model.logit_scale.exp()).mean())
        model.logit_scale.data.clamp_(0, 2.5)
        seen.append(model.logit_scale.item())
    return {"seen": seen, "weights": k.weights(model)}


@idiom
def logit_scale_clamped_without_data(k: User):
    """CLIP: `model.logit_scale.clamp_` under `no_grad`, `float(...)` printed"""
    model, seen = k.shard(Clip()), []
    manager = k.sgd(model, lr=5.0)
    for x, _ in k.batches():
        a, b = model(x)
        k.step(manager, F.softplus(-(a * b).sum(-1) * model.logit_scale.exp()).mean())
        with torch.no_grad():
            model.logit_scale.clamp_(0, 2.5)
        seen.append(float(model.logit_scale.exp()))
    return {"seen": seen, "weights": k.weights(model)}


@idiom
def encoders_apart(k: User):
    """CLIP: `encode_image` and `encode_text` called by themselves"""
    model = k.shard(Clip())
    manager = k.sgd(model, lr=0.01)
    for x, _ in k.batches():
        k.step(manager, (model.encode_image(x) - model.encode_text(x)).square().sum(-1).mean())
    return model


@idiom
def weight_as_matrix(k: User):
    """`features @ model.head.weight.T + model.head.bias` in the script"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model.features(x) @ model.head.weight.T + model.head.bias, y))
    return model


@idiom
def weight_in_linear(k: User):
    """`F.linear(features, model.head.weight)`"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(F.linear(model.features(x), model.head.weight), y))
    return model


@idiom
def normalised_weight(k: User):
    """ArcFace: `F.linear(F.normalize(f), F.normalize(model.head.weight))`"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        cosine = F.linear(F.normalize(model.features(x)), F.normalize(model.head.weight))
        k.step(manager, F.cross_entropy(10 * (cosine - 0.2 * F.one_hot(y, 5)), y))
    return model


@idiom
def prototypes(k: User):
    """Distances to prototypes: `torch.cdist(f, model.prototypes)`"""
    model = k.net()
    prototypes = k.shard(nn.ParameterDict({"all": nn.Parameter(torch.randn(5, 8))}))
    manager = k.sgd([*model.parameters(), *prototypes.parameters()])
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(-torch.cdist(model.features(x), prototypes["all"]), y))
    return {"model": k.weights(model), "prototypes": k.weights(prototypes)}


@idiom
def centers(k: User):
    """Center loss: a module whose parameter is indexed by classes"""

    class Centers(nn.Module):
        def __init__(self):
            super().__init__()
            self.centers = nn.Parameter(torch.randn(5, 8))

        def forward(self, f, y):
            return (f - self.centers[y]).square().sum(1).mean()

    model, centers = k.net(), k.shard(Centers())
    manager = k.manage(torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(centers.parameters(), lr=0.5))
    for x, y in k.batches():
        f = model.features(x)
        k.step(manager, F.cross_entropy(model.head(f), y) + 0.1 * centers(f, y))
    return {"model": k.weights(model), "centers": k.weights(centers)}


@idiom
def rows_by_index(k: User):
    """`model.embedding.weight[ids]` in the script"""
    model = k.shard(nn.ModuleDict({"table": nn.Embedding(7, 6), "net": Net()}))
    manager = k.sgd(model)
    for step in range(3):
        ids, y = k.share(k.randint(7, 12, seed=step)), k.share(k.randint(5, 12, seed=9 + step))
        k.step(manager, F.cross_entropy(model["net"](model["table"].weight[ids]), y))
    return model


@idiom
def learned_loss_weights(k: User):
    """Kendall: `model.log_vars` in the script's loss"""

    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.log_vars = Net(), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.body(x)

    model = k.shard(Tasks())
    manager = k.sgd(model)
    for x, y in k.batches():
        out = model(x)
        losses = torch.stack([F.cross_entropy(out, y), out.square().mean()])
        k.step(manager, (losses * torch.exp(-model.log_vars) + model.log_vars).sum())
    return model


@idiom
def loss_as_a_method(k: User):
    """`model.loss(x, y)` instead of forward, in a converted class"""

    class Model(k.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.scale = k.Parameter(torch.ones(1))

        def loss(self, x, y):
            return F.cross_entropy(self.net(x) * self.scale, y)

    model = k.shard(Model())
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, model.loss(x, y))
    return model


@idiom
def bias_of_another_module(k: User):
    """BERT: `self.decoder(x) + self.decoder_bias` of an enclosing module, and a module's bias"""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(8, 5)

    class Bert(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Net(outputs=8), Head()

        def forward(self, x):
            return F.linear(self.body(x), self.head.decoder.weight) + self.head.decoder.bias

    model = k.shard(Bert())
    return k.train(model, k.sgd(model))


@idiom
def tied_by_function(k: User):
    """Output by `F.linear(x, self.embedding.weight)`"""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.layers = nn.ModuleList([Net(1, 8, 8, 8) for _ in range(2)])

        def forward(self, ids):
            x = self.embedding(ids)
            for layer in self.layers:
                x = layer(x)
            return F.linear(x, self.embedding.weight)

    model = k.shard(Tied())
    manager = k.sgd(model)
    for step in range(3):
        ids = k.share(k.randint(11, 12, 4, seed=step))
        k.step(manager, F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
    return model


@idiom
def generated(k: User):
    """Greedy generation from a trained model, token by token"""
    model = k.shard(nn.Sequential(nn.Embedding(11, 6), Net(outputs=11)))
    manager = k.sgd(model, lr=0.5)
    for step in range(3):
        ids = k.share(k.randint(11, 12, 4, seed=step))
        k.step(manager, F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
    model.eval()
    ids = k.randint(11, 2, 2, seed=5)
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return {"ids": ids}


@idiom
def generated_with_a_cache(k: User):
    """Generation with keys and values kept in a list by the blocks"""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x, cache=None):
            q, key, value = self.qkv(x).chunk(3, -1)
            if cache is not None:
                if "key" in cache:
                    key, value = torch.cat([cache["key"], key], 1), torch.cat([cache["value"], value], 1)
                cache["key"], cache["value"] = key, value
            y = F.scaled_dot_product_attention(q, key, value, is_causal=cache is None)
            return x + self.out(y)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
            self.blocks = nn.ModuleList([Attention() for _ in range(2)])

        def forward(self, ids, caches=None):
            x = self.embedding(ids)
            for block, cache in zip(self.blocks, caches or [None, None], strict=True):
                x = block(x, cache)
            return self.head(x)

        @torch.no_grad()
        def generate(self, ids, count):
            caches, step = [{}, {}], ids[:, :1]
            for _ in range(count):
                step = self(step, caches)[:, -1:].argmax(-1)
                ids = torch.cat([ids, step], 1)
            return ids

    model = k.shard(Model())
    manager = k.sgd(model, lr=0.5)
    for step in range(2):
        ids = k.share(k.randint(11, 12, 4, seed=step))
        k.step(manager, F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
    return {"ids": model.generate(k.randint(11, 2, 1, seed=5), 5), "weights": k.weights(model)}


@idiom(verdicts="right refused refused", says="bmt.gathered")
def scalar_is_read(k: User):
    """`model.scale.item()` and `float(model.scale)` for a log"""
    model = k.shard(Clip())
    return {"item": model.logit_scale.item(), "float": float(model.logit_scale), "list": model.logit_bias.tolist()}


@idiom
def weights_are_logged(k: User):
    """`p.norm()`, `p.mean()`, `p.std()`, `p.abs().max()` for a log"""
    model, seen = k.net(), {}
    k.train(model, k.sgd(model))
    for name, p in model.named_parameters():
        seen[name] = [p.norm().item(), p.mean().item(), p.std().item(), p.abs().max().item()]
    return {"seen": seen}


@idiom
def weights_are_logged_through_data(k: User):
    """`p.data.norm()`, `p.data.mean()`, `p.data.min()`, `p.detach().abs().sum()`"""
    model, seen = k.net(), {}
    k.train(model, k.sgd(model))
    for name, p in model.named_parameters():
        seen[name] = [p.data.norm().item(), p.data.mean().item(), p.data.min().item(), p.detach().abs().sum().item()]
    return {"seen": seen}


@idiom
def weights_are_checked(k: User):
    """`torch.isnan(p).any()` over all parameters"""
    model = k.net()
    k.train(model, k.sgd(model))
    return {
        "nan": [bool(torch.isnan(p).any()) for p in model.parameters()],
        "finite": [bool(torch.isfinite(p.data).all()) for p in model.parameters()],
    }


@idiom(verdicts="right refused refused", says="full_tensor")
def weights_are_shown(k: User):
    """`p.detach().cpu().numpy()` and `p.tolist()` for a plot"""
    model = k.net()
    return {"array": model.head.weight.detach().cpu().numpy().sum().item(), "list": model.head.bias.tolist()}


@idiom(verdicts="right refused refused", says="full_tensor")
def singular_values(k: User):
    """`torch.linalg.svdvals(model.head.weight)`"""
    model = k.net()
    return {
        "values": torch.linalg.svdvals(model.head.weight.detach()),
        "norm": torch.linalg.matrix_norm(model.enter.weight, 2),
    }


@idiom
def slices_are_read(k: User):
    """`model.head.weight[0]` and `weight[:, 1]`"""
    model = k.net()
    return {"row": model.head.weight[0], "column": model.head.weight[:, 1], "one": model.head.weight[1, 2].item()}


@idiom
def weight_of_another_shape(k: User):
    """`weight.view`, `reshape`, `t()`, `permute` and `flatten` outside"""
    model = k.net()
    w = model.enter.weight
    return {
        "seen": [w.view(-1), w.reshape(6, 8), w.t(), w.permute(1, 0), w.flatten(), w.unsqueeze(0), w.T.contiguous()]
    }


@idiom
def similarity_of_layers(k: User):
    """Cosine similarity of two layers' weights"""
    model = k.net()
    a, b = (layer.up.weight.flatten() for layer in model.layers)
    return {"similarity": F.cosine_similarity(a, b, dim=0)}


@idiom
def resized_positions(k: User):
    """Positions are interpolated in forward for another length"""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.body = nn.Parameter(torch.randn(1, 4, 6)), Net()

        def forward(self, x):
            positions = F.interpolate(self.positions.transpose(1, 2), size=3, mode="linear").transpose(1, 2)
            return self.body((x.view(-1, 1, 6) + positions).mean(1))

    model = k.shard(Model())
    return k.train(model, k.sgd(model))


@idiom
def gathered_parameter(k: User):
    """`bmt.gathered` around a read, and a loss of a gathered value"""
    model, seen = k.net(), []
    for _ in k.after_backward(model, k.sgd(model)):
        with k.gathered(model.head):
            seen.append(model.head.weight.norm().item())
    return {"seen": seen}


@idiom
def mixed_weights(k: User):
    """`0.5 * (a.weight + b.weight)` in forward, of two blocks"""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net(3)
            self.mix = nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            x = self.body.enter(x)
            w = self.mix * self.body.layers[0].up.weight + (1 - self.mix) * self.body.layers[1].up.weight
            return self.body.head(F.linear(x, w) @ self.body.layers[2].down.weight.T)

    model = k.shard(Model())
    return k.train(model, k.sgd(model))


def _beside(k: User, use, leaf, steps=3, average=False):
    """A leaf of no module, stepped by hand."""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(steps):
        manager.zero_grad()
        manager.backward(use(model(x), x, y, leaf))
        manager.step()
        with torch.no_grad():
            leaf -= 0.5 * (k.average(leaf.grad) if average else leaf.grad)
        leaf.grad = None
    return {"weights": k.weights(model), "leaf": leaf}


@idiom(verdicts="right said said", says="belongs to no module")
def offsets_stepped_by_hand(k: User):
    """`w = torch.zeros(5, requires_grad=True)`, `w -= lr * w.grad`"""
    leaf = torch.zeros(5, device=k.device, requires_grad=True)
    return _beside(k, lambda out, x, y, w: F.cross_entropy(out + w, y), leaf)


@idiom(verdicts="right said said", says="belongs to no module")
def parameter_of_no_module_stepped_by_hand(k: User):
    """An `nn.Parameter` of no module, stepped by hand"""
    leaf = nn.Parameter(torch.ones(1, device=k.device))
    return _beside(k, lambda out, x, y, w: F.cross_entropy(out * w, y), leaf)


@idiom
def offsets_averaged_by_hand(k: User):
    """The same, whose gradient the script averages"""
    leaf = torch.zeros(5, device=k.device, requires_grad=True)
    return _beside(k, lambda out, x, y, w: F.cross_entropy(out + w, y), leaf, average=True)


@idiom(verdicts="right said said", says="belongs to no module")
def offsets_stepped_through_data(k: User):
    """`w.data.add_(w.grad, alpha=-lr)`, `w.grad.zero_()`, after a plain backward"""
    model, leaf = k.net(), torch.zeros(5, device=k.device, requires_grad=True)
    manager = k.sgd(model)
    for x, y in k.batches(3):
        manager.zero_grad()
        F.cross_entropy(model(x) + leaf, y).backward()
        manager.step()
        leaf.data.add_(leaf.grad, alpha=-0.5)
        leaf.grad.zero_()
    return {"weights": k.weights(model), "leaf": leaf}


@idiom(verdicts="right said said", says="belongs to no module")
def offsets_of_inputs_stepped_by_hand(k: User):
    """A perturbation of all inputs alike, stepped by its gradient's sign, and the model by nobody"""
    model, leaf = k.net(), torch.zeros(1, 6, device=k.device, requires_grad=True)
    for x, y in k.batches(4):
        (-F.cross_entropy(model(x + leaf), y)).backward()
        with torch.no_grad():
            leaf -= 0.1 * leaf.grad
        leaf.grad = None
    return {"leaf": leaf}


@idiom(verdicts="right said said", says="belongs to no module")
def weights_by_hand(k: User):
    """A linear layer's two tensors, made by hand, behind a model"""
    w = (0.1 * k.randn(3, 5)).requires_grad_()
    b = torch.zeros(3, device=k.device, requires_grad=True)
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(3):
        k.step(manager, F.cross_entropy(F.linear(model(x), w, b), y % 3))
        with torch.no_grad():
            for leaf in (w, b):
                leaf -= 0.5 * leaf.grad
                leaf.grad = None
    return {"weights": k.weights(model), "w": w, "b": b}


@idiom(verdicts="right said said", says="belongs to no module")
def multiplier_stepped_up(k: User):
    """A Lagrange multiplier that climbs by hand: `lam += lr * lam.grad`"""
    leaf = torch.tensor(0.1, device=k.device, requires_grad=True)
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(3):
        out = model(x)
        k.step(manager, F.cross_entropy(out, y) + leaf * (out.square().mean() - 0.1))
        with torch.no_grad():
            leaf += leaf.grad
        leaf.grad = None
    return {"weights": k.weights(model), "leaf": leaf}


@idiom
def inputs_with_gradients(k: User):
    """`x.requires_grad_()`: every row's gradient is its own, a step along it (FGSM)"""
    model = k.net()
    manager, rows = k.sgd(model), []
    for x, y in k.batches(3):
        x.requires_grad_()
        F.cross_entropy(model(x), y, reduction="none").sum().backward()
        moved = (x + 0.1 * x.grad.sign()).detach()
        rows.append(k.gather(moved))
        k.step(manager, F.cross_entropy(model(moved), y))
    return {"weights": k.weights(model), "rows": rows}


@idiom
def two_temperatures_driven(k: User):
    """Two parameters of no module in the optimizer, as a script makes them"""
    model = k.net()
    a, b = nn.Parameter(torch.ones(1, device=k.device)), torch.zeros(5, device=k.device, requires_grad=True)
    manager = k.sgd([*model.parameters(), a, b])
    for x, y in k.batches(3):
        k.step(manager, F.cross_entropy(model(x) * a + b, y))
    return {"weights": k.weights(model), "a": a, "b": b}


@idiom
def constant_leaf(k: User):
    """A leaf that gets a gradient, which nobody steps on"""
    model, leaf = k.net(), torch.ones(5, device=k.device, requires_grad=True)
    manager = k.sgd(model)
    for x, y in k.batches(3):
        k.step(manager, F.cross_entropy(model(x) * leaf, y))
    return {"weights": k.weights(model), "leaf": leaf}
