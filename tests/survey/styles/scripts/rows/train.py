import csv
import json
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(48, 8)
y = (x.sum(1) > 0).long()
loader = DataLoader(TensorDataset(x, y), batch_size=12, shuffle=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
rows, dicts, pairs, texts, more, accs = [], [], [], [], [], []
step = 0
for epoch in range(2):
    for xb, yb in loader:
        out = model(xb)
        ce = F.cross_entropy(out, yb)
        reg = out.logsumexp(-1).pow(2).mean()
        loss = ce + 0.01 * reg
        optimizer.zero_grad()
        (loss / 2).backward()
        optimizer.step()
        acc = (out.argmax(1) == yb).float().mean()
        rows.append([step, f"{loss.item():.4f}"])
        dicts.append({"step": step, "loss": loss.item(), "lr": optimizer.param_groups[0]["lr"], "acc": acc.item(), "n": len(xb)})
        pairs.append((loss.item(), acc.item()))
        texts.append(f"{step}: {loss.item():.4f} {ce.item():.4f} {reg.item():.4f}")
        more.append([epoch, [step, round(loss.item(), 4), str(acc.item())]])
        accs.append([round(100 * acc.item(), 2), (out.argmax(1) == yb).sum().item()])
        print(f"{loss.item():.4f} {ce.item():.4f} {reg.item():.4f}", ce.item())
        step += 1
print(rows, dicts, pairs)
print(texts, more, accs)
