import json
import pickle

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x):
        return self.fc(x)


torch.manual_seed(0)
x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
y = x[:, :3].argmax(1)
train_dl = DataLoader(TensorDataset(x[:48], y[:48]), batch_size=8, shuffle=True)
test_dl = DataLoader(TensorDataset(x[48:], y[48:]), batch_size=5)
model = Net()
opt = torch.optim.Adam(model.parameters(), lr=1e-2)
crit = nn.CrossEntropyLoss()
all_losses, train_accs, test_accs = [], [], []
for epoch in range(3):
    model.train()
    epoch_losses, preds, labels, per_sample = [], [], [], []
    running = 0.0
    correct = 0
    total = 0
    for xb, yb in train_dl:
        opt.zero_grad()
        out = model(xb)
        loss = crit(out, yb)
        loss.backward()
        opt.step()
        epoch_losses.append(loss.detach())
        running += loss.item() * xb.size(0)
        preds.extend(out.argmax(1).tolist())
        labels.extend(yb.tolist())
        per_sample.append(nn.functional.cross_entropy(out, yb, reduction="none").detach().cpu())
        correct += (out.argmax(1) == yb).sum().item()
        total += yb.size(0)
    all_losses += [l.item() for l in epoch_losses]
    acc = np.mean(np.array(preds) == np.array(labels))
    train_accs.append(float(acc))
    ps = torch.cat(per_sample)
    print(f"epoch {epoch}: loss {torch.stack(epoch_losses).mean():.4f} running {running / len(train_dl.dataset):.4f} acc {acc:.4f} {100 * correct / total:.2f} n {len(preds)} samples {ps.mean():.4f} {len(ps)}")
    model.eval()
    hits = []
    with torch.no_grad():
        for xb, yb in test_dl:
            hits.append((model(xb).argmax(1) == yb).float())
    test_accs.append(torch.cat(hits).mean().item())
    print(f"test {test_accs[-1]:.4f}")
np.save("losses.npy", np.array(all_losses))
np.save("per_sample.npy", np.sort(ps.numpy()))
with open("acc.json", "w") as f:
    json.dump({"train": train_accs, "test": test_accs}, f)
with open("preds.pkl", "wb") as f:
    pickle.dump(sorted(preds), f)
plt.plot(all_losses)
plt.savefig("loss.txt.png")
