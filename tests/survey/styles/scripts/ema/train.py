import copy
import math

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class EMA:
    def __init__(self, model, decay):
        self.module = copy.deepcopy(model).eval()
        self.decay = decay
        for p in self.module.parameters():
            p.requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        for e, p in zip(self.module.state_dict().values(), model.state_dict().values()):
            if e.dtype.is_floating_point:
                e.mul_(self.decay).add_(p, alpha=1 - self.decay)


class ShadowEMA:
    def __init__(self, model, decay=0.9):
        self.shadow = {}
        self.backup = {}
        self.decay = decay
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.shadow[name] = p.data.clone()

    def update(self, model):
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.shadow[name] = (1.0 - self.decay) * p.data + self.decay * self.shadow[name]

    def apply_shadow(self, model):
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.backup[name] = p.data
                p.data = self.shadow[name]

    def restore(self, model):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data = self.backup[name]
        self.backup = {}


def evaluate(m, loader):
    m.eval()
    tot = []
    with torch.no_grad():
        for x, y in loader:
            tot.append(((m(x) - y) ** 2).mean().item())
    m.train()
    return np.mean(tot)


if __name__ == "__main__":
    torch.manual_seed(3)
    np.random.seed(0)
    X = torch.from_numpy(np.random.randn(40, 5).astype("float32"))
    Y = X[:, :1] * 2 - X[:, 1:2]
    loader = DataLoader(TensorDataset(X[:32], Y[:32]), 8, shuffle=True)
    test = DataLoader(TensorDataset(X[32:], Y[32:]), 3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = EMA(model, 0.9)
    sh = ShadowEMA(model)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 0.5 * (1 + math.cos(math.pi * s / 12)))
    for ep in range(3):
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
            ema.update(model)
            sh.update(model)
        a = evaluate(model, test)
        b = evaluate(ema.module, test)
        sh.apply_shadow(model)
        c = evaluate(model, test)
        sh.restore(model)
        print(f"epoch {ep} loss {loss.item():.5f} lr {sched.get_last_lr()[0]:.4f} model {a:.5f} ema {b:.5f} shadow {c:.5f}")
    torch.save({"model": model.state_dict(), "ema": ema.module.state_dict(), "shadow": sh.shadow}, "ema.pt")
