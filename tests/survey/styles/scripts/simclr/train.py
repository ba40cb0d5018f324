import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.proj = nn.Linear(16, 4)

    def forward(self, x):
        return self.proj(self.backbone(x))


class SimCLR:
    def __init__(self, model, optimizer, scheduler, temperature=0.5, n_views=2):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.t, self.n_views = temperature, n_views
        self.criterion = nn.CrossEntropyLoss()

    def info_nce_loss(self, features):
        bs = features.shape[0] // self.n_views
        labels = torch.cat([torch.arange(bs) for _ in range(self.n_views)], dim=0)
        labels = (labels.unsqueeze(0) == labels.unsqueeze(1)).float()
        features = F.normalize(features, dim=1)
        sim = torch.matmul(features, features.T)
        mask = torch.eye(labels.shape[0], dtype=torch.bool)
        labels = labels[~mask].view(labels.shape[0], -1)
        sim = sim[~mask].view(sim.shape[0], -1)
        pos = sim[labels.bool()].view(labels.shape[0], -1)
        neg = sim[~labels.bool()].view(sim.shape[0], -1)
        logits = torch.cat([pos, neg], dim=1)
        return logits / self.t, torch.zeros(logits.shape[0], dtype=torch.long)

    def train(self, loader, epochs):
        n = 0
        for epoch in range(epochs):
            for a, b in loader:
                x = torch.cat([a, b], dim=0)
                features = self.model(x)
                logits, labels = self.info_nce_loss(features)
                loss = self.criterion(logits, labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                n += 1
            self.scheduler.step()
            print(f"Epoch: {epoch}\tLoss: {loss:.4f}")
        torch.save({"epoch": epochs, "state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, "checkpoint.pth.tar")


def main():
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    ds = TensorDataset(x + 0.1, x * 0.9)
    loader = DataLoader(ds, batch_size=8, shuffle=True, drop_last=True)
    model = Encoder()
    opt = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-4)
    sch = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=4)
    SimCLR(model, opt, sch).train(loader, 4)


if __name__ == "__main__":
    main()
