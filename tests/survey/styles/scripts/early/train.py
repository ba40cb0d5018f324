import argparse
import os
import random
import shutil

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from utils import EarlyStopping, set_seed, save_checkpoint


class Series(Dataset):
    def __init__(self, flag, seq=8, pred=2):
        t = np.arange(120)
        self.x = np.sin(t / 5).astype("float32") + np.cos(t / 3).astype("float32")
        self.seq, self.pred = seq, pred
        b = {"train": (0, 80), "val": (72, 100), "test": (92, 120)}[flag]
        self.x = self.x[b[0]:b[1]]

    def __len__(self):
        return len(self.x) - self.seq - self.pred + 1

    def __getitem__(self, i):
        return self.x[i:i + self.seq], self.x[i + self.seq:i + self.seq + self.pred]


def data_provider(args, flag):
    shuffle = flag == "train"
    ds = Series(flag)
    return ds, DataLoader(ds, batch_size=args.batch_size, shuffle=shuffle, drop_last=flag != "test")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1 = nn.Linear(8, 16)
        self.l2 = nn.Linear(16, 2)

    def forward(self, x):
        return self.l2(torch.relu(self.l1(x)))


class Exp:
    def __init__(self, args):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = Model().float().to(self.device)

    def _select_optimizer(self):
        return torch.optim.Adam(self.model.parameters(), lr=self.args.lr)

    def vali(self, loader, criterion):
        total_loss = []
        self.model.eval()
        with torch.no_grad():
            for bx, by in loader:
                out = self.model(bx.float().to(self.device))
                pred, true = out.detach().cpu(), by.detach().cpu()
                total_loss.append(criterion(pred, true))
        self.model.train()
        return np.average(total_loss)

    def train(self):
        _, train_loader = data_provider(self.args, "train")
        _, vali_loader = data_provider(self.args, "val")
        path = os.path.join(self.args.checkpoints, "m")
        if not os.path.exists(path):
            os.makedirs(path)
        early = EarlyStopping(patience=self.args.patience, verbose=True)
        opt = self._select_optimizer()
        crit = nn.MSELoss()
        for epoch in range(self.args.epochs):
            it, train_loss = 0, []
            for i, (bx, by) in enumerate(train_loader):
                it += 1
                opt.zero_grad()
                out = self.model(bx.float().to(self.device))
                loss = crit(out, by.to(self.device))
                train_loss.append(loss.item())
                if (i + 1) % 3 == 0:
                    print("\titers: {0}, epoch: {1} | loss: {2:.7f}".format(i + 1, epoch + 1, loss.item()))
                loss.backward()
                opt.step()
            train_loss = np.average(train_loss)
            vl = self.vali(vali_loader, crit)
            print("Epoch: {0}, Steps: {1} | Train Loss: {2:.6f} Vali Loss: {3:.6f}".format(epoch + 1, it, train_loss, vl))
            early(vl, self.model, path)
            if early.early_stop:
                print("Early stopping")
                break
        best = path + "/" + "checkpoint.pth"
        self.model.load_state_dict(torch.load(best))
        return self.model

    def test(self):
        _, loader = data_provider(self.args, "test")
        preds, trues = [], []
        self.model.eval()
        with torch.no_grad():
            for bx, by in loader:
                preds.append(self.model(bx.float()).detach().cpu().numpy())
                trues.append(by.numpy())
        preds, trues = np.concatenate(preds), np.concatenate(trues)
        folder = "./results/"
        if not os.path.exists(folder):
            os.makedirs(folder)
        mse = np.mean((preds - trues) ** 2)
        print("mse:{}".format(mse))
        f = open("result.txt", "a")
        f.write("exp  \n")
        f.write("mse:{:.4f}".format(mse))
        f.write("\n")
        f.close()
        np.save(folder + "pred.npy", preds)
        np.save(folder + "true.npy", trues)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--patience", type=int, default=1)
    parser.add_argument("--checkpoints", default="./checkpoints/")
    args = parser.parse_args()
    set_seed(2021)
    exp = Exp(args)
    print(">>>>start training")
    exp.train()
    exp.test()
    torch.cuda.empty_cache()
