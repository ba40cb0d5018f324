"""Hooks of modules, parameters and tensors."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .registry import idiom
from .user import Net, User


@idiom
def scaled_by_a_hook(k: User):
    """`p.register_hook(lambda g: g * 0.5)`"""
    model = k.net()
    for p in model.head.parameters():
        p.register_hook(lambda g: g * 0.5)
    return k.train(model, k.sgd(model))


@idiom
def masked_by_a_hook(k: User):
    """A hook that keeps rows from training: `g * mask`"""
    model = k.net()
    mask = (k.randn(5, 8) > 0).float()
    model.head.weight.register_hook(lambda g: g * mask)
    return k.train(model, k.sgd(model))


@idiom
def clipped_by_a_hook(k: User):
    """`p.register_hook(lambda g: torch.clamp(g, -c, c))`, far from clipping"""
    model = k.net()
    for p in model.parameters():
        p.register_hook(lambda g: torch.clamp(g, -100, 100))
    return k.train(model, k.sgd(model))


@idiom
def frozen_row_by_a_hook(k: User):
    """A hook that writes into a clone of the gradient"""
    model = k.net()

    def hook(grad):
        grad = grad.clone()
        grad[0] = 0
        return grad

    model.enter.weight.register_hook(hook)
    return k.train(model, k.sgd(model))


@idiom
def counted_by_a_hook(k: User):
    """A hook on each parameter is called once a step"""
    model, count = k.net(), {}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: count.__setitem__(name, count.get(name, 0) + 1))
    k.train(model, k.sgd(model))
    return {"count": dict(sorted(count.items())), "weights": k.weights(model)}


@idiom
def hook_is_removed(k: User):
    """`handle.remove()` after two steps"""
    model = k.net()
    manager = k.sgd(model)
    handle = model.head.weight.register_hook(torch.zeros_like)
    k.train(model, manager, steps=2)
    handle.remove()
    return k.train(model, manager, steps=2)


@idiom
def counted_after_accumulation(k: User):
    """`register_post_accumulate_grad_hook` is called once a step for each parameter"""
    model, count = k.net(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: count.append(tuple(p.shape)))
    k.train(model, k.sgd(model))
    return {"count": len(count)}


@idiom(verdicts="refused", says="Leave it out around the model")
def saved_tensors_hooks_disabled(k: User):
    """`torch.autograd.graph.disable_saved_tensors_hooks` around the forward"""
    model = k.net()
    x, y = k.batch()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        loss = F.cross_entropy(model(x), y)
    k.step(k.sgd(model), loss)
    return model


@idiom
def multi_grad_hook(k: User):
    """`torch.autograd.graph.register_multi_grad_hook` over all parameters, two of which get no gradient"""
    plain = Net()
    plain.unused = nn.Linear(2, 2)
    model, seen = k.shard(plain), []
    parameters = list(model.parameters())

    def hook(grads):
        seen.append([None if grad is None else k.average(grad) for grad in grads])

    handle = torch.autograd.graph.register_multi_grad_hook(parameters, hook)
    manager = k.sgd(model)
    k.train(model, manager)
    handle.remove()
    k.train(model, manager)
    return {"seen": seen, "weights": k.weights(model)}


@idiom
def multi_grad_hook_under_autocast(k: User):
    """`register_multi_grad_hook` over each block's parameters, under autocast"""
    model, seen = k.net(), []
    for number, layer in enumerate(model.layers):
        hook = lambda grads, number=number: seen.append([number, len(grads)])  # noqa: E731
        torch.autograd.graph.register_multi_grad_hook(list(layer.parameters()), hook)
    for x, y in k.batches():
        with torch.autocast(k.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
    return {"seen": seen}


@idiom
def multi_grad_hook_of_any(k: User):
    """`register_multi_grad_hook(mode="any")` is called once a backward"""
    model, seen = k.net(), []
    torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), lambda grad: seen.append(1), mode="any")
    k.train(model, k.sgd(model))
    return {"seen": seen}


@idiom
def nodes_of_parameters(k: User):
    """`p.expand_as(p).grad_fn.next_functions[0][0].register_hook`, as data-parallel wrappers once did"""
    model, seen, nodes = k.net(), [], []
    for name, p in model.named_parameters():
        node = p.expand_as(p).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, name=name: seen.append(name))
        nodes.append(node)
    k.train(model, k.sgd(model))
    return {"seen": sorted(seen)}


@idiom(verdicts="right refused refused", says="Give torch.autograd.grad the parameter itself")
def gradient_edge_of_a_parameter(k: User):
    """`torch.autograd.graph.get_gradient_edge(p)`, of which autograd would give this rank's gradient"""
    model = k.net()
    x, y = k.batch()
    loss = F.cross_entropy(model(x), y)
    edges = [torch.autograd.graph.get_gradient_edge(p) for p in model.head.parameters()]
    return {"grads": [k.average(grad) for grad in torch.autograd.grad(loss, edges)]}


@idiom(verdicts="right refused refused", says="Give torch.autograd.grad the parameter itself")
def gradient_edge_under_a_default_device(k: User):
    """the same in a script that has set a default device"""
    with k.batch()[0].device:
        return gradient_edge_of_a_parameter(k)


@idiom
def features_by_a_hook(k: User):
    """`register_forward_hook` collects outputs of blocks; a loss uses them"""
    model, kept = k.net(), {}
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda m, a, out, number=number: kept.__setitem__(number, out))
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x), y) + 0.1 * sum(v.square().mean() for v in kept.values()))
    return model


@idiom
def features_are_watched(k: User):
    """A forward hook stores means of activations, once a step"""
    model, seen = k.net(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, a, out: seen.append(out.detach().mean()))
    k.train(model, k.sgd(model))
    return {"seen": [k.mean(v) for v in seen]}


@idiom
def output_is_replaced(k: User):
    """A forward hook gives another output"""
    model = k.net()
    model.layers[0].register_forward_hook(lambda m, a, out: out * 0.5)
    return k.train(model, k.sgd(model))


@idiom
def input_is_replaced(k: User):
    """A forward pre-hook gives another input, with keywords"""
    model = k.net()
    model.layers[1].register_forward_pre_hook(lambda m, a, kw: ((a[0] + 0.1,), kw), with_kwargs=True)
    return k.train(model, k.sgd(model))


@idiom
def pre_hook_counts(k: User):
    """A forward pre-hook is called once a step"""
    model, count = k.net(), []
    model.layers[0].register_forward_pre_hook(lambda m, a: count.append(1))
    k.train(model, k.sgd(model))
    return {"count": len(count)}


@idiom
def weight_in_a_pre_hook(k: User):
    """A forward pre-hook of a block clamps the block's weight"""
    model = k.net()

    @torch.no_grad()
    def clamp(module, args):
        module.up.weight.clamp_(-0.2, 0.2)

    model.layers[0].register_forward_pre_hook(clamp)
    return k.train(model, k.sgd(model))


@idiom
def backward_hook_of_a_block(k: User):
    """`register_full_backward_hook` reads the gradient of outputs"""
    model, seen = k.net(), []
    model.layers[0].register_full_backward_hook(lambda m, gi, go: seen.append(k.gather(go[0].clone())))
    k.train(model, k.sgd(model), steps=1)
    return {"rows": [len(v) for v in seen], "weights": k.weights(model)}


@idiom
def backward_hook_scales(k: User):
    """`register_full_backward_hook` gives another gradient"""
    model = k.net()
    model.layers[1].register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else 0.5 * g for g in gi))
    return k.train(model, k.sgd(model))


@idiom
def hook_on_an_activation(k: User):
    """`features.register_hook` reverses the gradient (domain adversarial)"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        f = model.features(x)
        f.register_hook(lambda g: -0.5 * g)
        k.step(manager, F.cross_entropy(model.head(f), y))
    return model


@idiom
def grad_cam(k: User):
    """Grad-CAM: activations by a forward hook, their gradient by `retain_grad`"""
    model, kept = k.net(), {}

    def keep(module, args, out):
        out.retain_grad()
        kept["out"] = out

    model.layers[1].register_forward_hook(keep)
    x, y = k.batch()
    model(x).gather(1, y[:, None]).sum().backward()
    return {"rows": k.gather((kept["out"] * kept["out"].grad).detach())}


@idiom
def hooks_of_all_modules(k: User):
    """A forward hook on every leaf, for a summary of shapes"""
    model, shapes = k.net(), []
    handles = [
        m.register_forward_hook(lambda m, a, out: shapes.append((type(m).__name__, str(tuple(out.shape[1:])))))
        for m in model.modules()
        if not list(m.children())
    ]
    with torch.no_grad():
        model(k.batch()[0])
    for handle in handles:
        handle.remove()
    return {"shapes": shapes}


@idiom
def hooks_are_copied(k: User):
    """`copy.deepcopy` of a model with hooks"""
    model = k.net()
    model.layers[0].register_forward_hook(lambda m, a, out: out * 0.5)
    other = copy.deepcopy(model)
    return k.train(other, k.sgd(other))


@idiom
def saved_tensor_hooks(k: User):
    """`saved_tensors_hooks` of the user's around the forward (offloading)"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            loss = F.cross_entropy(model(x), y)
        k.step(manager, loss)
    return model


@idiom
def saved_on_the_cpu(k: User):
    """`torch.autograd.graph.save_on_cpu` around the forward"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        with torch.autograd.graph.save_on_cpu():
            loss = F.cross_entropy(model(x), y)
        k.step(manager, loss)
    return model


@idiom
def anomalies_are_detected(k: User):
    """`torch.autograd.detect_anomaly`"""
    model = k.net()
    manager = k.sgd(model)
    with torch.autograd.detect_anomaly(check_nan=True):
        for x, y in k.batches(2):
            k.step(manager, F.cross_entropy(model(x), y))
    return model


@idiom
def forward_is_replaced(k: User):
    """`model.layers[0].forward = ...`: a method of an instance is replaced"""
    model = k.net()
    layer = model.layers[0]
    old = layer.forward
    layer.forward = lambda x: old(x) * 0.5
    return k.train(model, k.sgd(model))


@idiom
def module_is_replaced_by_a_wrapper(k: User):
    """A linear layer is replaced by a module that holds it (Sequential)"""
    model = k.net()
    model.head = nn.Sequential(model.head, nn.Tanh())
    return k.train(model, k.sgd(model))


@idiom
def hooks_of_every_optimizers_step(k: User):
    """`register_optimizer_step_pre_hook` and `_post_hook` print norms of weights and gradients of two optimizers"""
    model, seen = k.net(), []
    head, others = list(model.head.parameters()), [*model.enter.parameters(), *model.layers.parameters()]
    manager = k.manage(torch.optim.AdamW(head, lr=1e-2, eps=1e-4), torch.optim.SGD(others, lr=0.1))

    def look(optimizer, args, kwargs):
        for p in optimizer.param_groups[0]["params"]:
            seen.append([float(p.detach().norm()), float(p.grad.norm()), p.shape[0], len(args)])

    handles = register_optimizer_step_pre_hook(look), register_optimizer_step_post_hook(look)
    k.train(model, manager)
    for handle in handles:
        handle.remove()
    return {"weights": k.weights(model), "seen": seen}


def _hooked(k: User, hook, **options):
    model = k.net()
    for p in model.parameters():
        p.register_hook(hook)
    return k.train(model, k.sgd(model, **options))


@idiom(verdicts="right said said", says="before the mean over the ranks")
def clamped_by_a_hook(k: User):
    """`p.register_hook(lambda g: g.clamp(-c, c))`, where it clips"""
    return _hooked(k, lambda g: g.clamp(-0.02, 0.02))


@idiom(verdicts="right said said", says="before the mean over the ranks")
def clamped_in_place_by_a_hook(k: User):
    """A hook that does `g.data.clamp_(-c, c)` and gives nothing"""
    return _hooked(k, lambda g: (g.data.clamp_(-0.02, 0.02), None)[1])


@idiom(verdicts="right said said", says="before the mean over the ranks")
def normalized_by_a_hook(k: User):
    """`p.register_hook(lambda g: g / (g.norm() + eps))`"""
    return _hooked(k, lambda g: g / (g.norm() + 1e-3))


@idiom(verdicts="right said said", says="before the mean over the ranks")
def signs_by_a_hook(k: User):
    """`p.register_hook(torch.sign)`"""
    return _hooked(k, torch.sign, lr=0.01)


@idiom(verdicts="right said said", says="before the mean over the ranks")
def squared_by_a_hook(k: User):
    """`g * g.abs()`"""
    return _hooked(k, lambda g: g * g.abs())


@idiom(verdicts="right said said", says="before the mean over the ranks")
def largest_kept_by_a_hook(k: User):
    """Entries below the mean absolute value become zero"""
    return _hooked(k, lambda g: torch.where(g.abs() > g.abs().mean(), g, 0.0))


@idiom(verdicts="right said said", says="before the mean over the ranks")
def clipped_by_norm_in_a_hook(k: User):
    """`if norm > c: g = g * (c / norm)`, norm a Python number"""

    def hook(g):
        norm = g.norm().item()
        return g * (0.05 / norm) if norm > 0.05 else g

    return _hooked(k, hook)


@idiom
def noise_by_a_hook(k: User):
    """`g + 0.01 * torch.randn_like(g)`: all ranks draw the same"""
    return _hooked(k, lambda g: g + 0.01 * torch.randn_like(g))


@idiom
def sum_is_taken_off_by_a_hook(k: User):
    """Gradient centralization in a hook: `g - g.mean()`"""
    return _hooked(k, lambda g: g - g.mean())


@idiom
def rows_are_zeroed_in_place_by_a_hook(k: User):
    """A hook that zeroes `g[:1]` in place and gives nothing"""
    return _hooked(k, lambda g: (g[:1].zero_(), None)[1])


@idiom
def norms_read_by_a_hook(k: User):
    """A hook keeps norms of what it sees, and changes nothing"""
    model, seen = k.net(), []
    model.head.weight.register_hook(lambda g: seen.append(g.norm().item()))
    return k.train(model, k.sgd(model))


@idiom
def not_a_number_by_a_hook(k: User):
    """`torch.nan_to_num` in a hook"""
    return _hooked(k, torch.nan_to_num)


@idiom(verdicts="right said said", says="before the mean over the ranks")
def clamped_after_accumulation(k: User):
    """`register_post_accumulate_grad_hook` clamps `p.grad` in place"""
    model = k.net()

    def clamp(p):
        p.grad.clamp_(-0.02, 0.02)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(clamp)
    return k.train(model, k.sgd(model))


@idiom
def scaled_after_accumulation(k: User):
    """`register_post_accumulate_grad_hook` multiplies `p.grad` in place"""
    model = k.net()

    def halve(p):
        p.grad.mul_(0.5)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(halve)
    return k.train(model, k.sgd(model))


@idiom
def replaced_after_accumulation(k: User):
    """`register_post_accumulate_grad_hook` binds `p.grad` anew"""
    model = k.net()

    def hook(p):
        p.grad = p.grad * 0.5

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return k.train(model, k.sgd(model))


@idiom(verdicts="right said said", says="before the mean over the ranks")
def clamped_by_a_backward_hook(k: User):
    """`register_full_backward_hook` clamps gradients of inputs"""
    model = k.net()
    model.layers[1].register_full_backward_hook(lambda m, gi, go: (gi[0].clamp(-0.01, 0.01),))
    return k.train(model, k.sgd(model))


@idiom(verdicts="right said said", says="before the mean over the ranks")
def normalized_by_a_backward_pre_hook(k: User):
    """`register_full_backward_pre_hook` divides the gradient of outputs by its norm"""
    model = k.net()
    model.layers[1].register_full_backward_pre_hook(lambda m, go: (go[0] / (go[0].norm() + 1e-3),))
    return k.train(model, k.sgd(model))


@idiom(verdicts="right said said", says="before the mean over the ranks")
def temperature_clamped_by_a_hook(k: User):
    """A hook that is not linear, on a parameter of no module that the optimizer has, too"""
    model, temperature = k.net(), nn.Parameter(torch.ones(3, device=k.device))
    temperature.register_hook(lambda g: g * g.abs())
    manager = k.sgd([*model.parameters(), temperature])
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x) * temperature.sum(), y))
    return {"weights": k.weights(model), "temperature": temperature}


@idiom(verdicts="right said said", says="before the mean over the ranks")
def clamped_where_features_train(k: User):
    """A hook that clips, and a loss of `model.features(x)`, no forward"""
    model = k.net()
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.002, 0.002))
    manager = k.sgd(model)
    for x, _ in k.batches():
        k.step(manager, model.features(x).tanh().square().mean())
    return model


@idiom(verdicts="right said said", says="before the mean over the ranks")
def clamped_by_a_hook_of_later_steps(k: User):
    """A hook that clips is registered after five steps"""
    model = k.net()
    manager = k.sgd(model)
    k.train(model, manager, steps=5)
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.02, 0.02))
    return k.train(model, manager)
