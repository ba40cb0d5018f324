import argparse
import json
import math
import random
import time

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset


class Tagger(nn.Module):
    def __init__(self, v=20, d=12, k=4):
        super().__init__()
        self.emb = nn.Embedding(v, d)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 24, dropout=0.0, batch_first=True), 2)
        self.cls = nn.Linear(d, k)

    def forward(self, ids, labels=None):
        logits = self.cls(self.enc(self.emb(ids))[:, 0])
        loss = nn.CrossEntropyLoss()(logits, labels) if labels is not None else None
        return (loss, logits) if loss is not None else (logits,)


def evaluate(args, model, loader):
    eval_loss, steps = 0.0, 0
    preds, out_labels = None, None
    for batch in loader:
        model.eval()
        with torch.no_grad():
            loss, logits = model(*batch)[:2]
            eval_loss += loss.mean().item()
        steps += 1
        if preds is None:
            preds = logits.detach().cpu().numpy()
            out_labels = batch[1].numpy()
        else:
            preds = np.append(preds, logits.detach().cpu().numpy(), axis=0)
            out_labels = np.append(out_labels, batch[1].numpy(), axis=0)
    preds = np.argmax(preds, axis=1)
    return {"eval_loss": eval_loss / steps, "acc": float((preds == out_labels).mean())}


def train(args, ds, model, ev):
    sampler = RandomSampler(ds)
    loader = DataLoader(ds, sampler=sampler, batch_size=args.bs)
    t_total = len(loader) // args.accum * args.epochs
    no_decay = ["bias", "norm"]
    groups = [{"params": [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)], "weight_decay": 0.01},
              {"params": [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)], "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=5e-3)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: max(0.0, 1 - s / max(1, t_total)))
    scaler = torch.cuda.amp.GradScaler(enabled=torch.cuda.is_available())
    step, tr_loss, logging_loss = 0, 0.0, 0.0
    model.zero_grad()
    for ep in range(args.epochs):
        for i, batch in enumerate(loader):
            model.train()
            with torch.autocast("cpu", enabled=False):
                loss = model(batch[0], batch[1])[0]
            if args.accum > 1:
                loss = loss / args.accum
            scaler.scale(loss).backward()
            tr_loss += loss.item()
            if (i + 1) % args.accum == 0:
                scaler.unscale_(opt)
                norm = clip_grad_norm_(model.parameters(), args.max_norm)
                scaler.step(opt)
                scaler.update()
                sched.step()
                model.zero_grad()
                step += 1
                if args.log > 0 and step % args.log == 0:
                    print(json.dumps({"step": step, "loss": round((tr_loss - logging_loss) / args.log, 5), "lr": sched.get_last_lr()[0], "norm": round(float(norm), 4)}))
                    logging_loss = tr_loss
        print("eval", {k: round(v, 4) for k, v in evaluate(args, model, ev).items()})
    return step, tr_loss / step


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--bs", type=int, default=6)
    p.add_argument("--accum", type=int, default=2)
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--log", type=int, default=2)
    p.add_argument("--max_norm", type=float, default=1.0)
    args = p.parse_args()
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    x = torch.randint(20, (60, 5))
    ds = TensorDataset(x[:48], x[:48, 0] % 4)
    ev = DataLoader(TensorDataset(x[48:], x[48:, 0] % 4), sampler=SequentialSampler(x[48:]), batch_size=5)
    model = Tagger()
    step, loss = train(args, ds, model, ev)
    print("global_step = %s, average loss = %s" % (step, round(loss, 5)))
    model_to_save = model.module if hasattr(model, "module") else model
    torch.save(model_to_save.state_dict(), "pytorch_model.bin")
    torch.save(vars(args), "training_args.bin")


if __name__ == "__main__":
    main()
