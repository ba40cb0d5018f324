import os
from dataclasses import asdict, dataclass
import json

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, random_split, TensorDataset
from tqdm import tqdm


@dataclass
class Args:
    epochs: int = 2
    bs: int = 8
    T: float = 2.0
    alpha: float = 0.7
    out: str = "kd"


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x):
        return self.f(x)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 3)

    def forward(self, x):
        return self.f(x)


def fit_one(model, loader, opt, teacher=None, args=None):
    model.train()
    total = 0
    for x, y in tqdm(loader):
        opt.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        if teacher is not None:
            with torch.no_grad():
                t = teacher(x)
            kd = F.kl_div(F.log_softmax(out / args.T, 1), F.softmax(t / args.T, 1), reduction="batchmean") * args.T ** 2
            loss = args.alpha * kd + (1 - args.alpha) * loss
        loss.backward()
        opt.step()
        total += loss.item()
    return total / len(loader)


def accuracy(model, loader):
    model.eval()
    hit = n = 0
    with torch.no_grad():
        for x, y in loader:
            hit += model(x).argmax(1).eq(y).sum().item()
            n += len(y)
    return 100 * hit / n


def main(args):
    torch.manual_seed(7)
    if not os.path.isdir(args.out):
        os.mkdir(args.out)
    x = torch.randn(60, 6)
    y = x[:, :3].argmax(1)
    tr, te = random_split(TensorDataset(x, y), [48, 12])
    train, test = DataLoader(tr, args.bs, shuffle=True), DataLoader(te, 5)
    teacher = Teacher()
    opt = torch.optim.Adam(teacher.parameters(), 1e-2)
    for e in range(args.epochs):
        print("teacher", e, round(fit_one(teacher, train, opt), 4), accuracy(teacher, test))
    torch.save(teacher.state_dict(), f"{args.out}/teacher.pt")
    teacher2 = Teacher()
    teacher2.load_state_dict(torch.load(f"{args.out}/teacher.pt", map_location="cpu"))
    teacher2.eval()
    for p in teacher2.parameters():
        p.requires_grad = False
    student = Student()
    opt = torch.optim.SGD(student.parameters(), 0.1)
    best = 0
    for e in range(args.epochs):
        loss = fit_one(student, train, opt, teacher2, args)
        acc = accuracy(student, test)
        print("student", e, round(loss, 4), acc)
        if acc > best:
            best = acc
            torch.save(student.state_dict(), f"{args.out}/student.pt")
    with open(f"{args.out}/args.json", "w") as f:
        json.dump({**asdict(args), "best": best}, f)


if __name__ == "__main__":
    main(Args())
