"""Low precision, autocast, compilation, devices."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .registry import idiom
from .user import CLASSES, INPUTS, Net, User

HALF = 0.03  # bf16 sums in another order


def _autocast(k: User, model, manager, dtype=torch.bfloat16, steps: int = 2):
    for x, y in k.batches(steps):
        with torch.autocast(k.device.type, dtype):
            loss = F.cross_entropy(model(x), y)
        k.step(manager, loss)
    return model


@idiom(tolerance=HALF)
def autocast(k: User):
    """`torch.autocast(bfloat16)` around forward and loss"""
    model = k.net()
    return _autocast(k, model, k.sgd(model))


@idiom(tolerance=HALF)
def autocast_gradients(k: User):
    """The same: every parameter has a gradient"""
    model = k.net()
    x, y = k.batch()
    manager = k.sgd(model)
    with torch.autocast(k.device.type, torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    manager.backward(loss)
    return {"grads": k.grads(model)}


@idiom(
    tolerance=HALF,
)
def autocast_switched_off(k: User):
    """A part of the forward with `autocast(enabled=False)`"""

    class Model(Net):
        def forward(self, x):
            x = self.features(x)
            with torch.autocast(x.device.type, enabled=False):
                return self.head(x.float())

    model = k.shard(Model())
    return _autocast(k, model, k.sgd(model))


@idiom(tolerance=HALF)
def autocast_and_evaluation(k: User):
    """Training under autocast, evaluation without"""
    model, seen = k.net(), []
    manager = k.sgd(model)
    for x, y in k.batches():
        with torch.autocast(k.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        k.step(manager, loss)
        with torch.no_grad():
            seen.append(k.mean(F.cross_entropy(model(x), y)))
    return {"seen": seen, "weights": k.weights(model)}


@idiom(tolerance=HALF)
def autocast_as_decorator(k: User):
    """`@torch.autocast` on forward"""

    class Model(Net):
        @torch.autocast(k.device.type, dtype=torch.bfloat16)
        def forward(self, x):
            return super().forward(x)

    model = k.shard(Model())
    return k.train(model, k.sgd(model), loss=lambda out, y: F.cross_entropy(out.float(), y))


@idiom(tolerance=HALF)
def grad_scaler(k: User):
    """A manager with a loss scale in the place of `GradScaler`, autocast"""
    model = k.net()
    manager = k.manage(torch.optim.SGD(model.parameters(), lr=0.1), loss_scale=2.0**10)
    return _autocast(k, model, manager)


def _scaled_by_hand(k: User, made, clips: bool):
    """Steps of which the second has an infinite input."""
    model = k.net()
    optimizer = made(model.parameters())
    k.manage(optimizer)
    scaler = torch.amp.GradScaler(k.device.type, init_scale=2.0**8, growth_interval=2)
    for step in range(4):
        inputs = k.randn(12, INPUTS, seed=step)
        if step == 1:
            inputs[0, 0] = float("inf")
        x, y = k.share(inputs), k.share(k.randint(CLASSES, 12, seed=step))
        optimizer.zero_grad()
        with torch.autocast(k.device.type, torch.float16):
            out = model(x)
        scaler.scale(F.cross_entropy(out.float(), y)).backward()
        if clips:
            scaler.unscale_(optimizer)
            k.losses.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        scaler.step(optimizer)
        scaler.update()
        k.losses.append(scaler.get_scale())
    return model


@idiom(tolerance=HALF)
def grad_scaler_by_hand(k: User):
    """torch's `GradScaler` as it is: a step is left out and the scale falls where one rank's gradients overflow"""
    return _scaled_by_hand(k, lambda parameters: torch.optim.SGD(parameters, lr=0.1), clips=False)


@idiom(tolerance=HALF)
def grad_scaler_by_hand_and_clipping(k: User):
    """The same with `scaler.unscale_`, clipping and a fused optimizer"""
    return _scaled_by_hand(k, lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True), clips=True)


@idiom
def own_scaler(k: User):
    """The loss is scaled, gradients are divided by hand"""
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        manager.zero_grad()
        manager.backward(F.cross_entropy(model(x), y) * 1024)
        for p in model.parameters():
            p.grad.div_(1024)
        manager.step()
    return model


@idiom(tolerance=HALF)
def bf16_model(k: User):
    """`model.bfloat16()` with AdamW, gradients of the first step"""
    model = k.shard(Net().bfloat16())
    manager = k.manage(k.adam(model.parameters()))
    x, y = k.batch()
    loss = F.cross_entropy(model(x.bfloat16()).float(), y)
    manager.backward(loss)
    return {"loss": k.mean(loss), "grads": k.grads(model)}


@idiom(tolerance=HALF)
def bf16_after_wrapping(k: User):
    """`model.to(torch.bfloat16)` after wrapping"""
    model = k.net().to(torch.bfloat16)
    manager = k.sgd(model)
    x, y = k.batch()
    loss = F.cross_entropy(model(x.bfloat16()).float(), y)
    manager.backward(loss)
    return {"dtype": str(model.head.weight.dtype), "loss": k.mean(loss), "grads": k.grads(model)}


@idiom(tolerance=HALF)
def half_and_back(k: User):
    """`model.half()`, evaluated as `float()` again"""
    model = k.net()
    model.half()
    model.float()
    return k.train(model, k.sgd(model))


@idiom(tolerance=HALF)
def norms_in_fp32(k: User):
    """Norms stay fp32 in a bf16 model"""

    class Norm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.float()).to(x.dtype)

    net = Net()
    for layer in net.layers:
        layer.norm = Norm(8)
    net.bfloat16()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    net.norm = nn.Identity()
    model = k.shard(net)
    manager = k.sgd(model)
    x, y = k.batch()
    loss = F.cross_entropy(model(x.bfloat16()).float(), y)
    manager.backward(loss)
    return {"loss": k.mean(loss), "grads": k.grads(model)}


@idiom
def double_model(k: User):
    """`model.double()`"""
    model = k.shard(Net().double())
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x.double()), y))
    return model


@idiom
def default_dtype(k: User):
    """`torch.set_default_dtype(torch.float64)`"""
    torch.set_default_dtype(torch.float64)
    model = k.net()
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x.double()), y))
    return model


@idiom
def dtype_and_device_of_a_model(k: User):
    """`next(model.parameters()).dtype` and `.device` decide where inputs go"""
    model = k.net()
    p = next(model.parameters())
    manager = k.sgd(model)
    for x, y in k.batches():
        k.step(manager, F.cross_entropy(model(x.double().to(p.device, p.dtype)), y.to(p.device)))
    return {"seen": [str(p.dtype), p.device.type, p.is_leaf, p.is_cuda], "weights": k.weights(model)}


@idiom
def moved(k: User):
    """`model.to(device)`, `.cpu()` or `.cuda()` after wrapping"""
    model = k.net().to(k.device)
    model = model.cuda() if k.device.type == "cuda" else model.cpu()
    return k.train(model, k.sgd(model))


@idiom
def memory_format(k: User):
    """`model.to(memory_format=torch.channels_last)`"""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(1, 4, 2), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.body(x.view(-1, 1, 2, 3)).mean((2, 3)))

    model = k.shard(Model()).to(memory_format=torch.channels_last)
    return k.train(model, k.sgd(model))


@idiom
def compiled_eager(k: User):
    """`torch.compile(backend="eager")`"""
    torch._dynamo.reset()
    model = k.net()
    compiled = k.compile(model, backend="eager")
    k.train(compiled, k.sgd(model), steps=2)
    return model


@idiom
def compiled_aot(k: User):
    """`torch.compile(backend="aot_eager")` with clipping"""
    torch._dynamo.reset()
    model = k.net()
    compiled = k.compile(model, backend="aot_eager")
    manager = k.sgd(model)
    for _ in k.after_backward(compiled, manager, steps=2):
        manager.clip_grad_norm(manager.optimizers[0].param_groups, 0.1)
    return model


@idiom(tolerance=HALF)
def compiled_under_autocast(k: User):
    """`torch.compile(backend="aot_eager")` under autocast"""
    torch._dynamo.reset()
    model = k.net()
    compiled = k.compile(model, backend="aot_eager")
    _autocast(k, compiled, k.sgd(model), steps=2)
    return model


@idiom
def compiled_by_torch(k: User):
    """`torch.compile(model, backend="eager")` itself, unconverted"""
    torch._dynamo.reset()
    model = k.net()
    k.train(torch.compile(model, backend="eager"), k.sgd(model), steps=2)
    return model


@idiom
def a_function_is_compiled(k: User):
    """A loss function under `torch.compile`"""
    torch._dynamo.reset()
    loss = torch.compile(lambda out, y: F.cross_entropy(out.float(), y) + out.square().mean(), backend="eager")
    model = k.net()
    return k.train(model, k.sgd(model), loss=loss, steps=2)


@idiom
def copied_to_low_precision(k: User):
    """A deep copy in bf16 for inference"""
    model = k.net()
    k.train(model, k.sgd(model))
    low = copy.deepcopy(model).bfloat16()
    return {"dtypes": sorted({str(p.dtype) for p in low.parameters()}), "low": k.weights(low), "own": k.weights(model)}


@idiom
def unscaled_step_is_skipped(k: User):
    """An infinite loss under a loss scale: the step is left out, the next goes on"""
    model = k.net()
    start = k.weights(model)
    if k.sharded:
        manager = k.manage(torch.optim.SGD(model.parameters(), lr=0.1), loss_scale=2.0**10)
        x, y = k.batch()
        manager.backward(F.cross_entropy(model(x), y) * float("inf"))
        manager.step()
        manager.zero_grad()
    else:
        manager = k.sgd(model)
    now = k.weights(model)
    same = all(torch.equal(start[n], now[n]) for n in start)
    k.train(model, manager)
    return {"same": same, "weights": k.weights(model)}


@idiom
def a_step_is_compiled(k: User):
    """`torch.compile` of a whole step, with a plain `loss.backward()` in it"""
    torch._dynamo.reset()
    model = k.net()
    manager = k.sgd(model)

    @torch.compile(backend="eager")
    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for x, y in k.batches(3):
        manager.zero_grad()
        k.losses.append(k.mean(step(x, y)))
        manager.step()
    return model
