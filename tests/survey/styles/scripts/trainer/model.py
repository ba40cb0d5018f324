from torch import nn


class Net(nn.Module):
    def __init__(self, i, h, o):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(i, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU())
        self.head = nn.Linear(h, o)

    def forward(self, x):
        return self.head(self.body(x))
