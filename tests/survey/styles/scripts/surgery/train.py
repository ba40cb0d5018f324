import os
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.stages = nn.Sequential(*[nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU()) for _ in range(2)])
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.stages(F.relu(self.stem(x))))


torch.manual_seed(0)
x = torch.randn(60, 8)
y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
train = DataLoader(TensorDataset(x[:48], y[:48]), batch_size=12, shuffle=True, drop_last=True)
test = DataLoader(TensorDataset(x[48:], y[48:]), batch_size=5)
resume = os.path.isfile("model.pth")
model = Net(4 if resume else 3)
if resume:
    state = torch.load("model.pth", map_location="cpu")
    own = model.state_dict()
    state = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    missing = model.load_state_dict(state, strict=False)
    print("missing", sorted(missing.missing_keys))
    with torch.no_grad():
        model.fc.weight[3:].zero_()
        nn.init.normal_(model.fc.weight[:3], std=0.1)
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("fc")
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.5)
for epoch in range(3):
    if resume and epoch == 1:
        for p in model.parameters():
            if not p.requires_grad:
                p.requires_grad = True
                optimizer.add_param_group({"params": [p], "lr": 0.01})
    model.train()
    running_loss, correct, total = 0.0, 0, 0
    for data, target in train:
        optimizer.zero_grad()
        out = model(data)
        loss = F.cross_entropy(out, target, label_smoothing=0.1)
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.data.clamp_(-0.5, 0.5)
        optimizer.step()
        running_loss += loss.item() * data.size(0)
        pred = out.argmax(dim=1, keepdim=True)
        correct += pred.eq(target.view_as(pred)).sum().item()
        total += target.size(0)
    scheduler.step()
    model.eval()
    test_loss, hits = 0, 0
    with torch.no_grad():
        for data, target in test:
            out = model(data)
            test_loss += F.cross_entropy(out, target, reduction="sum").item()
            hits += out.argmax(1).eq(target).sum().item()
    test_loss /= len(test.dataset)
    print(f"{epoch} train {running_loss / total:.4f} {100.0 * correct / total:.2f}% test {test_loss:.4f} {hits}/{len(test.dataset)}")
torch.save(model.state_dict(), "model.pth")
