import copy
import math
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)])
        self.out = nn.Linear(8, 4)
        self.register_buffer("center", torch.zeros(1, 4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_temp = nn.Parameter(torch.tensor(math.log(0.5)))

    def forward(self, student, teacher):
        return -(F.softmax(teacher / 0.4, -1) * F.log_softmax(student * self.log_temp.exp(), -1)).sum(-1).mean()


class Trainer:
    def __init__(self, cfg):
        self.cfg = cfg
        torch.manual_seed(cfg["seed"])
        self.student, self.criterion = Net(), Loss()
        self.teacher = copy.deepcopy(self.student)
        for p in self.teacher.parameters():
            p.requires_grad = False
        x = torch.randn(48, 8)
        self.loader = DataLoader(TensorDataset(x, x + 0.05 * torch.randn_like(x)), batch_size=12, shuffle=True)
        self.opt = torch.optim.AdamW([{"params": self.student.parameters()}, {"params": self.criterion.parameters(), "lr": 1e-2, "weight_decay": 0.0}], lr=2e-3, eps=1e-4)
        self.best, self.bad, self.global_step = float("inf"), 0, 0
        self.history = {"loss": [], "entropy": []}

    @torch.no_grad()
    def update_teacher(self):
        m = 0.9 + 0.1 * self.global_step / 100
        for t, s in zip(self.teacher.parameters(), self.student.parameters()):
            t.data.mul_(m).add_((1 - m) * s.detach().data)

    def step(self, a, b):
        s = self.student(a)
        with torch.no_grad():
            t = self.teacher(b)
        loss = self.criterion(s, t)
        if not math.isfinite(loss.item()):
            return None
        self.opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.student.parameters()) + list(self.criterion.parameters()), 1.0)
        self.opt.step()
        self.update_teacher()
        self.global_step += 1
        return loss.item()

    def fit(self):
        for epoch in range(self.cfg["epochs"]):
            for g in self.opt.param_groups:
                g["lr"] = g["lr"] * 0.8
            total, count = 0.0, 0
            for a, b in self.loader:
                value = self.step(a, b)
                if value is None:
                    continue
                total += value * a.size(0)
                count += a.size(0)
            mean = total / count
            self.history["loss"].append(mean)
            print(f"epoch {epoch}: {mean:.4f} temp {self.criterion.log_temp.exp().item():.4f}")
            if mean < self.best:
                self.best, self.bad = mean, 0
                self.save("best.pt")
            else:
                self.bad += 1
                if self.bad > 1:
                    break

    def save(self, path):
        torch.save({"student": self.student.state_dict(), "teacher": self.teacher.state_dict(), "criterion": self.criterion.state_dict(), "opt": self.opt.state_dict(), "history": self.history, "best": self.best}, path)

    def load(self, path):
        state = torch.load(path)
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.criterion.load_state_dict(state["criterion"])
        self.opt.load_state_dict(state["opt"])
        self.best = state["best"]


if __name__ == "__main__":
    trainer = Trainer({"seed": 5, "epochs": 3})
    trainer.fit()
    trainer.load("best.pt")
    trainer.cfg["epochs"] = 2
    trainer.fit()
    trainer.save("last.pt")
