import math

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Stream(IterableDataset):
    def __init__(self, n, seed):
        self.n, self.seed = n, seed

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        for _ in range(self.n):
            x = rng.standard_normal(5).astype("float32")
            yield torch.from_numpy(x), torch.tensor(float(x[0] * 2))


class Reg(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 1)

    def forward(self, x):
        return self.l(x).squeeze(-1)


def batches(n, bs, seed):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        x = rng.standard_normal((bs, 5)).astype("float32")
        yield torch.from_numpy(x), torch.from_numpy(x[:, 0] * 2)


def run():
    torch.manual_seed(0)
    model = Reg()
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    dl = DataLoader(Stream(36, 1), batch_size=6)
    it = iter(dl)
    for step in range(10):
        try:
            x, y = next(it)
        except StopIteration:
            it = iter(dl)
            x, y = next(it)
        loss = ((model(x) - y) ** 2).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        print(step, f"{loss.item():.4f}")
    for x, y in batches(4, 6, 3):
        loss = ((model(x) - y) ** 2).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        print("gen", f"{loss.item():.4f}")
    with torch.no_grad():
        errs = [float((model(x) - y).abs().mean()) for x, y in DataLoader(Stream(7, 9), batch_size=2)]
    print("test", np.mean(errs))
    np.savez("out.npz", errs=np.array(errs), w=model.l.weight.detach().numpy())


if __name__ == "__main__":
    run()
