import copy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(48, 6)
y = torch.sin(x.sum(1, keepdim=True))
loader = DataLoader(TensorDataset(x, y), batch_size=12, shuffle=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(1, 8, num_layers=2, batch_first=True)
        self.bn = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 1)
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        out, h = self.rnn(x.unsqueeze(-1))
        return self.fc(self.bn(out[:, -1]))


model = Net()
nets = {"main": model, "slow": copy.deepcopy(model)}
opt = torch.optim.RMSprop(model.parameters(), lr=1e-3)
losses, best = [], {"loss": 1e9, "state": None}
skipped = 0
for epoch in range(4):
    for i, (a, b) in enumerate(loader):
        if epoch == 1 and i == 2:
            a = a * float("nan")
        loss = F.smooth_l1_loss(model(a), b)
        if torch.isnan(loss):
            skipped += 1
            continue
        opt.zero_grad()
        loss.backward()
        norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        if max(norms) > 100:
            print("exploded")
            break
        opt.step()
        losses.append(loss.detach())
    mean = torch.stack(losses[-4:]).mean().item()
    if mean < best["loss"]:
        best = {"loss": mean, "state": copy.deepcopy(model.state_dict()), "epoch": epoch}
    if epoch % 2 == 1:
        with torch.no_grad():
            for p, q in zip(nets["main"].parameters(), nets["slow"].parameters()):
                q.data.add_(p.data - q.data, alpha=0.5)
                p.data.copy_(q.data)
    if epoch == 2:
        model.fc.reset_parameters()
        opt = torch.optim.RMSprop(model.parameters(), lr=5e-4)
    print(epoch, f"{mean:.5f} {max(norms):.5f}", skipped, model.steps)
model.load_state_dict(best["state"])
model.eval()
with torch.inference_mode():
    pred = model(x)
    print(f"final {F.mse_loss(pred, y).item():.5f} {best['epoch']}")
torch.save({"best": best["state"], "losses": torch.stack(losses), "pred": pred}, "out.pt")
