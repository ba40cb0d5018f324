import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(48, 8)
noise = torch.randn(48, 8)
loader = DataLoader(TensorDataset(x, noise), batch_size=12, shuffle=True)


class G(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, z):
        return self.net(z)


class D(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x)


gen, disc = G(), D()
opt_g = torch.optim.Adam(gen.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-4)
opt_d = torch.optim.Adam(disc.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-4)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
for epoch in range(3):
    for real, z in loader:
        opt_d.zero_grad()
        with torch.autocast("cpu", enabled=False):
            fake = gen(z)
            out = disc(real)
            d_loss = F.binary_cross_entropy_with_logits(out, torch.ones_like(out))
            out = disc(fake.detach())
            d_loss = d_loss + F.binary_cross_entropy_with_logits(out, torch.zeros_like(out))
        scaler.scale(d_loss).backward()
        scaler.step(opt_d)
        opt_g.zero_grad()
        out = disc(fake)
        g_loss = F.binary_cross_entropy_with_logits(out, torch.ones_like(out))
        scaler.scale(g_loss).backward()
        scaler.step(opt_g)
        scaler.update()
        print(f"{d_loss.item():.4f} {g_loss.item():.4f}")
torch.save({"g": gen.state_dict(), "d": disc.state_dict()}, "gan.pt")
