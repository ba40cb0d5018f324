"""Losses of parameters, gradients of gradients, functional calls."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import User


def _with(k: User, penalty, steps: int = 2):
    """Training with ``penalty(model)`` added to the loss."""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(steps):
        k.step(manager, F.cross_entropy(model(x), y) + 0.01 * penalty(model))
    return model


@idiom
def l2(k: User):
    """L2 over all parameters in the loss"""
    return _with(k, lambda model: sum(p.square().sum() for p in model.parameters()))


@idiom
def l1(k: User):
    """L1 over the weights in the loss"""
    return _with(k, lambda model: sum(p.abs().sum() for n, p in model.named_parameters() if "weight" in n))


@idiom
def norms(k: User):
    """`sum(p.norm(2))` in the loss"""
    return _with(k, lambda model: sum(p.norm(2) for p in model.parameters()))


@idiom
def powers(k: User):
    """`sum((p ** 2).sum())` of one block"""
    return _with(k, lambda model: sum((p**2).sum() for p in model.layers[0].parameters()))


@idiom
def before_the_forward(k: User):
    """The penalty is computed before the forward"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        penalty = torch.stack([p.pow(2).sum() for p in model.parameters()]).sum()
        k.step(manager, F.cross_entropy(model(x), y) + 0.01 * penalty)
    return model


@idiom
def one_vector(k: User):
    """The norm of `parameters_to_vector` in the loss"""
    return _with(k, lambda model: nn.utils.parameters_to_vector(model.parameters()).norm())


@idiom
def orthogonality(k: User):
    """`(W @ W.T - I).norm()` in the loss"""

    def penalty(model):
        w = model.enter.weight
        return (w.T @ w - torch.eye(w.shape[1], device=w.device)).square().sum()

    return _with(k, penalty)


@idiom
def group_lasso(k: User):
    """Norms of rows in the loss"""
    return _with(k, lambda model: model.head.weight.norm(dim=1).sum())


@idiom
def towards_the_start(k: User):
    """L2-SP: the distance from the initial weights, which were cloned"""
    start: dict[str, torch.Tensor] = {}

    def penalty(model):
        if not start:
            start.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return sum((p - start[n]).square().sum() for n, p in model.named_parameters())

    return _with(k, penalty)


@idiom
def elastic_weights(k: User):
    """EWC: squared gradients as importance of old weights"""
    model = k.net()
    manager = k.sgd(model)
    x, y = k.batch()
    manager.backward(F.cross_entropy(model(x), y))
    fisher = {n: p.grad.detach().clone().pow(2) for n, p in model.named_parameters()}
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    for x, y in k.batches():
        loss = F.cross_entropy(model(x), y)
        loss = loss + 10 * sum((fisher[n] * (p - old[n]) ** 2).sum() for n, p in model.named_parameters())
        k.step(manager, loss)
    return model


@idiom
def penalty_alone(k: User):
    """A loss of parameters and nothing else"""
    model = k.net()
    manager = k.sgd(model)
    for _ in range(2):
        k.step(manager, sum(p.square().mean() for p in model.parameters()))
    return model


@idiom
def penalty_in_the_model(k: User):
    """The model has a method for its penalty"""

    class Penalised(k.Module):
        def __init__(self):
            super().__init__()
            self.layers = k.stack([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])
            self.head = nn.Linear(6, 5)

        def penalty(self):
            return sum(p.pow(2).sum() for p in self.parameters())

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model = k.shard(Penalised())
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y) + 0.01 * model.penalty())
    return model


@idiom
def input_gradients(k: User):
    """WGAN-GP: the norm of the gradient of inputs in the loss"""
    model = k.net()
    manager = k.sgd(model)
    for x, _ in k.batches():
        x = x.clone().requires_grad_()
        score = model(x)[:, 0]
        (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        k.step(manager, score.mean() + 10 * ((grad.norm(2, dim=1) - 1) ** 2).mean())
    return model


@idiom
def r1(k: User):
    """R1: the squared gradient of real inputs, apart from the loss"""
    model = k.net()
    manager = k.sgd(model)
    for step, (x, y) in enumerate(k.batches()):
        k.step(manager, F.cross_entropy(model(x), y))
        if step == 1:
            x.requires_grad_()
            (grad,) = torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)
            k.step(manager, grad.pow(2).sum(1).mean())
    return model


@idiom
def saliency(k: User):
    """Gradients of inputs by `backward`, of a trained model"""
    model = k.net()
    x, y = k.batch()
    x.requires_grad_()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    return {"rows": k.gather(x.grad)}


@idiom
def adversarial(k: User):
    """FGSM: training on inputs that were moved along their gradient"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        k.step(manager, F.cross_entropy(model((x + 0.1 * grad.sign()).detach()), y))
    return model


@idiom
def grad_of_parameters_averaged(k: User):
    """`autograd.grad(loss, model.parameters())`, then the mean over ranks"""
    model = k.net()
    x, y = k.batch()
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return {"grads": [k.average(g) for g in grads]}


@idiom
def grad_of_parameters(k: User):
    """`autograd.grad(loss, model.parameters())`, printed"""
    model = k.net()
    x, y = k.batch()
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return {"grads": list(grads)}


@idiom
def sgd_from_grad(k: User):
    """`autograd.grad` over parameters, and `p.sub_(lr * g)`"""
    model = k.net()
    for x, y in k.batches():
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.sub_(0.1 * g)
    k.moved = True
    return model


@idiom
def norm_of_the_gradient(k: User):
    """The norm of the parameters' gradient in the loss, by `create_graph`"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(2):
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        k.step(manager, loss + 0.1 * sum(g.square().sum() for g in grads))
    return model


@idiom
def hessian_vector(k: User):
    """A product of the Hessian and a vector"""
    model = k.net()
    x, y = k.batch()
    parameters = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    dot = sum((g * k.randn(*g.shape, seed=n)).sum() for n, g in enumerate(grads))
    return {"product": list(torch.autograd.grad(dot, parameters))}


@idiom
def functional(k: User):
    """`functional_call` with the model's own parameters"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        out = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
        k.step(manager, F.cross_entropy(out, y))
    return model


@idiom(verdicts="right refused refused", says="full_tensor")
def functional_with_others(k: User):
    """`functional_call` with changed copies of the parameters"""
    model = k.net()
    x, _ = k.batch()
    changed = {n: p.detach().clone() * 1.1 for n, p in model.named_parameters()}
    return {"rows": k.gather(torch.func.functional_call(model, changed, (x,)))}


@idiom
def maml(k: User):
    """MAML: a step inside, by `functional_call`, and its gradient outside"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(2):
        weights = dict(model.named_parameters())
        inner = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
        grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(weights.items(), grads, strict=True)}
        k.step(manager, F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y))
    return model


@idiom(verdicts="right refused refused", says="full_tensor")
def func_grad(k: User):
    """`torch.func.grad` over a dict of parameters, then the mean over ranks"""
    model = k.net()
    x, y = k.batch()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    loss = lambda w: F.cross_entropy(torch.func.functional_call(model, w, (x,)), y)  # noqa: E731
    return {"grads": {n: k.average(g) for n, g in torch.func.grad(loss)(weights).items()}}


@idiom(verdicts="right refused refused", says="full_tensor")
def per_sample(k: User):
    """Gradients of each sample: `vmap(grad(...))`"""
    model = k.net()
    x, y = k.batch()
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(w, one, target):
        out = torch.func.functional_call(model, w, (one.unsqueeze(0),))
        return F.cross_entropy(out, target.unsqueeze(0))

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    return {"rows": {n: k.gather(g) for n, g in grads.items()}}


@idiom
def jacobian(k: User):
    """`torch.func.jacrev` of the outputs by the inputs"""
    model = k.net()
    x, _ = k.batch()
    return {"rows": k.gather(torch.func.vmap(torch.func.jacrev(lambda one: model(one.unsqueeze(0))[0]))(x))}


@idiom
def forward_mode(k: User):
    """`torch.autograd.forward_ad`: the outputs' change along a direction of the inputs"""
    model = k.net()
    x, _ = k.batch()
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        value, change = torch.autograd.forward_ad.unpack_dual(out)
    return {"value": k.gather(value), "change": k.gather(change)}


@idiom
def max_norm_projection(k: User):
    """After each step `p.data.renorm_` of the head's rows"""
    model = k.net()
    manager = k.sgd(model, lr=1.0)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y))
        with torch.no_grad(), k.gathered(model.head, write=True):
            model.head.weight.copy_(model.head.weight.renorm(2, 0, 0.3))
    return model


@idiom
def decay_by_hand(k: User):
    """Weight decay of the user's own: `p.data.mul_(1 - lr * wd)`"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y))
        for p in model.parameters():
            if p.dim() > 1:
                p.data.mul_(1 - 0.01)
    return model


@idiom
def difference_of_two_models(k: User):
    """A penalty on the distance from another model (FedProx)"""
    model = k.net()
    other = copy.deepcopy(model)
    manager = k.sgd(model)
    for x, y in k.batches():
        apart = sum(((p - q.detach()) ** 2).sum() for p, q in zip(model.parameters(), other.parameters(), strict=True))
        k.step(manager, F.cross_entropy(model(x), y) + 0.1 * apart)
    return model
