import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(48, 8)
y = x[:, :1] * 2
loader = DataLoader(TensorDataset(x, y), batch_size=12, shuffle=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
for epoch in range(8):
    for xb, yb in loader:
        loss = F.mse_loss(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{loss.item():.4f}")
    if epoch == 0:
        optimizer.state.clear()
    elif epoch == 1:
        for p in model.parameters():
            state = optimizer.state[p]
            if "exp_avg" in state:
                state["exp_avg"].zero_()
                state["exp_avg_sq"].mul_(0.5)
    elif epoch == 2:
        for group in optimizer.param_groups:
            for p in group["params"]:
                print(f"norm {optimizer.state[p]['exp_avg'].norm().item():.4f} {int(optimizer.state[p]['step'])}", tuple(optimizer.state[p]["exp_avg_sq"].shape))
    elif epoch == 3:
        for state in optimizer.state.values():
            for k, v in state.items():
                if torch.is_tensor(v):
                    state[k] = v.to("cpu")
    elif epoch == 4:
        del optimizer.state[model.head.weight]
    elif epoch == 5:
        optimizer.state[model.head.bias] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    elif epoch == 6:
        stored = optimizer.state.pop(model.body.weight)
        stored["exp_avg"] = stored["exp_avg"] * 0.5
        stored["step"].fill_(2.0)
        optimizer.state[model.body.weight] = stored
        print(optimizer.state.get(model.body.bias, None) is None, len(optimizer.state))
torch.save({"model": model.state_dict(), "opt": optimizer.state_dict()}, "m.pt")
