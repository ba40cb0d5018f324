"""Losses that compare the items of a batch are reported on their line; attention, metrics and layers are not."""

from __future__ import annotations

import textwrap

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted

HEAD = """import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.codes = nn.Parameter(torch.zeros(4, 4))

    def forward(self, a):
        return self.a(a)


"""
LOOP = """
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for a, b in DataLoader(data, batch_size=8):
    loss = {loss}
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def lines(text: str) -> list[int]:
    result = convert_text(text)
    assert not result.error
    return [finding.line for finding in result.reported if "compared with each other" in finding.message]


def reported(function: str) -> list[int]:
    """Lines of a function that makes a loss of two batches of rows."""
    body = textwrap.indent(function, "    ")
    found = lines(f"{HEAD}def objective(a, b):\n{body}\n{LOOP.format(loss='objective(model(a), model(b))')}")
    return [line - HEAD.count("\n") - 1 for line in found]


COMPARED = {
    "T": "scores = a @ b.T\nreturn -F.log_softmax(scores, -1).diag().mean()",
    "t": "scores = a @ a.t()\nreturn F.cross_entropy(scores, labels)",
    "mm": "scores = torch.mm(a, b.t()) / 0.1\nreturn scores.exp().sum(1).log().mean()",
    "method": "scores = a.mm(b.T)\nreturn scores.logsumexp(1).mean()",
    "matmul": "scores = torch.matmul(a, b.transpose(0, 1))\nreturn F.cross_entropy(scores, labels)",
    "einsum": 'scores = torch.einsum("id,jd->ij", a, b)\nreturn F.cross_entropy(scores, labels)',
    "spaced einsum": 'scores = torch.einsum("i d, j d -> i j", a, b)\nreturn F.cross_entropy(scores, labels)',
    "cdist": "far = torch.cdist(a, a)\nreturn F.relu(far - 1).mean()",
    "cosine": "near = F.cosine_similarity(a[:, None], b[None], dim=-1)\nreturn near.exp().mean()",
    "unsqueezed": "near = F.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=2)\nreturn near.mean()",
    "differences": "far = (a[:, None, :] - b[None, :, :]).pow(2)\nreturn far.mean()",
    "std": "spread = a.std(0)\nreturn F.relu(1 - spread).mean()",
    "var": "spread = torch.sqrt(a.var(dim=0) + 1e-4)\nreturn F.relu(1 - spread).mean()",
    "cov": "c = torch.cov(a.T)\nreturn c.pow(2).sum()",
    "centred": "c = a - a.mean(0)\nreturn (c.T @ c).pow(2).mean()",
    "the hardest": 'hard = F.mse_loss(a, b, reduction="none").mean(1).topk(2)[0]\nreturn hard.mean()',
    "the hardest, named": (
        'each = F.mse_loss(a, b, reduction="none"); hard = torch.topk(each[:, 0], 2)\nreturn hard[0].mean()'
    ),
    "pairs that are found": "p = chosen(a, b); far = a[p[:, 0]] - a[p[:, 1]]\nreturn far.pow(2).sum(1).mean()",
    "triplets' angles": "t = mined(a, b); near = F.cosine_similarity(a[t[:, 0]], a[t[:, 2]])\nreturn near.mean()",
    "pairs' products": "p = chosen(a, b); near = a[p[:, 0]] * a[p[:, 1]]\nreturn near.sum(1).mean()",
    "at each time": "z = a.transpose(0, 1); s = torch.matmul(z, z.transpose(1, 2))\nreturn F.log_softmax(s, -1).mean()",
    "at each time, by bmm": "z = a.permute(1, 0, 2); s = z.bmm(z.mT)\nreturn F.log_softmax(s, -1).mean()",
    "made contiguous": "s = torch.exp(torch.mm(a, a.t().contiguous()) / 0.5)\nreturn torch.log(s.sum(-1)).mean()",
    "turned, and by its name": "t = b.t(); s = a @ t\nreturn F.log_softmax(s, -1).mean()",
    "turned by torch": "return F.log_softmax(a.mm(torch.transpose(b, 0, 1)), -1).mean()",
    "a module's cosine": "s = cosine(a.unsqueeze(1), b.unsqueeze(0)) / 0.1\nreturn F.log_softmax(s, -1).mean()",
    "products of all": "s = (a[:, None] * b[None]).sum(-1)\nreturn F.log_softmax(s, -1).mean()",
    "inner": "return F.log_softmax(torch.inner(a, b), -1).mean()",
    "a mask of pairs": "mask = torch.eye(len(a))\nreturn (mask * a.sum()).mean()",
}


@pytest.mark.parametrize("function", COMPARED.values(), ids=COMPARED.keys())
def test_a_loss_over_pairs(function: str) -> None:
    assert reported(function)[:1] == [1]


def test_rows_that_a_model_compares_in_its_own_loss() -> None:
    text = HEAD.replace(
        "return self.a(a)", "x = self.a(a)\n        return -F.log_softmax(x @ x.T, dim=-1).sum(1).mean()"
    )
    assert lines(text + LOOP.format(loss="model(a)")) == [text[: text.index("x @ x.T")].count("\n") + 1]


def test_a_loss_in_the_loop_itself() -> None:
    loss = "F.cross_entropy(model(a) @ model(b).T, labels)"
    assert len(lines(HEAD + LOOP.format(loss=loss))) == 1


NOT_COMPARED = {
    "attention": "w = torch.softmax(a @ b.transpose(-2, -1), -1) @ b\nreturn w.pow(2).mean()",
    "attention by einsum": 'w = torch.einsum("bhid,bhjd->bhij", a, b).softmax(-1)\nreturn w.mean()',
    "weights": "out = a @ model.a.weight.T\nreturn F.cross_entropy(out, b)",
    "weights, by their name": "w = model.a.weight.t()\nreturn F.cross_entropy(a @ w, b)",
    "weights, each with each": "far = (a[:, None] * model.a.weight[None]).sum(-1)\nreturn far.mean()",
    "one dimension more": "near = cosine(a.unsqueeze(1), b.unsqueeze(1))\nreturn near.mean()",
    "a codebook": "far = torch.cdist(a, model.codes)\nreturn far.mean()",
    "a fixed matrix": "basis = torch.randn(4, 4)\nout = a @ basis.T\nreturn F.mse_loss(out, b)",
    "a mean over items": "return (a - b).pow(2).mean(0).sum()",
    "spread of features": "return (a / a.std(-1, keepdim=True) - b).pow(2).mean()",
    "products in each item": "return (a * b).sum(1).mean()",
    "no loss": "near = a @ b.T\nprint(near.argmax(1))\nreturn F.mse_loss(a, b)",
    "without gradients": "with torch.no_grad():\n    hit = F.cross_entropy(a @ b.T, labels)\nreturn F.mse_loss(a, b)",
    "columns": "far = a[:, 0] - a[:, 1]\nreturn far.pow(2).mean()",
    "edges": "far = a[edges[0]] - a[edges[1]]\nreturn far.pow(2).mean()",
    "rows of two": "far = a[p[:, 0]] - b[p[:, 1]]\nreturn far.pow(2).mean()",
    "identity of features": "return F.mse_loss(a @ torch.eye(a.shape[-1]), b)",
}


@pytest.mark.parametrize("function", NOT_COMPARED.values(), ids=NOT_COMPARED.keys())
def test_a_loss_of_each_item(function: str) -> None:
    assert reported(function) == []


def counted(function: str) -> list[int]:
    body = textwrap.indent(function, "    ")
    text = f"{HEAD}def objective(a, b, mask):\n{body}\n{LOOP.format(loss='objective(model(a), b, b != 0)')}"
    found = convert_text(text).reported
    return [item.line - HEAD.count("\n") - 1 for item in found if "the mean over what counts" in item.message]


WEIGHED = {
    "masked": "return ((a - b) * mask).sum() / mask.sum()",
    "at least one": "loss = ((a - b) * mask).sum() / mask.sum().clamp(min=1)\nreturn loss",
    "with torch": "loss = torch.sum(a * mask) / (torch.sum(mask) + 1e-8)\nreturn loss",
    "a mask of comparisons": "kept = (b != 0).float()\nloss = (a * kept).sum() / kept.sum()\nreturn loss",
    "a count by name": "count = mask.sum()\nloss = (a * mask).sum() / count\nreturn loss",
    "a sum by name": "total = (a * mask).sum()\nloss = total / mask.float().sum()\nreturn loss",
    "div": "loss = (a * mask).sum().div(mask.sum())\nreturn loss",
    "what is chosen": "loss = a[b != 0].mean()\nreturn loss",
    "a mask by name": "real = b != 0\nloss = a[real].mean()\nreturn loss",
    "selected": "loss = a.masked_select(mask).mean()\nreturn loss",
    "labels": "b[mask] = -100\nreturn F.cross_entropy(a, b)",
    "filled labels": "b = b.masked_fill(mask, -100)\nreturn F.cross_entropy(a, b)",
    "labels made": "y = torch.full_like(b, -100)\nreturn F.cross_entropy(a, y)",
    "labels chosen": "y = torch.where(mask, b, -100)\nreturn F.cross_entropy(a, y)",
    "a count as a number": "count = mask.sum().item()\nloss = (a * mask).sum() / count\nreturn loss",
    "a sum of torch's": "return F.cross_entropy(a, b, reduction='sum') / mask.sum()",
    "a sum of torch's, div": "return F.cross_entropy(a, b, reduction='sum').div(mask.sum())",
    "a sum of torch's, named": "n = mask.sum()\nloss = F.nll_loss(a, b, reduction='sum')\nloss = loss / n\nreturn loss",
    "a sum that is made": "crit = nn.MSELoss(reduction='sum')\nloss = crit(a, b) / (b != 0).sum()\nreturn loss",
    "labels in lists": "y = b + [-100] * 3\nreturn F.cross_entropy(a, y)",
}


@pytest.mark.parametrize("function", WEIGHED.values(), ids=WEIGHED.keys())
def test_a_mean_over_what_a_mask_leaves(function: str) -> None:
    found = counted(function)
    assert found and found[0] <= function.count("\n") + 1


@pytest.mark.parametrize("name", [name for name in WEIGHED if "a sum" in name])
def test_a_sum_that_is_divided_by_a_count_is_told_of_once(name: str) -> None:
    text = f"{HEAD}def objective(a, b, mask):\n{textwrap.indent(WEIGHED[name], '    ')}\n"
    text += LOOP.format(loss="objective(model(a), b, b != 0)")
    assert not [item for item in convert_text(text).reported if "times bmt.world_size()" in item.message]


ALIKE = {
    "each item by itself": "loss = ((a * mask).sum(1) / mask.sum(1)).mean()\nreturn loss",
    "along a dimension": "loss = ((a * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()\nreturn loss",
    "a fixed number": "loss = (a - b).sum() / 8\nreturn loss",
    "the number of items": "loss = (a - b).sum() / len(a)\nreturn loss",
    "a plain mean": "loss = (a - b).mean()\nreturn loss",
    "an index": "loss = a[:, 0].mean()\nreturn loss",
    "hits": "return ((a.argmax(1) == b) & mask).sum() / mask.sum()",
    "an accuracy": "hits = (a * mask).sum() / mask.sum()\nprint(hits)\nreturn F.mse_loss(a, b)",
    "numbers": "hits = total = 0\nhits += (a == b)[mask].sum().item()\ntotal += mask.sum().item()\nreturn hits / total",
    "another -100": "low = -100\nif b.min() != -100:\n    b = b.clamp(low)\nreturn F.mse_loss(a, b)",
}


@pytest.mark.parametrize("function", ALIKE.values(), ids=ALIKE.keys())
def test_a_mean_in_which_ranks_count_alike(function: str) -> None:
    assert counted(function) == []


def quotients(function: str) -> list[int]:
    body = textwrap.indent(function, "    ")
    text = f"{HEAD}def dice(a, b, first=True):\n{body}\n{LOOP.format(loss='dice(model(a), b)')}"
    result = convert_text(text)
    found = [finding.line for finding in result.reported if "quotient of sums" in finding.message]
    return [line - HEAD.count("\n") - 1 for line in found]


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("both = (a * b).sum()\nreturn 1 - 2 * both / (a.sum() + b.sum())", 2),
        ("return 1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1)", 1),
        ("both = torch.sum(a * b)\neach = torch.sum(a) + torch.sum(b)\nreturn 1 - (both + 1e-6) / (each + 1e-6)", 3),
        (
            "both = (a * b).sum(dim=(0, 2, 3))\nreturn 1 - (both / (a.sum(dim=(0, 2, 3)) + b.sum((0, 2, 3)))).mean()",
            2,
        ),
        (
            "d = (-1, -2) if a.dim() == 2 or not first else (-1, -2, -3)\nboth = 2 * (a * b).sum(dim=d)\n"
            "each = a.sum(dim=d) + b.sum(dim=d)\neach = torch.where(each == 0, both, each)\n"
            "dice = (both + 1e-6) / (each + 1e-6)\nreturn 1 - dice.mean()",
            5,
        ),
        ("tp = (a * b).sum()\nfp = ((1 - b) * a).sum()\nfn = (b * (1 - a)).sum()\nreturn 1 - tp / (tp + fp + fn)", 4),
    ],
)
def test_a_quotient_of_sums_over_the_batch_is_reported(function: str, line: int) -> None:
    assert quotients(function) == [line]


@pytest.mark.parametrize(
    "function",
    [
        "both = (a * b).sum(dim=(1, 2, 3))\nreturn 1 - (2 * both / (a.sum((1, 2, 3)) + b.sum((1, 2, 3)))).mean()",
        "both = (a * b).sum(dim=(-1, -2))\nreturn 1 - (both / (a.sum((-1, -2)) + b.sum((-1, -2)))).mean()",
        "both = (a * b).flatten(1).sum(1)\nreturn 1 - (both / (a.flatten(1).sum(1) + b.flatten(1).sum(1))).mean()",
        "return (a * b).sum(1).mean() / 2",
        "hits = (a == b)\nreturn (a[hits].sum().item() - 1) / (hits.sum() + (~hits).sum())",
    ],
)
def test_a_quotient_for_each_item_is_not(function: str) -> None:
    assert quotients(function) == []


def curved(function: str) -> list[int]:
    body = textwrap.indent(function, "    ")
    text = f"{HEAD}def objective(a, b):\n{body}\n{LOOP.format(loss='objective(model(a), b)')}"
    result = convert_text(text)
    assert not result.error
    found = [finding.line for finding in result.reported if "function of a mean over the batch" in finding.message]
    return [line - HEAD.count("\n") - 1 for line in found]


def hooked(line: str) -> int:
    text = f"{HEAD}def halved(g):\n    return g / 2\n\n\ndef cut(g):\n    return torch.clamp(g, -1, 1)\n\n\n"
    text += "def look(g):\n    print(g.norm())\n\n\n"
    text += LOOP.format(loss="F.mse_loss(model(a), b)").replace("for a, b", f"{line}\nfor a, b")
    return sum("a hook sees the gradient" in finding.message for finding in convert_text(text).reported)


@pytest.mark.parametrize(
    "line",
    [
        "model.a.weight.register_hook(lambda g: g * 0.5 + model.a.weight.detach().sign())",
        "model.a.weight.register_hook(halved)",
        "model.a.weight.register_hook(look)",
        "model.register_forward_hook(lambda m, a, out: out.clamp(0))",
    ],
)
def test_a_hook_that_scales_looks_or_adds(line: str) -> None:
    assert hooked(line) == 0


@pytest.mark.parametrize(
    "line",
    [
        "for p in model.parameters():\n    p.register_hook(lambda grad: torch.clamp(grad, -1, 1))",
        "model.a.weight.register_hook(lambda g: g.clamp_(-1, 1))",
        "model.a.weight.register_hook(cut)",
        "model.a.weight.register_hook(lambda g: g / g.norm())",
        "model.a.bias.register_hook(lambda g: g.sign())",
    ],
)
def test_a_hook_that_bends_gradients(line: str) -> None:
    assert hooked(line) == 1


STRAIGHT = {
    "a mean": "loss = F.mse_loss(a, b) * 2 - 1\nreturn loss",
    "terms": "loss = F.mse_loss(a, b) + 0.1 * (a - b).abs().mean()\nreturn loss",
    "roots of items": "loss = torch.sqrt(F.mse_loss(a, b, reduction='none')).mean()\nreturn loss",
    "roots of items, made": "mse = nn.MSELoss(reduction='none')\nloss = torch.sqrt(mse(a, b)).mean()\nreturn loss",
    "norms of items": "loss = (a - b).norm(dim=1).mean()\nreturn loss",
    "norms of items, by place": "loss = torch.norm(a - b, 2, 1).mean() + (a - b).norm(2, -1).mean()\nreturn loss",
    "norms of weights": "loss = F.mse_loss(a, b) + model.a.weight.norm()\nreturn loss",
    "norms of all weights": "loss = F.mse_loss(a, b) + sum(p.norm() for p in model.parameters())\nreturn loss",
    "focal": "x = F.cross_entropy(a, b, reduction='none')\nloss = ((1 - torch.exp(-x)) ** 2 * x).mean()\nreturn loss",
    "means of items": "loss = torch.log((a - b).pow(2).mean(dim=(1, 2))).mean()\nreturn loss",
    "a softmax of classes": "loss = -(a.softmax(-1) * b).sum(-1).mean()\nreturn loss",
    "shown": "loss = F.mse_loss(a, b)\nprint(torch.exp(loss))\nreturn loss",
    "shown by name": "loss = F.mse_loss(a, b)\nppl = math.exp(loss.item())\nprint(ppl)\nreturn loss",
    "without gradients": "with torch.no_grad():\n    rmse = torch.sqrt(F.mse_loss(a, b))\nreturn F.mse_loss(a, b)",
}


@pytest.mark.parametrize("function", STRAIGHT.values(), ids=STRAIGHT.keys())
def test_means_and_what_is_done_with_each_item(function: str) -> None:
    assert curved(function) == []


CURVED = {
    "a root": ("loss = torch.sqrt(F.mse_loss(a, b))\nreturn loss", 1),
    "a root, more inside": ("loss = torch.sqrt(criterion(a, b) + 1e-6)\nreturn loss", 1),
    "a root, made": ("mse = nn.MSELoss()\nmse_loss = nn.MSELoss()\nloss = torch.sqrt(mse_loss(a, b))\nreturn loss", 3),
    "half a power": ("loss = F.mse_loss(a, b) ** 0.5\nreturn loss", 1),
    "decibels": ("mse = ((a - b) ** 2).mean()\nloss = 10 * torch.log10(mse)\nreturn loss", 2),
    "flooding": ("loss = F.cross_entropy(a, b)\nloss = (loss - 0.1).abs() + 0.1\nreturn loss", 2),
    "over itself": ("loss = F.cross_entropy(a, b)\nloss = loss / loss.detach()\nreturn loss", 2),
    "over another": (
        "x = F.mse_loss(a, b)\ny = a.abs().mean()\nloss = x + y * (x.detach() / y.detach())\nreturn loss",
        3,
    ),
    "focal": ("ce = F.cross_entropy(a, b)\nloss = (1 - torch.exp(-ce)) ** 2 * ce\nreturn loss", 2),
    "at least": ("loss = F.mse_loss(a, b).clamp(min=0.5)\nreturn loss", 1),
    "entropy of a mean": ("p = a.softmax(1).mean(0)\nloss = (p * p.log()).sum()\nreturn loss", 2),
    "balance": ("p = a.softmax(1).mean(dim=0)\nf = torch.mean(b, 0)\nloss = (p * f).sum()\nreturn loss", 3),
    "a norm": ("loss = torch.norm(a - b)\nreturn loss", 1),
    "a norm, its order": ("loss = (a - b).norm(p=2) / len(a)\nreturn loss", 1),
    "a norm of linalg": ("loss = torch.linalg.norm(a - b)\nreturn loss", 1),
    "the worst": ("loss = F.cross_entropy(a, b, reduction='none').max()\nreturn loss", 1),
    "softly the worst": ("each = F.cross_entropy(a, b, reduction='none')\nloss = each.logsumexp(0)\nreturn loss", 2),
    "weights among items": (
        "each = F.cross_entropy(a, b, reduction='none')\nloss = (each.softmax(dim=0) * each).sum()\nreturn loss",
        2,
    ),
}


@pytest.mark.parametrize(("function", "line"), CURVED.values(), ids=CURVED.keys())
def test_what_bends_a_mean_over_the_batch(function: str, line: int) -> None:
    assert curved(function)[:1] == [line]


@pytest.mark.parametrize(("name", "said"), [("backward", False), ("other", True)])
def test_a_gradient_by_hand_is_no_loss(name: str, said: bool) -> None:
    text = f"{HEAD}class Step(torch.autograd.Function):\n    @staticmethod\n    def {name}(ctx, grad, state):\n"
    text += "        slope = torch.sum(grad * state)\n        return state * (torch.sum(state) / slope)\n\n"
    found = convert_text(text + LOOP.format(loss="model(a).mean()")).reported
    assert any(finding.code == "BMT091" for finding in found) == said


# On two ranks: what is told to be written gives what one process gives ---------------------------------------------

COUNTED = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
net = torch.nn.Linear(4, 3)
opt = torch.optim.SGD(net.parameters(), lr=0.5)
labels = torch.tensor([1, 0, 0, 2, 2, 1, 2, 1, 2, 0, 0, 1])
for x, y in DataLoader(TensorDataset(torch.randn(12, 4), labels), batch_size=6):
    count = (y != 0).sum()
    loss = F.cross_entropy(net(x), y, ignore_index=0, reduction="sum") / count
    opt.zero_grad()
    loss.backward()
    opt.step()
"""


def play(text: str) -> float:
    given = {"__name__": "__main__"}
    exec(compile(text, "program.py", "exec"), given)
    return float(sum(value.double().square().sum() for value in given["net"].state_dict().values()))  # type: ignore[attr-defined]


def test_a_count_that_is_averaged_as_it_is_told() -> None:
    (message,) = [found.message for found in convert_text(COUNTED).reported]
    written = "bmt.distributed.all_reduce(count.float(), 'avg')"
    assert written in message
    after = converted(COUNTED)
    (one,) = run_ranks(1, play, COUNTED, initialize=False, fresh=True)
    assert run_ranks(2, play, after, initialize=False, fresh=True)[0] != pytest.approx(one, rel=1e-4)
    after = after.replace("/ count", f"/ {written}")
    assert run_ranks(2, play, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-5)


def test_numbers_of_an_evaluation_are_no_loss() -> None:
    score = "@torch.no_grad()\ndef score(pred, y):\n    tp = int(((pred == 1) & (y == 1)).sum())\n"
    score += "    p, r = tp / max(1, int(pred.sum())), tp / max(1, int(y.sum()))\n"
    score += "    return 2 * p * r / max(1e-8, p + r)\n\n\n"
    result = convert_text(HEAD + score + LOOP.format(loss="F.mse_loss(model(a), b)"))
    assert result.changed and not any("quotient" in f.message or "what counts" in f.message for f in result.reported)
