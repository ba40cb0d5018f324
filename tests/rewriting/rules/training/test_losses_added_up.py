# ruff: noqa: E501 - tables of code are easier to read on one line
"""Losses that are added up, in lists and in loops: means stay means, sums are the batch's, and what is not seen is said."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from tests.runtime.ranks import run_ranks

from ...helpers import converted, printed

SCRIPT = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(16, 4), torch.randint(4, (16,)))
weights = torch.tensor([0.3, 0.7])
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=8, shuffle=True)


def criterion(out, y):
    return {losses}(out, y{reduction}), 1


for step, (x, y) in enumerate(loader):
    optimizer.zero_grad()
    out = model(x)
    a, _ = criterion(out, y)
    b = F.mse_loss(out, out.detach() * 0{reduction})
    # the loss
    loss.backward()
    optimizer.step()
    print(step, f"{loss.item():.4f}", f"{model.weight.norm().item():.5f}")
"""


def script(code: str, sums: bool) -> str:
    reduction = ', reduction="sum"' if sums else ""
    text = SCRIPT.replace("{losses}", "F.cross_entropy").replace("{reduction}", reduction)
    return text.replace("    # the loss", "    " + code.replace("\n", "\n    "))


ADDED = {
    "a list": "losses = [a, b]\nloss = sum(losses)",
    "a stack": "loss = torch.stack([a, b]).sum()",
    "torch.sum of a stack": "loss = torch.sum(torch.stack([a, b]))",
    "a list that is filled": "losses = []\nfor term in (1, 2):\n    losses.append(criterion(out * term, y)[0])\nloss = torch.stack(losses).sum()",
    "a list in one line": "loss = torch.stack([F.cross_entropy(out * n, y{reduction}) for n in (1, 2)]).sum()",
    "a stack with weights": "loss = (torch.stack([a, b]) * weights).sum()",
    "a tensor that has a name": "losses = torch.stack((a, b))\nloss = losses.sum()",
    "joined": "loss = torch.cat([a.view(1), b.view(1)]).sum()",
    "a dict": "losses = {'a': a, 'b': b}\nloss = sum(losses.values())",
    "a dict that is filled": "losses = {}\nlosses['a'] = a\nlosses['b'] = b\nloss = torch.stack(list(losses.values())).sum()",
    "added in a loop": "loss = 0\nfor n in (1, 2):\n    loss += F.cross_entropy(out * n, y{reduction})",
    "added in a loop, in other words": "loss = 0\nfor n in (1, 2):\n    loss = loss + F.cross_entropy(out * n, y{reduction})",
    "one of two values, added": "loss = 0\nfor n in (1, 2):\n    part, _ = criterion(out * n, y)\n    loss += part",
    "added to the first": "loss = a\nloss += b",
}  # fmt: skip


@pytest.mark.parametrize("sums", [False, True], ids=["means", "sums"])
@pytest.mark.parametrize("code", ADDED.values(), ids=ADDED.keys())
def test_the_loss_is_that_of_one_process(code: str, sums: bool) -> None:
    text = script(code.replace("{reduction}", ', reduction="sum"' if sums else ""), sums)
    after = converted(text)
    assert ("* bmt.world_size()" in after) == sums and ("bmt.total(loss.item())" in after) == sums
    assert not any("adds up what may" in finding.message for finding in convert_text(text).reported)


@pytest.mark.parametrize("sums", [False, True], ids=["means", "sums"])
def test_on_two_ranks(sums: bool) -> None:
    for code in (ADDED["a stack with weights"], ADDED["one of two values, added"]):
        text = script(code, sums).replace("lr=0.1", "lr=0.01")
        (wanted,) = run_ranks(1, printed, text, initialize=False, fresh=True)
        first, second = run_ranks(2, printed, converted(text), initialize=False, fresh=True)
        assert first == wanted and second == []


SCALES = """loss = 0
fake, real = disc(out), disc(y)
for (feats, score), (others, _) in zip(fake, real):
    loss += F.mse_loss(score, y)
    for one, other in zip(feats, others):
        loss += F.l1_loss(one, other)"""
OF_MODELS = {
    "scales of two outputs": SCALES.replace("fake, real = disc(out), disc(y)", "fake = disc(out)\nreal = disc(y)"),
    "called in the loop's head": SCALES.replace("zip(fake, real)", "zip(disc(out), disc(y))"),
}


def with_discriminator(code: str) -> str:
    made = "disc = torch.nn.Sequential(torch.nn.Linear(4, 4))\nopt_d = torch.optim.SGD(disc.parameters(), lr=0.1)\nloader ="
    return script(code, False).replace("loader =", made, 1)


@pytest.mark.parametrize("code", OF_MODELS.values(), ids=OF_MODELS.keys())
def test_what_a_model_lists_is_no_batch(code: str) -> None:
    found = convert_text(with_discriminator(code)).reported
    assert not any("adds up what may" in finding.message for finding in found)


def test_what_a_model_lists_beside_the_batch_may_be_its_items() -> None:
    code = "loss = 0\nouts = disc(x)\nfor o, t in zip(outs, y):\n    for p, q in zip(o, t):\n        loss += F.mse_loss(p, q)"
    found = convert_text(with_discriminator(code)).reported
    assert any("adds up what may" in finding.message for finding in found)


ITEMS = {
    "a loop": "loss = 0\nfor o, t in zip(out, y):\n    loss += F.cross_entropy(o, t)",
    "a loop by number": "loss = 0\nfor i in range(len(x)):\n    loss = loss + F.cross_entropy(out[i], y[i])",
    "a line": "loss = sum(F.cross_entropy(o, t) for o, t in zip(out, y))",
    "a stack": "losses = [F.cross_entropy(o, t) for o, t in zip(out, y)]\nloss = torch.stack(losses).sum()",
    "a list": "losses = []\nfor t in y:\n    losses.append(F.cross_entropy(out[0], t))\nloss = torch.stack(losses).sum()",
    "beside a mean": "loss = a + sum(F.cross_entropy(o, t) for o, t in zip(out, y))",
    "what is not seen": "loss = torch.stack([library.one(out), library.other(out)]).sum()",
}  # fmt: skip


@pytest.mark.parametrize("code", ITEMS.values(), ids=ITEMS.keys())
def test_what_may_add_up_items_is_said(code: str) -> None:
    result = convert_text(script(code, False))
    assert b"loss * bmt.world_size()" not in result.after
    (found,) = [finding for finding in result.reported if finding.code == "BMT091"]
    assert "adds up what may be the items" in found.message


MEANS = {
    "divided by their number": "loss = 0\nfor o, t in zip(out, y):\n    loss += F.cross_entropy(o, t)\nloss = loss / len(x)",
    "divided in place": "loss = 0\nfor o, t in zip(out, y):\n    loss += F.cross_entropy(o, t)\nloss /= len(x)",
    "their mean": "loss = torch.stack([F.cross_entropy(o, t) for o, t in zip(out, y)]).mean()",
    "of several outputs": "loss = 0\nfor o in outputs(out):\n    loss += F.cross_entropy(o, y)",
    "of a model's dict": "loss = sum(term for term in library.losses(out).values())",
    "of weights": "loss = a + 0.1 * sum(p.pow(2).sum() for p in model.parameters())",
}  # fmt: skip


@pytest.mark.parametrize("code", MEANS.values(), ids=MEANS.keys())
def test_means_are_left_alone(code: str) -> None:
    result = convert_text(script(code, False))
    assert b"loss * bmt.world_size()" not in result.after
    assert not [finding for finding in result.reported if finding.code == "BMT091"]


COUNTS = {
    "of parts": ("n = 0\nfor part in x.chunk(2):\n    n += len(part)\nseen += n", "n may be of this rank's share"),
    "of items": ("n = 0\nfor o, t in zip(out, y):\n    n += 1 if o[0] > t else 0\nseen += n", "n may be of this rank's share"),
    "in a list": ("n = []\nfor k in (1, 5):\n    n.append((out[:, :k] > 0).sum().item())\nseen += sum(n)", "may be of this rank's share"),
    "of terms": ("n = 0\nfor k in range(3):\n    n += k\nseen += n", ""),
}  # fmt: skip


@pytest.mark.parametrize(("code", "wanted"), COUNTS.values(), ids=COUNTS.keys())
def test_what_each_batch_counts_anew(code: str, wanted: str) -> None:
    result = convert_text(
        script(code.replace("seen", "total") + "\nloss = a", False).replace("weights =", "total = 0\nweights =")
    )
    found = [finding.message for finding in result.reported if finding.code == "BMT037"]
    assert any(wanted in message for message in found) if wanted else not found


TOTAL = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 1)), batch_size=4)
total = 0.0
for i, (x, y) in enumerate(loader):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    total += {added}
{behind}
"""
TOTALS = {
    "divided in place": ("loss", "total /= i + 1\nprint(total)", "print_rank(bmt.sum_loss(total))"),
    "beside a text": ("loss", "print('loss', total, i)", "print_rank('loss', bmt.sum_loss(total), i)"),
    "detached": ("loss.detach()", "total /= 4\nprint(total)", "print_rank(bmt.sum_loss(total))"),
    "its data": ("loss.data", "total *= 0.25\nprint(total)", "print_rank(bmt.sum_loss(total))"),
    "as a number": ("loss.item()", "print(total)", "print_rank(total)"),
    "weighed": ("loss * len(x)", "print(total)", "print_rank(total)"),
    "by a number": ("loss * 0.25", "print(total)", "print_rank(bmt.sum_loss(total))"),
    "a number by it": ("0.5 * loss.detach()", "print(f'{total:.4f}')", "{bmt.sum_loss(total):.4f}"),
    "divided as it is shown": ("loss", "print(total / (i + 1))", "print_rank(bmt.sum_loss(total) / (i + 1))"),
    "divided and read": ("loss", "print((total / 16).item())", "(bmt.sum_loss(total) / 16).item()"),
    "divided by the batches": ("loss / len(loader)", "print(float(total))", "float(bmt.sum_loss(total))"),
    "kept in a dict": ("loss", "best = {}\nbest['a'] = total / 4\nprint(best)", "best['a'] = bmt.sum_loss(total) / 4"),
    "in a dict that is shown": ("loss", "print({'a': total / 4})", "{'a': bmt.sum_loss(total) / 4}"),
}  # fmt: skip


@pytest.mark.parametrize(("added", "behind", "wanted"), TOTALS.values(), ids=TOTALS.keys())
def test_a_total_of_loss_tensors_that_starts_at_a_number_is_the_batchs(added: str, behind: str, wanted: str) -> None:
    result = convert_text(TOTAL.format(added=added, behind=behind))
    assert wanted in result.after.decode()
    assert not [finding for finding in result.reported if finding.code == "BMT037"]


GROWN = {
    "a sum": ("total = total + loss", "print(total / 4)", "print_rank(bmt.sum_loss(total) / 4)"),
    "divided in a line of its own": ("total = total + loss", "total = total / 4\nprint(total)", "print_rank(bmt.sum_loss(total))"),
    "smoothed": ("total = 0.9 * total + 0.1 * loss.detach()", "print(total)", "print_rank(bmt.sum_loss(total))"),
    "smoothed by numbers": ("total = 0.9 * total + 0.1 * loss.item()", "print(total)", "print_rank(total)"),
    "the first one": ("total = loss.detach() if i == 0 else total + loss.detach()", "print(total / 4)", "print_rank(bmt.sum_loss(total) / 4)"),
    "an entry": ("log['train'] += loss.detach()", "print(log)", "log['train'] += bmt.sum_loss(loss).detach()"),
    "an entry, in other words": ("log['train'] = log['train'] + loss.detach()", "print(log)", "+ bmt.sum_loss(loss).detach()"),
    "an entry of numbers": ("log['train'] += loss.item()", "print(log)", "log['train'] += bmt.sum_loss(loss).item()"),
    "an entry, weighed": ("log['train'] += loss.detach() * len(x)", "print(log)", "+= bmt.total(loss.detach() * len(x))"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "behind", "wanted"), GROWN.values(), ids=GROWN.keys())
def test_what_adds_losses_up_is_the_batchs_where_it_is_shown(line: str, behind: str, wanted: str) -> None:
    text = TOTAL.replace("total += {added}", line).replace("total = 0.0", "total, log = 0.0, {{'train': 0.0}}")
    after = converted(text.format(behind=behind))
    assert wanted in after and after.count("sum_loss") <= 1


TRAINED = {
    "an entry": "log = {'a': 0}\n    log['a'] += loss\n    log['a'].backward()",
    "a dict's sum": "log = {'a': 0}\n    log['a'] += loss\n    total = sum(log.values())\n    total.backward()",
    "a sum": "total = 0\n    total = total + loss\n    total.backward()",
}


@pytest.mark.parametrize("lines", TRAINED.values(), ids=TRAINED.keys())
def test_what_backward_is_called_on_stays_this_ranks(lines: str) -> None:
    text = TOTAL.replace("    loss.backward()\n", "    " + lines + "\n").replace("    total += {added}\n{behind}", "")
    assert "sum_loss" not in converted(text.replace("{behind}", ""))


ENGINE = """import torch
from torch.utils.data import DataLoader, TensorDataset


class Engine:
    def __init__(self):
        self.model = torch.nn.Linear(4, 1)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def train_batch(self, x):
        self.opt.zero_grad()
        loss = self.model(x).pow(2).mean()
        loss.backward()
        self.opt.step()
        loss = loss.detach()
        return loss

    def train(self, loader):
        total = 0
        for (x,) in loader:
            total += self.train_batch(x)
        print(total)


torch.manual_seed(0)
Engine().train(DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4))
"""


def test_losses_that_a_method_returns_are_averaged_where_their_total_is_shown() -> None:
    after = converted(ENGINE)
    assert "print_rank(bmt.sum_loss(total))" in after and after.count("sum_loss") == 1


SIZES = {
    "its length": ("loss.item() / len(x)", "bmt.sum_loss(loss).item() / bmt.total(len(x))"),
    "its first dimension": ("float(loss) / y.size(0)", "float(bmt.sum_loss(loss)) / bmt.total(y.size(0))"),
    "all labels": ("loss.item() / y.numel()", "bmt.sum_loss(loss).item() / bmt.total(y.numel())"),
    "another dimension": ("loss.item() / x.shape[1]", "bmt.sum_loss(loss).item() / x.shape[1]"),
    "a number": ("loss.item() / 8", "bmt.sum_loss(loss).item() / 8"),
}


def divided(code: str, sums: bool) -> str:
    return script("loss = a", sums).replace("{loss.item():.4f}", "{" + code + ":.5f}")


@pytest.mark.parametrize(("code", "after"), SIZES.values(), ids=SIZES.keys())
def test_a_mean_is_divided_by_the_size_of_the_whole_batch(code: str, after: str) -> None:
    assert after in converted(divided(code, False))


def test_a_sum_is_divided_by_the_size_of_its_share() -> None:
    assert "bmt.sum_loss(loss.item() / len(x))" in converted(divided("loss.item() / len(x)", True))


def test_what_may_be_a_mean_is_told() -> None:
    text = divided("loss.item() / len(x)", False).replace("loss = a", "loss = library.loss(out, y)")
    (told,) = [said for said in convert_text(text).reported if "divides by the size" in said.message]
    assert "bmt.total(len(x))" in told.message


def test_a_mean_over_a_size_on_two_ranks() -> None:
    text = divided("loss.item() / len(x)", False).replace("lr=0.1", "lr=0.01")
    (wanted,) = run_ranks(1, printed, text, initialize=False, fresh=True)
    first, second = run_ranks(2, printed, converted(text), initialize=False, fresh=True)
    assert first == wanted and second == []
