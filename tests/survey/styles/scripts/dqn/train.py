import random
from collections import deque, namedtuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

Transition = namedtuple("Transition", ("s", "a", "s2", "r"))
random.seed(0); np.random.seed(0); torch.manual_seed(0)


class ReplayMemory:
    def __init__(self, n):
        self.memory = deque([], maxlen=n)

    def push(self, *a):
        self.memory.append(Transition(*a))

    def sample(self, k):
        return random.sample(self.memory, k)

    def __len__(self):
        return len(self.memory)


class DQN(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1 = nn.Linear(4, 16)
        self.l2 = nn.Linear(16, 2)

    def forward(self, x):
        return self.l2(F.relu(self.l1(x)))


policy_net, target_net = DQN(), DQN()
target_net.load_state_dict(policy_net.state_dict())
optimizer = torch.optim.AdamW(policy_net.parameters(), lr=1e-2, amsgrad=True)
memory = ReplayMemory(1000)
rewards = []


def select(s, eps):
    if random.random() > eps:
        with torch.no_grad():
            return policy_net(s).max(1).indices.view(1, 1)
    return torch.tensor([[random.randrange(2)]])


def optimize():
    if len(memory) < 8:
        return None
    batch = Transition(*zip(*memory.sample(8)))
    s, a, r, s2 = torch.cat(batch.s), torch.cat(batch.a), torch.cat(batch.r), torch.cat(batch.s2)
    q = policy_net(s).gather(1, a)
    with torch.no_grad():
        nxt = target_net(s2).max(1).values
    loss = nn.SmoothL1Loss()(q, (nxt * 0.9 + r).unsqueeze(1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_value_(policy_net.parameters(), 100)
    optimizer.step()
    return loss.item()


for ep in range(3):
    s = torch.randn(1, 4)
    tot, ls = 0, []
    for t in range(10):
        a = select(s, 0.3)
        r = float((s[0, 0] > 0) == bool(a))
        s2 = torch.randn(1, 4)
        memory.push(s, a, s2, torch.tensor([r]))
        s = s2
        l = optimize()
        if l is not None:
            ls.append(l)
        td, pd = target_net.state_dict(), policy_net.state_dict()
        for key in pd:
            td[key] = pd[key] * 0.05 + td[key] * 0.95
        target_net.load_state_dict(td)
        tot += r
    rewards.append(tot)
    print(ep, tot, round(float(np.mean(ls)), 5) if ls else None)
torch.save(policy_net.state_dict(), "dqn.pt")
np.savetxt("rewards.txt", rewards)
