from pathlib import Path

import numpy as np
import torch


class AverageMeter:
    def __init__(self):
        self.sum = 0.0
        self.n = 0

    def update(self, v, n=1):
        self.sum += v * n
        self.n += n

    @property
    def avg(self):
        return self.sum / max(self.n, 1)


class Trainer:
    def __init__(self, model, optimizer, scheduler, criterion, out):
        self.model, self.optimizer, self.scheduler, self.criterion = model, optimizer, scheduler, criterion
        self.out = Path(out)
        self.out.mkdir(parents=True)
        self.history = []
        self.best = 0.0

    def train_epoch(self, loader):
        self.model.train()
        losses, accs = AverageMeter(), AverageMeter()
        for inputs, targets in loader:
            self.optimizer.zero_grad()
            out = self.model(inputs)
            loss = self.criterion(out, targets)
            loss.backward()
            self.optimizer.step()
            acc = (out.argmax(1) == targets).float().mean()
            losses.update(loss.item(), inputs.size(0))
            accs.update(acc.item(), inputs.size(0))
        return losses.avg, accs.avg

    @torch.no_grad()
    def validate(self, loader):
        self.model.eval()
        losses, correct, total = AverageMeter(), 0, 0
        for inputs, targets in loader:
            out = self.model(inputs)
            losses.update(self.criterion(out, targets).item(), inputs.size(0))
            correct += (out.argmax(1) == targets).sum().item()
            total += targets.size(0)
        return losses.avg, correct / total

    def fit(self, train, val, epochs):
        for epoch in range(epochs):
            tl, ta = self.train_epoch(train)
            vl, va = self.validate(val)
            self.scheduler.step(vl)
            print(f"Epoch {epoch}: train {tl:.4f}/{ta:.3f} val {vl:.4f}/{va:.3f}")
            self.history.append({"epoch": epoch, "train_loss": tl, "train_acc": ta, "val_loss": vl, "val_acc": va})
            if va > self.best:
                self.best = va
                self.save("best.pt", epoch)
            self.save("last.pt", epoch)

    def save(self, name, epoch):
        torch.save({"epoch": epoch, "state": self.model.state_dict(), "opt": self.optimizer.state_dict(), "sched": self.scheduler.state_dict()}, self.out / name)

    def confusion(self, loader, k):
        preds, labels = [], []
        self.model.eval()
        with torch.no_grad():
            for x, y in loader:
                preds.append(self.model(x).argmax(1).cpu().numpy())
                labels.append(y.numpy())
        preds, labels = np.concatenate(preds), np.concatenate(labels)
        cm = np.zeros((k, k), dtype=int)
        for t, p in zip(labels, preds):
            cm[t, p] += 1
        print(cm.trace(), "of", cm.sum())
        return cm
