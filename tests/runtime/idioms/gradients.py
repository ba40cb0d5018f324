"""Gradients that are read, clipped, scaled, replaced."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import User


@idiom
def clip_by_value(k: User):
    """`clip_grad_value_` before the step"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        nn.utils.clip_grad_value_(model.parameters(), 0.02)
    return model


@idiom
def clip_by_norm(k: User):
    """torch's `clip_grad_norm_`, its norm printed"""
    model, norms = k.net(), []
    for _ in k.after_backward(model, k.sgd(model)):
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
    return {"norms": norms, "weights": k.weights(model)}


@idiom
def clip_by_manager(k: User):
    """The manager clips"""
    model, norms = k.net(), []
    manager = k.sgd(model)
    for _ in k.after_backward(model, manager):
        norms.append(manager.clip_grad_norm(manager.optimizers[0].param_groups, 0.1))
    return {"norms": norms, "weights": k.weights(model)}


@idiom
def clip_by_largest(k: User):
    """torch's `clip_grad_norm_` with the largest entry as norm"""
    model, norms = k.net(), []
    for _ in k.after_backward(model, k.sgd(model)):
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type=float("inf"))))
    return {"norms": norms, "weights": k.weights(model)}


@idiom
def clip_in_two_calls(k: User):
    """`get_total_norm`, then `clip_grads_with_norm_`"""
    model, norms = k.net(), []
    for _ in k.after_backward(model, k.sgd(model)):
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)
        norms.append(float(norm))
    return {"norms": norms, "weights": k.weights(model)}


@idiom
def clip_each_layer(k: User):
    """Each layer is clipped by its own norm"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        for part in (model.enter, *model.layers, model.head):
            nn.utils.clip_grad_norm_(part.parameters(), 0.05)
    return model


@idiom
def clip_by_hand(k: User):
    """A norm and a factor of the user's own"""
    model, norms = k.net(), []
    for _ in k.after_backward(model, k.sgd(model)):
        norm = sum(p.grad.data.norm(2).item() ** 2 for p in model.parameters() if p.grad is not None) ** 0.5
        for p in model.parameters():
            p.grad.data.mul_(min(1.0, 0.1 / (norm + 1e-6)))
        norms.append(norm)
    return {"norms": norms, "weights": k.weights(model)}


@idiom(verdicts="right refused refused", says="full_tensor")
def clip_adaptively(k: User):
    """Adaptive gradient clipping: rows of the gradient against rows of the weight"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        for p in model.parameters():
            if p.dim() > 1:
                with k.gathered(p):
                    size = p.detach().norm(dim=1, keepdim=True).clamp(min=1e-3)
                grad = p.grad.norm(dim=1, keepdim=True).clamp(min=1e-6)
                p.grad.mul_((0.01 * size / grad).clamp(max=1.0))
    return model


@idiom(verdicts="right refused refused", says="full_tensor")
def norms_of_rows_are_read(k: User):
    """Norms of the gradient's rows, printed"""
    model, rows = k.net(), []
    for _ in k.after_backward(model, k.sgd(model)):
        rows.append(model.head.weight.grad.norm(dim=1))
    return {"rows": rows}


@idiom
def noise_is_added(k: User):
    """The same noise is added to the gradients"""
    model = k.net()
    for step, _ in enumerate(k.after_backward(model, k.sgd(model))):
        for number, p in enumerate(model.parameters()):
            p.grad.add_(k.randn(*p.shape, seed=100 * step + number), alpha=0.01)
    return model


@idiom
def gradients_are_halved(k: User):
    """`p.grad *= 0.5`"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        for p in model.parameters():
            p.grad *= 0.5
    return model


@idiom
def gradients_are_clamped(k: User):
    """`p.grad.data.clamp_`"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        for p in model.parameters():
            p.grad.data.clamp_(-0.02, 0.02)
    return model


@idiom
def gradients_are_replaced(k: User):
    """`p.grad = p.grad * 2`"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        for p in model.parameters():
            p.grad = p.grad * 2
    return model


@idiom
def gradients_are_removed(k: User):
    """`p.grad = None` for a layer that shall not move"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        for p in model.layers[0].parameters():
            p.grad = None
    return model


@idiom
def gradients_are_zeroed(k: User):
    """`zero_grad(set_to_none=False)`: momentum and decay go on where nothing comes"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    manager = k.manage(optimizer)
    for x, y in k.batches():
        optimizer.zero_grad(set_to_none=False)
        manager.backward(F.cross_entropy(model(x), y))
        manager.step()
    return model


@idiom
def gradients_are_zeroed_one_by_one(k: User):
    """`p.grad.zero_()` in a loop"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        for p in model.parameters():
            if p.grad is not None:
                p.grad.detach_()
                p.grad.zero_()
        manager.backward(F.cross_entropy(model(x), y))
        manager.step()
    return model


@idiom
def the_model_zeroes(k: User):
    """`model.zero_grad()`"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        model.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        manager.step()
    return model


@idiom
def nan_is_looked_for(k: User):
    """A step is left out if any gradient is NaN or infinite"""
    model, finite = k.net(), []
    manager = k.sgd(model)
    for number, (x, y) in enumerate(k.batches(3)):
        manager.zero_grad()
        loss = F.cross_entropy(model(x), y)
        manager.backward(loss * float("nan") if number == 1 else loss)
        finite.append(all(bool(torch.isfinite(p.grad).all()) for p in model.parameters()))
        if finite[-1]:
            manager.step()
    return {"finite": finite, "weights": k.weights(model)}


@idiom
def nan_becomes_zero(k: User):
    """`p.grad.nan_to_num_`"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        for p in model.parameters():
            p.grad.nan_to_num_(nan=0.0, posinf=1.0, neginf=-1.0)
    return model


@idiom(verdicts="right refused refused", says="full_tensor")
def gradients_are_centred(k: User):
    """Gradient centralization: rows without their mean"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        for p in model.parameters():
            if p.dim() > 1:
                p.grad.add_(-p.grad.mean(dim=1, keepdim=True))
    return model


@idiom
def signs_are_taken(k: User):
    """`p.grad.sign_()`"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model, lr=0.01)):
        for p in model.parameters():
            if p.dim() > 1:
                p.grad.sign_()
    return model


@idiom(verdicts="right refused refused", says="full_tensor")
def one_long_vector(k: User):
    """All gradients as one vector, its norm and its largest entry printed"""
    model, seen = k.net(), []
    for _ in k.after_backward(model, k.sgd(model)):
        vector = torch.cat([p.grad.view(-1) for p in model.parameters()])
        seen += [vector.norm().item(), vector.abs().max().item()]
    return {"seen": seen}


@idiom
def means_are_printed(k: User):
    """A table of each gradient's mean and deviation"""
    model, seen = k.net(), {}
    for _ in k.after_backward(model, k.sgd(model), steps=1):
        seen = {n: (p.grad.abs().mean().item(), p.grad.std().item()) for n, p in model.named_parameters()}
    return {"seen": seen}


@idiom(verdicts="right refused refused", says="full_tensor")
def gradients_as_numpy(k: User):
    """`p.grad.cpu().numpy()` for a histogram"""
    model, seen = k.net(), {}
    for _ in k.after_backward(model, k.sgd(model)):
        seen = {n: float((p.grad.cpu().numpy() ** 2).sum()) for n, p in model.named_parameters()}
    return {"seen": seen}


@idiom
def sgd_by_hand(k: User):
    """No optimizer: `p -= lr * p.grad` under `no_grad`"""
    model = k.net()
    manager = k.manage(torch.optim.SGD(model.parameters(), lr=0.0))
    for x, y in k.batches():
        model.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return model


@idiom
def sgd_through_data(k: User):
    """No optimizer: `p.data.add_(p.grad.data, alpha=-lr)` after a plain backward"""
    model = k.net()
    for x, y in k.batches():
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.data.add_(p.grad.data, alpha=-0.1)
    k.moved = True
    return model


@idiom
def plain_backward(k: User):
    """`loss.backward()` gives the mean's gradient"""
    model = k.net()
    x, y = k.batch()
    F.cross_entropy(model(x), y).backward()
    return {"grads": k.grads(model)}


@idiom
def plain_backward_and_managed(k: User):
    """One loss by `backward()`, another by the manager, added"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches(2):
        manager.zero_grad()
        F.cross_entropy(model(x), y).backward()
        manager.backward(model(x).square().mean())
        manager.step()
    return {"grads": k.grads(model), "weights": k.weights(model)}


@idiom
def many_tensors_at_once(k: User):
    """`torch._foreach_mul_` and `_foreach_norm` over gradients"""
    model, norms = k.net(), []
    for _ in k.after_backward(model, k.sgd(model)):
        grads = [p.grad for p in model.parameters()]
        norms.append(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, 0.5)
    return {"norms": norms, "weights": k.weights(model)}


@idiom
def gradients_are_added_up(k: User):
    """Gradients are added to a dict of the user's and put back"""
    model = k.net()
    manager, total = k.sgd(model), {}
    for x, y in k.batches(3):
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        for name, p in model.named_parameters():
            total[name] = p.grad.clone() if name not in total else total[name] + p.grad
    for name, p in model.named_parameters():
        p.grad = total[name] / 3
    manager.step()
    return model


@idiom
def gradients_of_two_losses_are_compared(k: User):
    """PCGrad: where two losses' gradients point apart, one is projected"""
    model = k.net()
    manager = k.sgd(model)
    x, y = k.batch()
    kept = []
    for loss in (lambda: F.cross_entropy(model(x), y), lambda: -model(x).square().mean()):
        manager.zero_grad()
        manager.backward(loss())
        kept.append([p.grad.clone() for p in model.parameters()])
    dots = [float((a * b).sum()) for a, b in zip(*kept, strict=True)]
    for p, a, b, dot in zip(model.parameters(), *kept, dots, strict=True):
        p.grad = a - min(dot, 0.0) / float(b.square().sum() + 1e-6) * b
    manager.step()
    return {"dots": dots, "weights": k.weights(model)}


@idiom(verdicts="right refused refused", says="full_tensor")
def mask_on_a_gradient(k: User):
    """Rows of an embedding-like weight are kept from training by `p.grad[rows] = 0`"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        model.head.weight.grad[:2] = 0
    return model


@idiom
def gradient_is_none_before(k: User):
    """`p.grad is None` before the first backward and after `zero_grad`"""
    model = k.net()
    manager = k.sgd(model)
    seen = [all(p.grad is None for p in model.parameters())]
    x, y = k.batch()
    manager.backward(F.cross_entropy(model(x), y))
    seen.append(any(p.grad is None for p in model.parameters()))
    manager.zero_grad()
    seen.append(all(p.grad is None for p in model.parameters()))
    return {"seen": seen}


@idiom
def gradients_know_their_shape(k: User):
    """`p.grad.shape`, `dtype`, `numel` and `device`"""
    model, seen = k.net(), []
    for _ in k.after_backward(model, k.sgd(model), steps=1):
        for p in model.parameters():
            seen += [str(tuple(p.grad.shape)), str(p.grad.dtype), p.grad.numel(), p.grad.device.type]
    return {"seen": seen}


@idiom
def gradients_are_scaled_by_group(k: User):
    """Gradients of the head are multiplied, `torch.no_grad` and a name test"""
    model = k.net()
    for _ in k.after_backward(model, k.sgd(model)):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "head" in name and p.grad is not None:
                    p.grad = p.grad.mul(3.0)
    return model


def _with_a_plain_layer(k: User):
    """A sharded model, a layer that no distributed module holds, and a manager of both."""
    model = k.net()
    torch.manual_seed(3)
    last = nn.Linear(5, 5).to(k.device)
    params = [*model.parameters(), *last.parameters()]
    return lambda x: last(model(x)), params, last, k.sgd(params)


@idiom
def clip_with_a_plain_layer(k: User):
    """torch's `clip_grad_norm_` over a model and a layer that no distributed module holds, its norm printed"""
    call, params, last, manager = _with_a_plain_layer(k)
    norms = [float(nn.utils.clip_grad_norm_(params, 0.1)) for _ in k.after_backward(call, manager, steps=3)]
    return {"norms": norms, "weights": k.weights(last)}


@idiom
def gradients_of_a_plain_layer(k: User):
    """The gradients of a layer that no distributed module holds, normalised by hand and printed"""
    call, _, last, manager = _with_a_plain_layer(k)
    norms = []
    for _ in k.after_backward(call, manager, steps=3):
        for p in last.parameters():
            norms.append(float(p.grad.norm()))
            p.grad /= p.grad.norm() + 1e-6
    return {"norms": norms, "weights": k.weights(last)}
