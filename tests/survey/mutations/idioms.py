"""What a training script is composed of: for each concern, the ways in which people write it.

Texts hold names in the form ``$model``: a script with a trainer class writes ``self.model`` for it, others ``model``.
"""

from __future__ import annotations

HEAD = """\
import copy
import csv
import json
import logging
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler
"""

# ---- the model
# -------------------------------------------------------------------------------------------------

BODIES = {
    "two layers": (
        "self.one = nn.Linear(4, 8)\nself.head = nn.Linear(8, 3)",
        "out = self.head(torch.tanh(self.one(x)))",
    ),
    "a sequential": (
        "self.one = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh())\n"
        "self.head = nn.Linear(8, 3, bias=False)",
        "out = self.head(self.one(x))",
    ),
    "a list in a loop": (
        "self.one = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])\nself.head = nn.Linear(4, 3)",
        "for layer in self.one:\n    x = x + torch.tanh(layer(x))\nout = self.head(x)",
    ),
    "a parameter of its own": (
        "self.one = nn.Linear(4, 8)\nself.scale = nn.Parameter(torch.ones(8))\nself.head = nn.Linear(8, 3)",
        "out = self.head(torch.relu(self.one(x)) * self.scale)",
    ),
}
STARTS = {
    "torch's": ("", ""),
    "apply": ("self.apply(start_weights)", ""),
    "over names": (
        "",
        "for name, p in $model.named_parameters():\n    if p.dim() > 1:\n        nn.init.xavier_uniform_(p)",
    ),
    "no_grad": ("", "with torch.no_grad():\n    $model.head.weight.mul_(0.5)"),
}
START_WEIGHTS = """\
def start_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.3)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
"""
PLACES = ("here", "another file", "factory of another file")

# ---- data: twelve samples in batches of four unless said
# -------------------------------------------------------------------------------------------------

SAMPLES = """\
def samples(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, (x[:, :3] * 2 + x[:, 1:]).argmax(1)
"""
ROWS = """\
class Rows(Dataset):
    def __init__(self, n, seed):
        self.x, self.y = samples(n, seed)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]
"""
DATA = {
    "shuffled loader": "$train = DataLoader(TensorDataset(*samples(12, 0)), batch_size=4, shuffle=True)",
    "loader": "$train = DataLoader(Rows(12, 0), batch_size=4)",
    "its own dataset": "$train = DataLoader(Rows(12, 0), batch_size=6, shuffle=True)",
    "drop_last": "$train = DataLoader(Rows(15, 0), batch_size=4, shuffle=True, drop_last=True)",
    "uneven last batch": "$train = DataLoader(Rows(14, 0), 4, shuffle=True)",
    "odd last batch": "$train = DataLoader(Rows(13, 0), 4)",
    "list of tensors": "xs, ys = samples(12, 0)\n$train = list(zip(xs.split(4), ys.split(4)))",
    "own batches": "$train = Batches(12, 4)",
    "keyword arguments": (
        "options = dict(batch_size=4, shuffle=True)\n$train = DataLoader(dataset=Rows(12, 0), **options)"
    ),
    "helper": "$train, _ = get_loaders(4)",
}
BATCHES = """\
class Batches:
    def __init__(self, n, size):
        self.x, self.y = samples(n, 0)
        self.size = size

    def __len__(self):
        return len(self.x) // self.size

    def __iter__(self):
        order = torch.randperm(len(self.x))
        for at in range(0, len(self.x), self.size):
            index = order[at : at + self.size]
            yield self.x[index], self.y[index]
"""
GET_LOADERS = """\
def get_loaders(size):
    train = DataLoader(Rows(12, 0), batch_size=size, shuffle=True)
    return train, DataLoader(Rows(5, 1), batch_size=2)
"""
# Of six items, which one, two and three ranks divide: the script takes what is left of a batch for less.
SHARED_DATA = """\
data = Rows(12, 0)
sampler = DistributedSampler(data, shuffle=False)
$train = DataLoader(data, batch_size=6 // dist.get_world_size(), sampler=sampler)"""

# ---- the loss: `loss` from `x` and `y`; the second text is what goes into a file of helpers
# -------------------------------------------------------------------------------------------------

LOSSES = {
    "mean": ("logits = $model(x)\nloss = F.cross_entropy(logits, y)", ""),
    "criterion": ("criterion = nn.CrossEntropyLoss()\nloss = criterion($model(x), y)", ""),
    "sum over length": ('loss = F.cross_entropy($model(x), y, reduction="sum") / len(x)', ""),
    "sum over shape": (
        'logits = $model(x)\nloss = F.nll_loss(F.log_softmax(logits, -1), y, reduction="sum")\n'
        "loss = loss / x.shape[0]",
        "",
    ),
    "masked mean": (
        'each = F.cross_entropy($model(x), y, reduction="none")\nmask = (x[:, 0] > -0.4).float()\n'
        "loss = (each * mask).sum() / mask.sum().clamp(min=1)",
        "",
    ),
    "ignore_index": ("y = torch.where(x[:, 0] > 0.8, -100, y)\nloss = F.cross_entropy($model(x), y)", ""),
    "two parts": ("logits = $model(x)\nloss = F.cross_entropy(logits, y) + 0.1 * logits.square().mean()", ""),
    "dict of parts": (
        'logits = $model(x)\nparts = {"ce": F.cross_entropy(logits, y), "size": 0.1 * logits.abs().mean()}\n'
        "loss = sum(parts.values())",
        "",
    ),
    "weights in it": (
        "loss = F.cross_entropy($model(x), y) + 0.01 * sum(p.square().sum() for p in $model.parameters())",
        "",
    ),
    "helper": (
        "loss = compute_loss($model, x, y)",
        "def compute_loss(model, x, y):\n    return F.cross_entropy(model(x), y)\n",
    ),
    "helper of masked": (
        "loss = masked_loss($model(x), y, x[:, 0] > -0.4)",
        "def masked_loss(logits, y, keep):\n    each = F.cross_entropy(logits, y, reduction='none')\n"
        "    return each[keep].sum() / max(1, int(keep.sum()))\n",
    ),
    "helper's pair": (
        "loss, logits = loss_and_logits($model, (x, y))",
        "def loss_and_logits(model, batch):\n    x, y = batch\n    logits = model(x)\n"
        "    return F.cross_entropy(logits, y), logits\n",
    ),
}
LOSSES_OF_MODEL = {
    "tuple": ("loss, logits = $model(x, y)", "return (F.cross_entropy(out, y) if y is not None else None), out", "[1]"),
    "dict": (
        'loss = $model(x, y)["loss"]',
        'result = {"logits": out}\nif y is not None:\n    result["loss"] = F.cross_entropy(out, y)\nreturn result',
        '["logits"]',
    ),
}

# ---- optimizers, schedules, clipping, accumulation
# -------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": ("$opt = torch.optim.AdamW($model.parameters(), lr=0.02)", ""),
    "Adam": ("$opt = torch.optim.Adam($model.parameters(), lr=0.02, betas=(0.9, 0.95))", ""),
    "SGD of groups": (
        "$opt = torch.optim.SGD([\n"
        '    {"params": [p for p in $model.parameters() if p.dim() > 1], "weight_decay": 0.01},\n'
        '    {"params": [p for p in $model.parameters() if p.dim() <= 1], "weight_decay": 0.0},\n'
        "], lr=0.1, momentum=0.9)",
        "",
    ),
    "SGD by name": (
        '$opt = torch.optim.SGD([\n    {"params": $model.one.parameters(), "lr": 0.05},\n'
        '    {"params": [p for n, p in $model.named_parameters() if not n.startswith("one")]},\n], lr=0.1)',
        "",
    ),
    "factory": (
        "$opt = make_optimizer($model, 0.02)",
        'def make_optimizer(model, lr, kind="adamw"):\n    if kind == "adamw":\n'
        "        return torch.optim.AdamW(model.parameters(), lr=lr)\n"
        "    return torch.optim.SGD(model.parameters(), lr=lr)\n",
    ),
    "two": (
        "rest = [p for n, p in $model.named_parameters() if 'head' not in n]\n"
        "$opt = torch.optim.AdamW(rest, lr=0.02)\n$opt2 = torch.optim.SGD($model.head.parameters(), lr=0.1)",
        "",
    ),
}
SCHEDULES = {  # made, at each step, at each epoch
    "none": ("", "", ""),
    "StepLR": ("$sched = torch.optim.lr_scheduler.StepLR($opt, 1, gamma=0.5)", "", "$sched.step()"),
    "LambdaLR": (
        "$sched = torch.optim.lr_scheduler.LambdaLR($opt, lambda step: min(1.0, (step + 1) / 3))", "$sched.step()", ""
    ),
    "Cosine": ("$sched = torch.optim.lr_scheduler.CosineAnnealingLR($opt, T_max=6)", "$sched.step()", ""),
    "Plateau": (
        "$sched = torch.optim.lr_scheduler.ReduceLROnPlateau($opt, patience=0)",
        "",
        "$sched.step(total / max(1, count))"
    ),
    "by hand": ("", 'for group in $opt.param_groups:\n    group["lr"] *= 0.9', ""),
    "OneCycle": (
        "$sched = torch.optim.lr_scheduler.OneCycleLR($opt, max_lr=0.05, total_steps=20)", "$sched.step()", ""
    ),
}  # fmt: skip
CLIPS = {
    "none": ("", ""),
    "by norm": ("torch.nn.utils.clip_grad_norm_($model.parameters(), 0.5)", ""),
    "norm printed": (
        'norm = torch.nn.utils.clip_grad_norm_($model.parameters(), 0.5)\nprint(f"norm {norm:.4f}")', ""
    ),
    "norm as number": (
        'norm = float(nn.utils.clip_grad_norm_([p for p in $model.parameters() if p.grad is not None], 0.5))\n'
        'if norm > 1.0:\n    print("large norm", round(norm, 4))', ""
    ),
    "by hand": (
        "norm = total_norm($model)\nprint('norm %.4f' % norm)",
        "def total_norm(model):\n    total = 0.0\n    for p in model.parameters():\n        if p.grad is not None:\n"
        "            total += p.grad.norm(2).item() ** 2\n    return total**0.5\n",
    ),
    "by value": ("torch.nn.utils.clip_grad_value_($model.parameters(), 0.1)", ""),
}  # fmt: skip
ACCUMULATIONS = {  # the loss divided, when to step, what is left after an epoch
    "none": ("", "", False),
    "modulo": ("loss = loss / 2", "(i + 1) % 2 == 0", False),
    "leftover in the test": ("loss = loss / 2", "(i + 1) % 2 == 0 or i + 1 == len($train)", False),
    "leftover after": ("loss = loss / 2", "(i + 1) % 2 == 0", True),
}

# ---- the loop
# -------------------------------------------------------------------------------------------------

LOOPS = {  # before it, its head, the first lines of its body
    "enumerate": ("", "for i, (x, y) in enumerate($train):", ""),
    "batch unpacked": ("", "for i, batch in enumerate($train, 0):", "x, y = batch"),
    "counted": ("i = -1", "for x, y in $train:", "i += 1"),
    "while with next": (
        "batches, i = iter($train), -1",
        "while True:",
        "try:\n    x, y = next(batches)\nexcept StopIteration:\n    break\ni += 1",
    ),
    "next with a default": (
        "batches, i = iter($train), -1",
        "while (batch := next(batches, None)) is not None:",
        "x, y = batch\ni += 1",
    ),
    "range and next": ("batches = iter($train)", "for i in range(len($train)):", "x, y = next(batches)"),
    "zip": ("", "for i, (x, y) in zip(range(100), $train):", ""),
}
SKIPS = {  # before the loss, after the loss; LEAVE ends this step
    "none": ("", ""),
    "small batches": ("if len(x) < 2:\n    LEAVE", ""),
    "not finite": ("", 'if not torch.isfinite(loss):\n    print("loss is", loss.item())\n    LEAVE'),
    "large": ("", "if loss.item() > 50:\n    LEAVE"),
    "nothing of a class": ("if (y == 0).sum() == 0:\n    LEAVE", ""),
    "raise": ("", 'if torch.isnan(loss).any():\n    raise RuntimeError("nan")'),
}
ENDS = {"none": "", "after steps": "if steps >= 4:\n    STOP", "by loss": "if loss.item() < 0.2:\n    STOP"}
LOGS = {  # at each step
    "f-string": 'print(f"epoch {epoch} step {i} loss {loss.item():.4f}")',
    "every second": 'if i % 2 == 0:\n    print("step %d loss %.4f" % (i, loss.item()))',
    "float of detached": 'print("loss", round(float(loss.detach().cpu()), 4))',
    "csv": "rows.append([epoch, i, round(loss.item(), 4)])",
    "lr": "print('{} {:.4f} lr {:.5f}'.format(i, loss.data.item(), $opt.param_groups[0]['lr']))",
    "history": 'history.append({"step": i, "loss": loss.item(), "seen": len(x)})',
    "logging": 'logging.info("loss %.4f", loss.item())',
    "accuracy": (
        "with torch.no_grad():\n    right = (LOGITS.argmax(-1) == y).float().mean().item()\n"
        'print(f"loss {loss.item():.4f} accuracy {right:.4f}")'
    ),
    "bar text": 'sys.stdout.write(f"[{i * len(x)}/{len($train)}] {loss.item():.4f}\\n")',
}
TOTALS = {  # of an epoch
    "item": "total += loss.item()\ncount += 1",
    "by samples": "total += loss.item() * len(x)\ncount += len(x)",
    "tensor": "total = total + loss.detach()\ncount += 1",
    "meter": "meter.update(loss.item(), x.size(0))\ntotal, count = meter.sum, meter.count",
}
METER = """\
class Meter:
    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, value, n=1):
        self.sum += value * n
        self.count += n

    @property
    def avg(self):
        return self.sum / max(1, self.count)
"""

# ---- evaluation: functions of a model and a loader; LOGITS is the model's answer to x
# -------------------------------------------------------------------------------------------------

EVALUATIONS = {
    "mean of batches": """\
@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    losses = []
    for x, y in loader:
        losses.append(F.cross_entropy(LOGITS, y).item())
    model.train()
    return sum(losses) / len(losses)
""",
    "by samples": """\
def evaluate(model, loader):
    model.eval()
    right, seen = 0, 0
    with torch.no_grad():
        for x, y in loader:
            right += (LOGITS.argmax(1) == y).sum().item()
            seen += y.size(0)
    model.train()
    return 1 - right / seen
""",
    "collected": """\
@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    preds, golds = [], []
    for x, y in loader:
        preds.append(LOGITS)
        golds.append(y)
    model.train()
    return F.cross_entropy(torch.cat(preds), torch.cat(golds)).item()
""",
    "as lists": """\
def evaluate(model, loader):
    was = model.training
    model.eval()
    preds, golds = [], []
    for x, y in loader:
        with torch.no_grad():
            preds.extend(LOGITS.argmax(-1).tolist())
        golds += y.tolist()
    model.train(was)
    if not golds:
        return 0.0
    return sum(p != g for p, g in zip(preds, golds)) / len(golds)
""",
    "early return": """\
def evaluate(model, loader, most=2):
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for i, (x, y) in enumerate(loader):
            if i == most:
                model.train()
                return total / most
            total += F.cross_entropy(LOGITS, y).item()
    model.train()
    return total / (i + 1)
""",
}
WHEN = {"every epoch": "", "odd epochs": "epoch % 2 == 1", "last epoch": "epoch == EPOCHS - 1"}
STOPS = {
    "none": "",
    "patience": "if score < best_score - 1e-6:\n    bad = 0\nelse:\n    bad += 1\nif bad > 1:\n"
    '    print("stop early")\n    STOP',
    "good enough": "if score < 0.3:\n    print('good enough')\n    STOP",
}

# ---- saving, resuming
# -------------------------------------------------------------------------------------------------

SAVES = {  # a line of an epoch; the helper's text
    "state_dict": ('torch.save(STATE, "model.pt")', ""),
    "dict": ('torch.save({"epoch": epoch + 1, "model": STATE, "opt": $opt.state_dict()}, "model.pt")', ""),
    "best only": ('if score <= best_score:\n    torch.save(STATE, "model.pt")', ""),
    "best kept in memory": ("if score <= best_score:\n    best_state = copy.deepcopy(STATE)", ""),
    "helper": (
        'save_checkpoint({"epoch": epoch + 1, "model": STATE}, score <= best_score)',
        'def save_checkpoint(state, is_best, path="model.pt"):\n    torch.save(state, path)\n    if is_best:\n'
        '        shutil.copyfile(path, "best.pt")\n',
    ),
    "helper with a folder": (
        'save_model($model, "out", epoch)',
        "def save_model(model, folder, epoch):\n    if not os.path.exists(folder):\n        os.makedirs(folder)\n"
        '    path = os.path.join(folder, f"{epoch}.pt")\n    if os.path.exists(path):\n        return\n'
        "    torch.save(model.state_dict(), path)\n",
    ),
    "at the end": ("", ""),
    "cloned": ('torch.save({k: v.detach().cpu().clone() for k, v in STATE.items()}, "model.pt")', ""),
}
RESUMES = {
    "none": "",
    "exists": 'if os.path.exists("last.pt"):\n    saved = torch.load("last.pt")\n'
    '    $model.load_state_dict(saved["model"])\n'
    '    $opt.load_state_dict(saved["opt"])\n    $start = saved["epoch"]\n    print("resumed at", $start)',
    "flag": 'if "--resume" in sys.argv:\n    saved = torch.load("last.pt", map_location="cpu")\n'
    '    $model.load_state_dict(saved["model"])\n    $opt.load_state_dict(saved["opt"])\n'
    '    $start = saved["epoch"]\nelse:\n    print("from the start")',
}
LAST = 'torch.save({"epoch": epoch, "model": STATE, "opt": $opt.state_dict()}, "last.pt")'
AVERAGES = {  # helper, made, at each step, what is saved
    "none": ("", "", "", ""),
    "dict by name": (
        "class EMA:\n    def __init__(self, model, decay):\n        self.decay = decay\n"
        "        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}\n\n"
        "    def update(self, model):\n        for n, p in model.named_parameters():\n"
        "            self.shadow[n].mul_(self.decay).add_(p.detach(), alpha=1 - self.decay)\n",
        "$ema = EMA($model, 0.8)",
        "$ema.update($model)",
        "$ema.shadow",
    ),
    "deepcopy": (
        "@torch.no_grad()\ndef follow(ema, model, decay=0.8):\n"
        "    for e, p in zip(ema.parameters(), model.parameters()):\n        e.lerp_(p, 1 - decay)\n",
        "$ema = copy.deepcopy($model)\n$ema.requires_grad_(False)",
        "follow($ema, $model)",
        "$ema.state_dict()",
    ),
    "state_dict": (
        "",
        "$ema = {k: v.clone() for k, v in $model.state_dict().items()}",
        "for k, v in $model.state_dict().items():\n    $ema[k] = 0.8 * $ema[k] + 0.2 * v",
        "$ema",
    ),
    "AveragedModel": (
        "",
        "$ema = torch.optim.swa_utils.AveragedModel($model)",
        "$ema.update_parameters($model)",
        "$ema.module.state_dict()",
    ),
}
RESULTS = {
    "json": 'with open("results.json", "w") as file:\n    json.dump(results, file)',
    "text": 'f = open("results.txt", "a")\nf.write(str(results) + "\\n")\nf.close()',
    "csv": 'with open("results.csv", "w", newline="") as file:\n    writer = csv.writer(file)\n'
    "    writer.writerow(results.keys())\n    writer.writerow(results.values())",
    "helper": "write_results(results)",
    "not if there": 'if not os.path.exists("results.json"):\n    with open("results.json", "w") as file:\n'
    "        json.dump(results, file, indent=1)\nelse:\n    print('results are there')",
}
WRITE_RESULTS = """\
def write_results(results, folder="results"):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "all.json"), "w") as file:
        json.dump(results, file)
"""
SHAPES = ("module", "function", "step function", "engine file", "trainer", "trainer step", "callbacks", "generator")
