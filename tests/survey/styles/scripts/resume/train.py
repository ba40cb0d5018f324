import argparse
import glob
import logging
import os
import shutil
import sys

import torch
import torch.nn as nn
import torch.optim as optim
from torch.utils.data import DataLoader, TensorDataset

logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[logging.FileHandler("train.log"), logging.StreamHandler(sys.stdout)])
logger = logging.getLogger(__name__)


def get_args():
    p = argparse.ArgumentParser()
    p.add_argument("--resume", default="", type=str)
    p.add_argument("--epochs", default=2, type=int)
    p.add_argument("--start-epoch", default=0, type=int)
    p.add_argument("-e", "--evaluate", action="store_true")
    p.add_argument("--ckpt-dir", default="ckpt")
    return p.parse_args()


best_acc1 = 0


class AverageMeter(object):
    def __init__(self, name, fmt=":f"):
        self.name, self.fmt = name, fmt
        self.reset()

    def reset(self):
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count

    def __str__(self):
        return ("{name} {val" + self.fmt + "} ({avg" + self.fmt + "})").format(**self.__dict__)


class ProgressMeter(object):
    def __init__(self, n, meters, prefix=""):
        self.n, self.meters, self.prefix = n, meters, prefix

    def display(self, batch):
        entries = [self.prefix + f"[{batch}/{self.n}]"]
        entries += [str(m) for m in self.meters]
        print("\t".join(entries))


def accuracy(output, target, topk=(1,)):
    with torch.no_grad():
        maxk = max(topk)
        bs = target.size(0)
        _, pred = output.topk(maxk, 1, True, True)
        pred = pred.t()
        correct = pred.eq(target.view(1, -1).expand_as(pred))
        res = []
        for k in topk:
            correct_k = correct[:k].reshape(-1).float().sum(0, keepdim=True)
            res.append(correct_k.mul_(100.0 / bs))
        return res


def train(loader, model, criterion, optimizer, epoch):
    losses = AverageMeter("Loss", ":.4e")
    top1 = AverageMeter("Acc@1", ":6.2f")
    progress = ProgressMeter(len(loader), [losses, top1], prefix="Epoch: [{}]".format(epoch))
    model.train()
    for i, (images, target) in enumerate(loader):
        output = model(images)
        loss = criterion(output, target)
        acc1, acc2 = accuracy(output, target, topk=(1, 2))
        losses.update(loss.item(), images.size(0))
        top1.update(acc1[0], images.size(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 2 == 0:
            progress.display(i)


def validate(loader, model, criterion):
    losses = AverageMeter("Loss", ":.4e")
    top1 = AverageMeter("Acc@1", ":6.2f")
    model.eval()
    with torch.no_grad():
        for i, (images, target) in enumerate(loader):
            output = model(images)
            loss = criterion(output, target)
            acc1, _ = accuracy(output, target, topk=(1, 2))
            losses.update(loss.item(), images.size(0))
            top1.update(acc1[0], images.size(0))
    print(" * Acc@1 {top1.avg:.3f}".format(top1=top1))
    return top1.avg


def save_checkpoint(state, is_best, d):
    f = os.path.join(d, f"checkpoint_{state['epoch']}.pth.tar")
    torch.save(state, f)
    if is_best:
        shutil.copyfile(f, os.path.join(d, "model_best.pth.tar"))
    old = sorted(glob.glob(os.path.join(d, "checkpoint_*.pth.tar")))
    for x in old[:-2]:
        os.remove(x)


def main():
    global best_acc1
    args = get_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    os.makedirs(args.ckpt_dir, exist_ok=True)
    if args.resume:
        if os.path.isfile(args.resume):
            logger.info("=> loading checkpoint '{}'".format(args.resume))
            ck = torch.load(args.resume, weights_only=False)
            args.start_epoch = ck["epoch"]
            best_acc1 = ck["best_acc1"]
            model.load_state_dict(ck["state_dict"])
            optimizer.load_state_dict(ck["optimizer"])
            scheduler.load_state_dict(ck["scheduler"])
        else:
            logger.info("=> no checkpoint found at '{}'".format(args.resume))
    g = torch.Generator().manual_seed(2)
    x = torch.randn(60, 5, generator=g)
    y = x[:, :3].argmax(1)
    train_loader = DataLoader(TensorDataset(x[:48], y[:48]), batch_size=8, shuffle=False, num_workers=0, pin_memory=False)
    val_loader = DataLoader(TensorDataset(x[48:], y[48:]), batch_size=5, shuffle=False)
    if args.evaluate:
        validate(val_loader, model, criterion)
        return
    for epoch in range(args.start_epoch, args.epochs):
        train(train_loader, model, criterion, optimizer, epoch)
        acc1 = validate(val_loader, model, criterion)
        scheduler.step()
        is_best = acc1 > best_acc1
        best_acc1 = max(acc1, best_acc1)
        logger.info(f"epoch {epoch} best {float(best_acc1):.2f}")
        save_checkpoint({"epoch": epoch + 1, "state_dict": model.state_dict(), "best_acc1": best_acc1,
                         "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, is_best, args.ckpt_dir)


if __name__ == "__main__":
    main()
