import random
import time

import torch
import torch.nn as nn
from torch import optim

SOS, EOS, V, MAXL = 0, 1, 12, 6
random.seed(0)
torch.manual_seed(0)


class EncoderRNN(nn.Module):
    def __init__(self, v, h):
        super().__init__()
        self.h = h
        self.emb = nn.Embedding(v, h)
        self.gru = nn.GRU(h, h)

    def forward(self, x, hid):
        return self.gru(self.emb(x).view(1, 1, -1), hid)

    def initHidden(self):
        return torch.zeros(1, 1, self.h)


class DecoderRNN(nn.Module):
    def __init__(self, h, v):
        super().__init__()
        self.emb = nn.Embedding(v, h)
        self.gru = nn.GRU(h, h)
        self.out = nn.Linear(h, v)
        self.sm = nn.LogSoftmax(dim=1)

    def forward(self, x, hid):
        o, hid = self.gru(torch.relu(self.emb(x).view(1, 1, -1)), hid)
        return self.sm(self.out(o[0])), hid


pairs = []
for _ in range(30):
    s = [random.randint(2, V - 1) for _ in range(random.randint(2, MAXL - 1))]
    pairs.append((s + [EOS], s[::-1] + [EOS]))


def tensors(p):
    return torch.tensor(p[0]).view(-1, 1), torch.tensor(p[1]).view(-1, 1)


def train(inp, tgt, enc, dec, eo, do, crit):
    hid = enc.initHidden()
    eo.zero_grad()
    do.zero_grad()
    loss = 0
    for i in range(inp.size(0)):
        _, hid = enc(inp[i], hid)
    d = torch.tensor([[SOS]])
    if random.random() < 0.5:
        for i in range(tgt.size(0)):
            o, hid = dec(d, hid)
            loss += crit(o, tgt[i])
            d = tgt[i]
    else:
        for i in range(tgt.size(0)):
            o, hid = dec(d, hid)
            d = o.topk(1)[1].squeeze().detach()
            loss += crit(o, tgt[i])
            if d.item() == EOS:
                break
    loss.backward()
    eo.step()
    do.step()
    return loss.item() / tgt.size(0)


def trainIters(enc, dec, n, every=5):
    plot, tot = [], 0
    eo, do = optim.SGD(enc.parameters(), lr=0.01), optim.SGD(dec.parameters(), lr=0.01)
    tp = [tensors(random.choice(pairs)) for _ in range(n)]
    crit = nn.NLLLoss()
    for it in range(1, n + 1):
        a, b = tp[it - 1]
        tot += train(a, b, enc, dec, eo, do, crit)
        if it % every == 0:
            print("%d %.4f" % (it, tot / every))
            plot.append(tot / every)
            tot = 0
    torch.save(plot, "plot.pt")


enc, dec = EncoderRNN(V, 8), DecoderRNN(8, V)
trainIters(enc, dec, 20)
