"""torch's optimizers, other packages' and users' own."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import User


def _torch(name: str, **options):
    """An idiom that trains with one of torch's optimizers."""

    def run(k: User):
        model = k.net()
        return k.train(model, k.manage(getattr(torch.optim, name)(model.parameters(), **options)))

    run.__name__ = name.lower() + "".join(f"_{n}" for n in options if n not in ("lr", "eps", "foreach"))
    run.__doc__ = f"torch's `{name}`" + (
        f" with {', '.join(n for n in options if n not in ('lr', 'eps'))}" * (len(options) > 2)
    )
    run.__module__ = __name__
    return idiom(run)


_torch("SGD", lr=0.1)
_torch("SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
_torch("Adam", lr=0.01, eps=1e-4)
_torch("Adam", lr=0.01, eps=1e-4, amsgrad=True, weight_decay=0.1)
_torch("Adam", lr=0.01, eps=1e-4, maximize=True)
_torch("AdamW", lr=0.01, eps=1e-4)
_torch("RMSprop", lr=0.01, eps=1e-3)
_torch("RMSprop", lr=0.01, eps=1e-3, centered=True, momentum=0.5)
_torch("Adagrad", lr=0.01, eps=1e-4)
_torch("Adadelta", lr=1.0, eps=1e-3)
_torch("Adamax", lr=0.01, eps=1e-3)
_torch("NAdam", lr=0.01, eps=1e-4)
_torch("RAdam", lr=0.01, eps=1e-4)
_torch("ASGD", lr=0.1)
_torch("Rprop", lr=0.001)
_torch("Adafactor", lr=0.01)


@idiom
def sgd_one_by_one(k: User):
    """`SGD(foreach=False)`"""
    model = k.net()
    return k.train(model, k.manage(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)))


@idiom
def adamw_converted(k: User):
    """AdamW as conversion puts it"""
    model = k.net()
    return k.train(model, k.manage(k.adam(model.parameters())))


@idiom
def muon(k: User):
    """`Muon` for matrices, AdamW for the rest"""
    model = k.net()
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    return k.train(model, k.manage(torch.optim.Muon(matrices, lr=0.02), k.adam(others)))


@idiom
def lbfgs(k: User):
    """`LBFGS` with a closure"""
    model = k.net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    manager = k.manage(optimizer)
    x, y = k.batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        manager.backward(loss)
        return loss

    optimizer.step(closure)
    return model


class Momentum(torch.optim.Optimizer):
    """Element-wise, as users write them."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    def direction(self, p, g, state):
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        return momentum.mul_(0.9).add_(g)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self.direction(p, p.grad, self.state[p]), alpha=-group["lr"])


class Lion(Momentum):
    def direction(self, p, g, state):
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        update = momentum.mul(0.9).add(g, alpha=0.1)
        momentum.lerp_(g, 0.01)
        return update / (update.abs() + 1e-2)


class Lars(Momentum):
    def direction(self, p, g, state):
        if p.dim() > 1:
            g = g * (0.1 * p.norm() / (g.norm() + 1e-6))
        return super().direction(p, g, state)


class Lamb(Momentum):
    def direction(self, p, g, state):
        m, v = state.setdefault("m", torch.zeros_like(p)), state.setdefault("v", torch.zeros_like(p))
        m.lerp_(g, 0.1)
        v.lerp_(g * g, 0.01)
        update = m / (v.sqrt() + 1e-3)
        ratio = p.norm() / (update.norm() + 1e-6)
        return update * ratio.clamp(max=10.0)


class Novograd(Momentum):
    def direction(self, p, g, state):
        size = g.square().sum()
        state["v"] = size if "v" not in state else 0.9 * state["v"] + 0.1 * size
        return super().direction(p, g / (state["v"].sqrt() + 1e-3), state)


class RowMeans(Momentum):
    def direction(self, p, g, state):
        if g.dim() > 1:
            g = g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True)
        return super().direction(p, g, state)


class MatricesApart(Momentum):
    def direction(self, p, g, state):
        return g if g.dim() > 1 else 10 * g


class Factored(Momentum):
    """Adafactor's idea: rows and columns of the second moment."""

    def direction(self, p, g, state):
        if g.dim() < 2:
            return g
        rows, columns = (g * g).mean(1), (g * g).mean(0)
        state["r"] = rows if "r" not in state else 0.9 * state["r"] + 0.1 * rows
        state["c"] = columns if "c" not in state else 0.9 * state["c"] + 0.1 * columns
        return g / (torch.outer(state["r"], state["c"]) / state["r"].mean() + 1e-4).sqrt()


class Whitened(Momentum):
    """Muon's and Shampoo's idea: an orthogonal direction."""

    def direction(self, p, g, state):
        if g.dim() != 2:
            return g
        g = g / (g.norm() + 1e-6)
        for _ in range(3):
            g = 1.5 * g - 0.5 * g @ g.T @ g
        return 0.1 * g


class Global(Momentum):
    """D-Adaptation's idea: one number of all parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            total = sum(float((p.grad * p.grad).sum()) for p in group["params"] if p.grad is not None)
            group["d"] = group.get("d", 0.0) + total**0.5
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / group["d"])


class Written(Momentum):
    """Through ``.data``, with the step counted in the state."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                if "m" not in state:
                    state["m"] = torch.zeros_like(p.data)
                state["m"].mul_(0.9).add_(p.grad.data, alpha=0.1)
                p.data.addcdiv_(state["m"], state["m"].abs().sqrt().add_(0.1), value=-group["lr"] / state["step"])


def _own(cls, text: str):
    """An idiom that trains with one of the above."""

    def run(k: User):
        model = k.net()
        return k.train(model, k.manage(cls(model.parameters())))

    run.__name__, run.__doc__, run.__module__ = "own_" + cls.__name__.lower(), text, __name__
    return idiom(run)


_own(Momentum, "A user's own element-wise optimizer")
_own(Lion, "A user's own Lion, smoothed")
_own(Lars, "A user's own LARS: norms of a parameter and its gradient")
_own(Lamb, "A user's own LAMB: trust ratios")
_own(Novograd, "A user's own NovoGrad: one second moment for each layer")
_own(RowMeans, "A user's own with means of rows")
_own(MatricesApart, "A user's own that asks `g.dim() > 1`")
_own(Factored, "A user's own Adafactor: rows and columns")
_own(Whitened, "A user's own Muon: products of matrices")
_own(Global, "A user's own D-Adaptation: one sum over all parameters")
_own(Written, "A user's own through `.data`, with a counter")


@idiom
def sam(k: User):
    """SAM: a step up by the gradient's norm, a second backward, back, and the step"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        with torch.no_grad():
            norm = torch.stack([p.grad.norm(2) for p in model.parameters()]).norm(2)
            moves = []
            for p in model.parameters():
                moves.append(p.grad * (0.05 / (norm + 1e-6)))
                p.add_(moves[-1])
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
        manager.step()
    return model


@idiom
def sam_through_data(k: User):
    """SAM with `old_p = p.data.clone()` and `p.data = old_p`"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        norm = sum(p.grad.norm().item() ** 2 for p in model.parameters()) ** 0.5
        old = [p.data.clone() for p in model.parameters()]
        for p in model.parameters():
            p.data.add_(p.grad, alpha=0.05 / norm)
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y))
        for p, o in zip(model.parameters(), old, strict=True):
            p.data = o
        manager.step()
    return model


@idiom
def groups_by_dim(k: User):
    """No decay for vectors: groups by `p.dim()`"""
    model = k.net()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return k.train(model, k.manage(k.adam(groups)))


@idiom
def groups_by_name(k: User):
    """No decay for names that hold `bias` or `norm`"""
    model, no = k.net(), ("bias", "norm")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not any(w in n for w in no)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if any(w in n for w in no)], "weight_decay": 0.0},
    ]
    return k.train(model, k.manage(torch.optim.AdamW(groups, lr=0.01, eps=1e-4)))


@idiom
def groups_by_module(k: User):
    """Groups made of modules: a backbone and a head with another rate"""
    model = k.net()
    head = set(map(id, model.head.parameters()))
    groups = [
        {"params": (p for p in model.parameters() if id(p) not in head)},
        {"params": model.head.parameters(), "lr": 1.0},
    ]
    return k.train(model, k.manage(torch.optim.SGD(groups, lr=0.1)))


@idiom
def rate_for_each_layer(k: User):
    """Layer-wise decay of the learning rate"""
    model = k.net(layers=3)
    groups = [{"params": list(layer.parameters()), "lr": 0.1 * 0.5**n} for n, layer in enumerate(model.layers)]
    groups.append({"params": [*model.enter.parameters(), *model.norm.parameters(), *model.head.parameters()]})
    return k.train(model, k.manage(torch.optim.SGD(groups, lr=0.2, momentum=0.5)))


@idiom
def group_for_each_parameter(k: User):
    """A group for each parameter"""
    model = k.net()
    groups = [{"params": [p], "lr": 0.01 * (n + 1)} for n, p in enumerate(model.parameters())]
    return k.train(model, k.manage(torch.optim.SGD(groups, lr=0.1)))


@idiom
def named_parameters_given(k: User):
    """An optimizer made of `named_parameters()`"""
    model = k.net()
    return k.train(model, k.manage(torch.optim.SGD(model.named_parameters(), lr=0.1)))


@idiom
def trainable_alone(k: User):
    """`filter(lambda p: p.requires_grad, ...)` with frozen layers"""
    model = k.net()
    model.layers[0].requires_grad_(False)
    return k.train(model, k.sgd(filter(lambda p: p.requires_grad, model.parameters())))


@idiom
def two_optimizers(k: User):
    """Two optimizers over two parts"""
    model = k.net()
    rest = [*model.enter.parameters(), *model.norm.parameters(), *model.head.parameters()]
    return k.train(model, k.manage(k.adam(model.layers.parameters()), torch.optim.SGD(rest, lr=0.1)))


@idiom
def group_added_later(k: User):
    """`add_param_group` when a layer is unfrozen"""
    model = k.net()
    model.enter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    manager = k.manage(optimizer)
    k.train(model, manager, steps=2)
    model.enter.requires_grad_(True)
    optimizer.add_param_group({"params": model.enter.parameters(), "lr": 0.01})
    return k.train(model, manager, steps=2)


@idiom
def made_again(k: User):
    """A new optimizer when layers are unfrozen"""
    model = k.net()
    model.layers.requires_grad_(False)
    k.train(model, k.sgd([p for p in model.parameters() if p.requires_grad]), steps=2)
    model.layers.requires_grad_(True)
    return k.train(model, k.manage(k.adam(model.parameters())), steps=2)


@idiom
def rate_set_by_hand(k: User):
    """`group["lr"] = ...` before each step"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, _ in enumerate(k.after_backward(model, k.manage(optimizer))):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
    return model


@idiom
def state_is_read(k: User):
    """Norms of `optimizer.state[p]["exp_avg"]`"""
    model = k.net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-4)
    k.train(model, k.manage(optimizer))
    return {"seen": [optimizer.state[p]["exp_avg"].norm().item() for p in model.parameters()]}


@idiom
def state_is_halved(k: User):
    """`state["momentum_buffer"].mul_(0.5)` over `optimizer.state.items()`, the norms printed"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = k.manage(optimizer)
    k.train(model, manager, steps=2)
    seen = [[p.norm().item(), state["momentum_buffer"].mul_(0.5).norm().item()] for p, state in optimizer.state.items()]
    return {"seen": seen, "weights": k.weights(k.train(model, manager, steps=2))}


@idiom
def state_is_cleared(k: User):
    """Momentum is forgotten: `optimizer.state.clear()`"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = k.manage(optimizer)
    k.train(model, manager, steps=2)
    optimizer.state.clear()
    return k.train(model, manager, steps=2)


@idiom
def state_is_saved(k: User):
    """`optimizer.state_dict()` and back into a new one"""
    model = k.net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-4)
    k.train(model, k.manage(optimizer), steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    again = torch.optim.Adam(model.parameters(), lr=0.5, eps=1e-4)
    manager = k.manage(again)
    again.load_state_dict(copy.deepcopy(state))
    k.train(model, manager, steps=2)
    return {"state": state["state"], "weights": k.weights(model)}


@idiom
def closure_in_step(k: User):
    """`optimizer.step(closure)` of SGD"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = k.manage(optimizer)
    x, y = k.batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        manager.backward(loss)
        return loss

    for _ in range(2):
        k.losses.append(k.mean(optimizer.step(closure)))
    return model


@idiom
def parameter_of_no_module(k: User):
    """SAC's `log_alpha`: a tensor that trains beside a model"""
    model = k.net()
    log_alpha = torch.zeros(1, requires_grad=True, device=k.device)
    alpha = torch.optim.Adam([log_alpha], lr=0.01, eps=1e-4)
    main, second = k.sgd(model), k.manage(alpha)
    for x, y in k.batches():
        out = model(x)
        entropy = -(out.softmax(-1) * out.log_softmax(-1)).sum(-1).mean()
        k.step(main, F.cross_entropy(out, y) - log_alpha.exp().detach() * entropy)
        k.step(second, (log_alpha.exp() * (entropy.detach() - 1.0)).mean())
    return {"alpha": log_alpha, "weights": k.weights(model)}


@idiom
def loose_parameters_in_one_optimizer(k: User):
    """Kendall's weights of losses: an `nn.Parameter` of no module in the model's optimizer"""
    model = k.net()
    weights = nn.Parameter(torch.zeros(2, device=k.device))
    manager = k.sgd([*model.parameters(), weights])
    for x, y in k.batches():
        out = model(x)
        losses = torch.stack([F.cross_entropy(out, y), out.square().mean()])
        k.step(manager, (losses * torch.exp(-weights) + weights).sum())
    return {"loss weights": weights, "weights": k.weights(model)}


@idiom
def loose_parameter_is_read(k: User):
    """Its gradient after `loss.backward()`, printed, and clipped with the model's by torch"""
    model, scale = k.net(), nn.Parameter(torch.zeros(1, device=k.device))
    parameters, seen = [*model.parameters(), scale], []
    manager = k.sgd(parameters)
    for x, y in k.batches(3):
        manager.zero_grad()
        F.cross_entropy(model(x) * scale.exp(), y).backward()
        seen.append(float(scale.grad))
        seen.append(float(nn.utils.clip_grad_norm_(parameters, 0.1)))
        manager.step()
    return {"scale": scale, "seen": seen, "weights": k.weights(model)}


@idiom(verdicts="right said said", says="add_optimizer")
def loose_parameter_unmanaged(k: User):
    """SAC's `log_alpha`, whose optimizer steps by itself"""
    model, log_alpha = k.net(), torch.zeros(1, requires_grad=True, device=k.device)
    manager, alpha = k.sgd(model), torch.optim.Adam([log_alpha], lr=0.01, eps=1e-4)
    for x, y in k.batches():
        out = model(x)
        k.step(manager, F.cross_entropy(out, y))
        alpha.zero_grad()
        (log_alpha.exp() * (out.detach().square().mean() - 1.0)).backward()
        alpha.step()
    return {"alpha": log_alpha, "weights": k.weights(model)}


@idiom
def plain_model(k: User):
    """A model of plain torch beside the sharded one, with an optimizer of its own"""
    model = k.net()
    other = nn.Linear(5, 5).to(k.device)
    manager = k.manage(torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1))
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(other(model(x)), y))
    return {"other": k.weights(other), "weights": k.weights(model)}


@idiom(verdicts="refused", says="optim_manager.step")
def step_in_backward(k: User):
    """Optimizers are stepped in `register_post_accumulate_grad_hook`"""
    model = k.net()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    k.manage(*optimizers.values())

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for x, y in k.batches():
        F.cross_entropy(model(x), y).backward()
    return model


@idiom(verdicts="refused", says="add_optimizer")
def unmanaged(k: User):
    """`loss.backward(); optimizer.step(); optimizer.zero_grad()` without a manager"""
    model = k.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    k.moved = True
    for x, y in k.batches():
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@idiom
def step_hooks(k: User):
    """`register_step_post_hook` counts steps and clamps a weight"""
    model, count = k.net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    manager = k.manage(optimizer)

    def after(*_):
        count.append(1)
        with torch.no_grad():
            model.head.weight.clamp_(-0.1, 0.1)

    optimizer.register_step_post_hook(after)
    k.train(model, manager)
    return {"count": len(count), "weights": k.weights(model)}


@idiom
def optimizer_before_sharding(k: User):
    """The optimizer is made before the model is wrapped"""
    from .user import Net

    plain = Net().to(k.device)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    return k.train(k.shard(plain), k.manage(optimizer))
