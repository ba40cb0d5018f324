import copy
import json
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Pairs(Dataset):
    def __init__(self, n=48):
        g = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(1, 20, (n, 3), generator=g)
        self.chosen = torch.randint(1, 20, (n, 5), generator=g)
        self.rejected = torch.randint(1, 20, (n, 5), generator=g)

    def __len__(self):
        return len(self.prompt)

    def __getitem__(self, i):
        return {"chosen": torch.cat([self.prompt[i], self.chosen[i]]), "rejected": torch.cat([self.prompt[i], self.rejected[i]])}


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln = nn.LayerNorm(d)
        self.fc = nn.Linear(d, d)
        self.gate = nn.Linear(d, d)

    def forward(self, x):
        h = self.ln(x)
        cum = torch.cumsum(h, 1) / torch.arange(1, h.size(1) + 1).view(1, -1, 1)
        return x + torch.tanh(self.fc(cum)) * torch.sigmoid(self.gate(h))


class LM(nn.Module):
    def __init__(self, v=20, d=16, depth=2):
        super().__init__()
        self.emb = nn.Embedding(v, d)
        self.blocks = nn.ModuleList([Block(d) for _ in range(depth)])
        self.head = nn.Linear(d, v, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids)
        for b in self.blocks:
            x = b(x)
        return self.head(x)


def logps(model, ids):
    logits = model(ids[:, :-1]).log_softmax(-1)
    return logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)[:, 2:].sum(-1)


def main():
    torch.manual_seed(3)
    policy = LM()
    reference = copy.deepcopy(policy)
    reference.eval()
    for p in reference.parameters():
        p.requires_grad_(False)
    opt = torch.optim.AdamW(policy.parameters(), lr=3e-3, eps=1e-4, weight_decay=0.0)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1, (s + 1) / 4))
    loader = DataLoader(Pairs(), batch_size=12, shuffle=True)
    beta, log = 0.3, []
    for epoch in range(3):
        stats = {"loss": 0.0, "margin": 0.0, "acc": 0.0}
        for n, batch in enumerate(loader):
            pc, pr = logps(policy, batch["chosen"]), logps(policy, batch["rejected"])
            with torch.no_grad():
                rc, rr = logps(reference, batch["chosen"]), logps(reference, batch["rejected"])
            logits = beta * ((pc - pr) - (rc - rr))
            loss = -F.logsigmoid(logits).mean()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            opt.step()
            sched.step()
            opt.zero_grad(set_to_none=True)
            margin = (beta * (pc - rc) - beta * (pr - rr)).detach().mean()
            acc = (logits > 0).float().mean()
            stats["loss"] += loss.item()
            stats["margin"] += margin.item()
            stats["acc"] += acc.item()
            log.append({"epoch": epoch, "loss": loss.item(), "margin": margin.item(), "grad_norm": grad_norm.item(), "lr": sched.get_last_lr()[0]})
        print({k: round(v / (n + 1), 4) for k, v in stats.items()})
        if epoch == 1:
            reference.load_state_dict(policy.state_dict())
    with open("log.json", "w") as f:
        json.dump(log, f)
    torch.save({"policy": policy.state_dict(), "reference": reference.state_dict()}, "dpo.pt")


main()
