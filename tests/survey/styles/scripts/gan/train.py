import os

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(0)


class Points(Dataset):
    def __init__(self, n):
        self.x = torch.randn(n, 2, generator=torch.Generator().manual_seed(3)) * 0.3 + 1

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


class Generator(nn.Module):
    def __init__(self, z):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(z, 16), nn.LeakyReLU(0.2), nn.Linear(16, 2))

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Sigmoid())

    def forward(self, x):
        return self.net(x).view(-1)


G, D = Generator(4), Discriminator()
optG = torch.optim.Adam(G.parameters(), lr=2e-3, betas=(0.5, 0.999))
optD = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.5, 0.999))
criterion = nn.BCELoss()
fixed = torch.randn(8, 4)
loader = DataLoader(Points(48), batch_size=12, shuffle=True, drop_last=True)
G_losses, D_losses = [], []
os.makedirs("samples", exist_ok=True)
for epoch in range(3):
    for i, real in enumerate(loader):
        b = real.size(0)
        ones = torch.full((b,), 1.0)
        zeros = torch.zeros(b)
        D.zero_grad()
        out = D(real)
        errD_real = criterion(out, ones)
        errD_real.backward()
        D_x = out.mean().item()
        noise = real.repeat(1, 2).tanh()
        fake = G(noise)
        out = D(fake.detach())
        errD_fake = criterion(out, zeros)
        errD_fake.backward()
        D_G_z1 = out.mean().item()
        errD = errD_real + errD_fake
        optD.step()
        G.zero_grad()
        out = D(fake)
        errG = criterion(out, ones)
        errG.backward()
        optG.step()
        G_losses.append(errG.item())
        D_losses.append(errD.item())
        if i % 2 == 0:
            print("[%d/%d][%d/%d] Loss_D: %.4f Loss_G: %.4f D(x): %.4f" % (epoch, 3, i, len(loader), errD.item(), errG.item(), D_x))
    with torch.no_grad():
        s = G(fixed).detach().cpu()
    torch.save(s, f"samples/{epoch}.pt")
torch.save(G.state_dict(), "G.pth")
torch.save(D.state_dict(), "D.pth")
torch.save({"g": G_losses, "d": D_losses}, "losses.pt")
