from core import Learner, CSVLogger, Checkpoint, EarlyStop, History
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def get_data(bs):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = (x * torch.tensor([1.0, -1.0, 0.5, 2.0])).sum(1, keepdim=True)
    tr, va = TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])
    return DataLoader(tr, bs, shuffle=True), DataLoader(va, bs * 2)


if __name__ == "__main__":
    torch.manual_seed(11)
    train, valid = get_data(8)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    hist = History()
    learn = Learner(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.05), train, valid,
                    cbs=[hist, CSVLogger("log.csv"), Checkpoint("best.pth"), EarlyStop(2)])
    learn.fit(5)
    print("final", [round(v, 4) for v in hist.valid])
    torch.save({"train": hist.train, "valid": hist.valid}, "hist.pt")
