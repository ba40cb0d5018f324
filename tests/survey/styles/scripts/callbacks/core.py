import csv

import torch


class Callback:
    def before_fit(self, learn): pass
    def after_batch(self, learn): pass
    def after_epoch(self, learn): pass


class History(Callback):
    def before_fit(self, learn):
        self.train, self.valid = [], []

    def after_batch(self, learn):
        if learn.training:
            self.train.append(learn.loss.item())

    def after_epoch(self, learn):
        self.valid.append(learn.valid_loss)


class CSVLogger(Callback):
    def __init__(self, path):
        self.path = path

    def before_fit(self, learn):
        self.file = open(self.path, "w")
        self.writer = csv.writer(self.file)
        self.writer.writerow(["epoch", "train", "valid"])

    def after_epoch(self, learn):
        self.writer.writerow([learn.epoch, f"{learn.train_loss:.5f}", f"{learn.valid_loss:.5f}"])
        self.file.flush()
        print(f"{learn.epoch} train={learn.train_loss:.4f} valid={learn.valid_loss:.4f}")


class Checkpoint(Callback):
    def __init__(self, path):
        self.path, self.best = path, float("inf")

    def after_epoch(self, learn):
        if learn.valid_loss < self.best:
            self.best = learn.valid_loss
            torch.save(learn.model.state_dict(), self.path)


class EarlyStop(Callback):
    def __init__(self, patience):
        self.patience, self.best, self.wait = patience, float("inf"), 0

    def after_epoch(self, learn):
        if learn.valid_loss < self.best - 1e-4:
            self.best, self.wait = learn.valid_loss, 0
        else:
            self.wait += 1
            if self.wait >= self.patience:
                learn.stop = True


class Learner:
    def __init__(self, model, loss_func, opt, train, valid, cbs=()):
        self.model, self.loss_func, self.opt = model, loss_func, opt
        self.dls = {"train": train, "valid": valid}
        self.cbs = list(cbs)
        self.stop = False

    def __call__(self, name):
        for cb in self.cbs:
            getattr(cb, name)(self)

    def one_batch(self, batch):
        x, y = batch
        self.pred = self.model(x)
        self.loss = self.loss_func(self.pred, y)
        if self.training:
            self.loss.backward()
            self.opt.step()
            self.opt.zero_grad()
        self("after_batch")

    def one_epoch(self, train):
        self.training = train
        self.model.train(train)
        total, n = 0.0, 0
        for batch in self.dls["train" if train else "valid"]:
            self.one_batch(batch)
            total += self.loss.item() * len(batch[0])
            n += len(batch[0])
        return total / n

    def fit(self, epochs):
        self("before_fit")
        for self.epoch in range(epochs):
            self.train_loss = self.one_epoch(True)
            with torch.no_grad():
                self.valid_loss = self.one_epoch(False)
            self("after_epoch")
            if self.stop:
                print("stopped")
                break
