from __future__ import annotations
import torch, math, random
import numpy as np
from torch import nn
from torch.nn import functional as F
import bmtrain as bmt
from .registry import idiom
from .user import INPUTS, CLASSES, WIDTH, Net, User

def _sac(k, alpha_param):
    pass

@idiom
def alpha_unmanaged_step(k: User):
    """a"""
    model = k.net()
    la = torch.zeros(1, requires_grad=True, device=k.device)
    opt = torch.optim.Adam([la], lr=0.01)
    m = k.sgd(model)
    for x, y in k.batches(3):
        k.step(m, F.cross_entropy(model(x), y))
        opt.zero_grad()
        (la.exp() * x.square().mean()).backward()
        opt.step()
    return {"a": la, "w": k.weights(model)}

@idiom
def alpha_from_output_unmanaged(k: User):
    """a"""
    model = k.net()
    la = nn.Parameter(torch.zeros(1, device=k.device))
    opt = torch.optim.SGD([la], lr=0.01)
    m = k.sgd(model)
    for x, y in k.batches(3):
        out = model(x)
        k.step(m, F.cross_entropy(out, y))
        opt.zero_grad()
        (la.exp() * out.detach().square().mean()).backward()
        opt.step()
    return {"a": la, "w": k.weights(model)}

@idiom
def alpha_same_loss_unmanaged(k: User):
    """alpha in the model's loss, its optimizer not managed"""
    model = k.net()
    la = nn.Parameter(torch.zeros(1, device=k.device))
    opt = torch.optim.SGD([la], lr=0.1)
    m = k.sgd(model)
    for x, y in k.batches(3):
        opt.zero_grad()
        k.step(m, F.cross_entropy(model(x) * la.exp(), y))
        opt.step()
    return {"a": la, "w": k.weights(model)}

@idiom
def alpha_grad_read(k: User):
    """printed after plain backward, managed"""
    model = k.net()
    la = nn.Parameter(torch.zeros(1, device=k.device))
    m = k.sgd([*model.parameters(), la])
    seen = []
    for x, y in k.batches(3):
        m.zero_grad()
        (F.cross_entropy(model(x) * la.exp(), y)).backward()
        seen.append(la.grad.item())
        m.step()
    return {"a": la, "w": k.weights(model), "seen": seen}

@idiom
def alpha_by_hand(k: User):
    """stepped by hand"""
    model = k.net()
    la = nn.Parameter(torch.zeros(1, device=k.device))
    m = k.sgd(model)
    for x, y in k.batches(3):
        m.zero_grad()
        F.cross_entropy(model(x) * la.exp(), y).backward()
        m.step()
        with torch.no_grad():
            la -= 0.1 * la.grad
            la.grad = None
    return {"a": la, "w": k.weights(model)}

@idiom
def alpha_autograd_grad(k: User):
    """autograd.grad of it"""
    model = k.net()
    la = nn.Parameter(torch.zeros(1, device=k.device))
    m = k.sgd(model)
    for x, y in k.batches(3):
        out = model(x)
        k.step(m, F.cross_entropy(out, y))
        (g,) = torch.autograd.grad((la.exp() * out.detach().square()).mean(), la)
        with torch.no_grad():
            la -= 0.1 * g
    return {"a": la, "w": k.weights(model)}

@idiom
def alpha_clip_torch(k: User):
    """clip"""
    model = k.net()
    la = nn.Parameter(torch.zeros(1, device=k.device))
    ps = [*model.parameters(), la]
    m = k.sgd(ps)
    seen = []
    for x, y in k.batches(3):
        m.zero_grad()
        F.cross_entropy(model(x) * la.exp(), y).backward()
        seen.append(float(nn.utils.clip_grad_norm_(ps, 0.1)))
        m.step()
    return {"a": la, "w": k.weights(model), "seen": seen}

@idiom
def alpha_alone_clip_torch_unmanaged(k: User):
    """clip of alpha alone, optimizer unmanaged"""
    model = k.net()
    la = nn.Parameter(torch.zeros(2, device=k.device))
    m = k.sgd(model)
    opt = torch.optim.SGD([la], lr=0.1)
    seen = []
    for x, y in k.batches(3):
        opt.zero_grad()
        k.step(m, F.cross_entropy(model(x) * la.exp().sum(), y))
        seen.append(float(nn.utils.clip_grad_norm_([la], 0.1)))
        opt.step()
    return {"a": la, "w": k.weights(model), "seen": seen}

@idiom
def criterion_plain_module(k: User):
    """a loss module with a parameter, no wrapper, in the manager"""
    class Crit(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.zeros(2))
        def forward(self, out, y):
            return F.cross_entropy(out, y) * torch.exp(-self.s[0]) + self.s[0] + out.square().mean() * self.s[1].exp()
    model = k.net()
    crit = Crit().to(k.device)
    m = k.manage(torch.optim.SGD([*model.parameters(), *crit.parameters()], lr=0.1))
    for x, y in k.batches(3):
        k.step(m, crit(model(x), y))
    return {"a": crit.s, "w": k.weights(model)}

@idiom
def alpha_accumulated(k: User):
    """accumulated"""
    model = k.net()
    la = nn.Parameter(torch.zeros(1, device=k.device))
    m = k.sgd([*model.parameters(), la])
    for step in range(3):
        m.zero_grad()
        for x, y in k.batches(3):
            (F.cross_entropy(model(x) * la.exp(), y) / 3).backward()
        m.step()
    return {"a": la, "w": k.weights(model)}

@idiom
def plain_net_unmanaged(k: User):
    """A plain net trained with its own optimizer unmanaged beside a sharded one"""
    model = k.net()
    torch.manual_seed(3)
    disc = nn.Linear(CLASSES, 1).to(k.device)
    opt = torch.optim.Adam(disc.parameters(), lr=0.01)
    m = k.sgd(model)
    for x, y in k.batches(3):
        out = model(x)
        k.step(m, F.cross_entropy(out, y))
        opt.zero_grad()
        disc(out.detach()).square().mean().backward()
        opt.step()
    return {"a": k.weights(disc), "w": k.weights(model)}

@idiom
def alpha_hook(k: User):
    """hook on alpha reads and doubles grad"""
    model = k.net()
    la = nn.Parameter(torch.zeros(1, device=k.device))
    seen = []
    la.register_hook(lambda g: seen.append(float(g)) or g * 2)
    m = k.sgd([*model.parameters(), la])
    for x, y in k.batches(3):
        k.step(m, F.cross_entropy(model(x) * la.exp(), y))
    return {"a": la, "w": k.weights(model), "seen": seen}
