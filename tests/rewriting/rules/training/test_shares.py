# ruff: noqa: E501 - tables of code are easier to read on one line
"""What a loop makes of a rank's share of a batch: counts, means, samples, losses that are sums; which loaders train."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

from ...helpers import converted

HEAD = """import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 2)
opt = torch.optim.Adam(net.parameters())
loader = DataLoader(data, batch_size=8)
"""
LOOP = """for step, (x, y) in enumerate(loader):
    out = net(x)
    loss = F.cross_entropy(out, y)
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
MADE = {
    "hits": ("n += (out.argmax(1) == y).sum().item()", "n += bmt.total((out.argmax(1) == y).sum().item())"),
    "hits in a tensor": ("n += torch.sum(out.argmax(1) == y)", "n += bmt.total(torch.sum(out.argmax(1) == y))"),
    "hits, named": ("h = (out.argmax(1) == y).sum().item()\n    n += h", "n += bmt.total(h)"),
    "sizes": ("n += len(x)", "n += bmt.total(len(x))"),
    "a shape": ("n += x.shape[0]", "n += bmt.total(x.shape[0])"),
    "a weighed loss": ("t += loss.item() * x.size(0)", "t += bmt.total(loss.item() * x.size(0))"),
    "a weighed mean": ("t += (out == y).float().mean() * len(y)", "t += bmt.total((out == y).float().mean() * len(y))"),
    "an attribute": ("log.n += len(x)", "log.n += bmt.total(len(x))"),
    "shown": ("print(step * len(x))", "bmt.print_rank(bmt.total(step * len(x)))"),
    "a mean shown": ("a = (out == y).float().mean()\n    print(f'{a:.3f}')", "f'{bmt.sum_loss(a):.3f}'"),
    "a mean collected": ("accs.append((out == y).float().mean().item())", "accs.append(bmt.sum_loss((out == y)"),
    "a mean by its name": (
        "acc1, acc5 = f(out, y)\n    top.update(acc1[0], len(x))",
        "top.update(bmt.sum_loss(acc1[0]), len(x))",
    ),
    "a row of wandb": ("wandb.log({'a': (out == y).float().mean()})", "bmt.sum_loss((out == y).float().mean())"),
    "a ratio": ("accs.append((out == y).sum().item() / len(y))", "accs.append(bmt.sum_loss((out == y).sum().item() /"),
    "a row of means and counts": (
        "p.append([step, str((out == y).float().mean().item()), {'n': len(x)}])",
        "p.append([step, str(bmt.sum_loss((out == y).float().mean().item())), {'n': bmt.total(len(x))}])",
    ),
    "a mean, rounded": (
        "p.append(round((out == y).float().mean().item(), 2))",
        "p.append(round(bmt.sum_loss((out == y).float().mean().item()), 2))",
    ),
    "predictions": ("p.extend(out.argmax(1).tolist())", "p.extend(bmt.gather_samples(out.argmax(1).tolist()))"),
    "arrays": ("p.append(out.detach().cpu().numpy())", "p.append(bmt.gather_samples(out.detach().cpu().numpy()))"),
    "labels": ("p.extend(y.tolist())", "p.extend(bmt.gather_samples(y.tolist()))"),
    "with what was before": ("print(step * 8 + len(x))", "bmt.print_rank(step * 8 + bmt.total(len(x)))"),
    "in a format": ("print('{n}'.format(n=step * 8 + len(x)))", "format(n=step * 8 + bmt.total(len(x)))"),
    "in an f-string": ("print(f'{step * 8 + len(x)}/{len(data)}')", "{step * 8 + bmt.total(len(x))}/{len(data)}"),
    "by percent": ("print('%d' % (step * 8 + len(x)))", "'%d' % (step * 8 + bmt.total(len(x)))"),
    "what is left": ("print(len(data) - x.size(0))", "len(data) - bmt.total(x.size(0))"),
    "in thousands": ("print((step * 8 + len(x)) / 1000)", "(step * 8 + bmt.total(len(x))) / 1000"),
    "as a number": ("print(int(step * 8 + len(x)))", "int(step * 8 + bmt.total(len(x)))"),
    "in a bar": ("bar.set_postfix(seen=step * 8 + len(x))", "set_postfix(seen=step * 8 + bmt.total(len(x)))"),
    "logged": ("wandb.log({'seen': 8 * step + len(x)})", "{'seen': 8 * step + bmt.total(len(x))}"),
    "one more": ("n += 1 + (out.argmax(1) == y).sum().item()", "n += 1 + bmt.total((out.argmax(1) == y).sum().item())"),
    "a table of counts": (
        "n += torch.bincount(2 * y + out.argmax(1), minlength=4)",
        "n += bmt.total(torch.bincount(2 * y + out.argmax(1), minlength=4))",
    ),
    "weighed hits": (
        "n += 0.3 * (out.argmax(1) == y).sum() + 0.7 * (out.argmax(1) == y[p]).sum()",
        "n += bmt.total(0.3 * (out.argmax(1) == y).sum() + 0.7 * (out.argmax(1) == y[p]).sum())",
    ),
    "collected": ("seen.append(step * 8 + len(x))", "seen.append(step * 8 + bmt.total(len(x)))"),
    "of a chain": ("p += out.argmax(1).tolist()", "p += bmt.gather_samples(out.argmax(1).tolist())"),
    "added by name": (
        "n = n + (out.argmax(1) == y).sum().item()",
        "n = n + bmt.total((out.argmax(1) == y).sum().item())",
    ),
    "added in front": ("n = len(x) + n", "n = bmt.total(len(x)) + n"),
    "put behind": ("p = torch.cat([p, out.argmax(1)])", "p = torch.cat([p, bmt.gather_samples(out.argmax(1))])"),
    "put behind, along the first": (
        "self.p = torch.cat((self.p, out.argmax(1)), dim=0)",
        "self.p = torch.cat((self.p, bmt.gather_samples(out.argmax(1))), dim=0)",
    ),
    "an array put behind": ("p = np.append(p, y.numpy())", "p = np.append(p, bmt.gather_samples(y.numpy()))"),
    "arrays put behind": ("p = np.concatenate([p, y.numpy()])", "np.concatenate([p, bmt.gather_samples(y.numpy())])"),
    "the first or put behind": (
        "p = y if p is None else torch.cat([p, y])",
        "p = bmt.gather_samples(y) if p is None else torch.cat([p, bmt.gather_samples(y)])",
    ),
    "the first, else put behind": (
        "if p is None:\n        p = y.numpy()\n    else:\n        p = np.append(p, y.numpy())",
        "        p = bmt.gather_samples(y.numpy())\n    else:\n        p = np.append(p, bmt.gather_samples(y.numpy()))",
    ),
    "what is left, counted down": ("n -= len(x)", "n -= bmt.total(len(x))"),
    "added in place": ("n.add_((out.argmax(1) == y).sum())", "n.add_(bmt.total((out.argmax(1) == y).sum()))"),
    "counts of each class": ("n += F.one_hot(y, 2).sum(0)", "n += bmt.total(F.one_hot(y, 2).sum(0))"),
    "counts along the first": ("n += torch.sum(out > 0, dim=0)", "n += bmt.total(torch.sum(out > 0, dim=0))"),
    "a mean for each step": (
        "n[step] = (out.argmax(1) == y).float().mean()",
        "n[step] = bmt.sum_loss((out.argmax(1) ==",
    ),
    "a count for each step": (
        "n[step] = (out.argmax(1) == y).sum()",
        "n[step] = bmt.total((out.argmax(1) == y).sum())",
    ),
    "a running mean": (
        "n = 0.9 * n + 0.1 * (out.argmax(1) == y).float().mean().item()",
        "n = 0.9 * n + bmt.sum_loss(0.1 * (out.argmax(1) == y).float().mean().item())",
    ),
    "several at once": (
        "n, t = n + len(y), t + loss.item()",
        "n, t = n + bmt.total(len(y)), t + bmt.sum_loss(loss).item()",
    ),
    "a list behind a list": ("p = [*p, *y.tolist()]", "p = [*p, *bmt.gather_samples(y.tolist())]"),
    "joined texts": (
        "a = (out.argmax(1) == y).float().mean()\n    print('a ' + str(round(a.item(), 3)) + '%')",
        "bmt.print_rank('a ' + str(round(bmt.sum_loss(a.item()), 3)) + '%')",
    ),
    "a list added": ("p += y.tolist()", "p += bmt.gather_samples(y.tolist())"),
}


@pytest.mark.parametrize(("text", "wanted"), MADE.values(), ids=MADE.keys())
def test_what_leaves_the_loop_is_the_batchs(text: str, wanted: str) -> None:
    assert wanted in converted(f"{HEAD}{LOOP}    {text}\n")


def test_without_gradients_outputs_are_collected_too() -> None:
    loop = "with torch.no_grad():\n    for x, y in loader:\n        p.append(net(x))\n        n.append(y)\n"
    after = converted(f"{HEAD}{LOOP}{loop}")
    assert "p.append(bmt.gather_samples(net(x)" in after and "n.append(bmt.gather_samples(y" in after


def test_what_is_made_of_the_collected_is_not_reported() -> None:
    loop = "for epoch in range(2):\n    p = []\n    " + LOOP.replace("\n", "\n    ") + "    p.append(y)\n"
    behind = "    all = torch.cat(p)\n    print(all.float().mean().item())\n    print(out.std().item())\n"
    result = convert_text(HEAD + loop + behind)
    (line,) = [f.line for f in result.reported if f.code == "BMT037"]
    assert result.before.decode().splitlines()[line - 1] == "    print(out.std().item())"


MIX = """def mix(x, y, alpha=1.0):
    lam = np.random.beta(alpha, alpha) if alpha > 0 else 1
    order = torch.randperm(x.size(0))
    other = y[order]
    return lam * x + (1 - lam) * x[order], {second}, lam


"""
HITS = "n += lam * (out.argmax(1) == y).sum().float() + (1 - lam) * (out.argmax(1) == z).sum().float()"


@pytest.mark.parametrize("second", ["y[order]", "other"])
def test_a_weight_that_a_function_draws_is_no_share(second: str) -> None:
    text = HEAD + MIX.format(second=second) + LOOP.replace("    out =", "    x, z, lam = mix(x, y, 0.5)\n    out =")
    after = converted(f"{text}    {HITS}\n")
    assert f"    n += bmt.total({HITS.partition('n += ')[2]})\n" in after


@pytest.mark.parametrize("second", ["weight(x)", "x.size(0) / 8"])
def test_a_weight_that_is_made_of_the_batch_is_not_known(second: str) -> None:
    text = HEAD + MIX.format(second="y").replace(", lam\n", f", {second}\n")
    loop = LOOP.replace("    out =", "    x, z, lam = mix(x, y, 0.5)\n    out =")
    result = convert_text(f"{text}{loop}    {HITS}\n")
    assert "BMT037" in {finding.code for finding in result.reported}


def test_a_count_that_is_named_before_it_is_shown_is_reported() -> None:
    result = convert_text(f"{HEAD}{LOOP}    seen = step * 8 + len(x)\n    print(seen)\n")
    assert "BMT037" in {finding.code for finding in result.reported}


def test_errors_of_a_function_are_means() -> None:
    after = converted(f"{HEAD}{LOOP}    err1, err5 = accuracy(out, y)\n    top.update(err1.item(), x.size(0))\n")
    assert "top.update(bmt.sum_loss(err1).item(), x.size(0))" in after or "bmt.sum_loss(err1.item())" in after


LEFT_IN_NAMES = {
    "a = (out.argmax(1) == y).float().mean().item()": "bmt.sum_loss(a)",
    "a = (out.argmax(1) == y).sum()": "bmt.total(a)",
}


@pytest.mark.parametrize(("text", "whole"), LEFT_IN_NAMES.items())
def test_what_the_last_batch_has_left_is_made_whole_where_it_is_shown(text: str, whole: str) -> None:
    loop = "for epoch in range(2):\n    " + f"{LOOP}    {text}\n".replace("\n", "\n    ") + "print(a)\n"
    assert f"    bmt.print_rank({whole})\n" in converted(HEAD + loop)
    assert not [f for f in convert_text(HEAD + loop).reported if f.code == "BMT037"]


def test_the_number_of_a_loss_that_is_left_in_a_name_is_of_all_ranks() -> None:
    text = "if loss.item() < best:\n        best = loss.item()\nprint(best)\n"
    assert not [f for f in convert_text(f"{HEAD}{LOOP}    {text}").reported if f.code == "BMT037"]


KEPT = {
    "a shape shown": "logger.info(out.argmax(1).shape, x.dtype)",
    "a flag of the batch's own": "seen = torch.zeros(2)\n    seen[y] = 1",
    "a sum of losses": "t = 0.9 * t + 0.1",
    "a step": "n += 1",
    "a list of the batch's own": "rows = []\n    rows.append(out.detach())",
    "with gradients": "terms.append(out)",
    "a feature's size": "n += x.size(1)",
    "what all ranks have": "n += len(data)",
    "a rate": "rates.append(opt.param_groups[0]['lr'])",
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT.keys())
def test_what_is_no_share_stays(text: str) -> None:
    assert f"    {text}\n" in converted(f"{HEAD}{LOOP}    {text}\n")


UNKNOWN = {
    "outputs with their gradients": "p.append(out)",
    "a place for each": "n += 8\n    p[n : n + len(y)] = out.argmax(1)",
    "places of the batch": "p[y] = out.detach()",
    "each item": "for a, b in zip(out.argmax(1), y):\n        if a == b:\n            n += 1",
    "as the items are": "if y.sum() > 3:\n        n += len(y)",
    "counts at places": "n[y] += 1",
    "counts at two places": "n[y.numpy(), out.argmax(1).numpy()] += 1",
    "counts at places, by a function": "np.add.at(n, y.numpy(), 1)",
    "counts at places, in place": "n.index_add_(0, y, torch.ones(len(y)))",
    "a matrix of counts": "n += torch.bincount(2 * y + out.argmax(1))",
    "a matrix, item by item": "for a, b in zip(y, out.argmax(1)):\n        n[a, b] += 1",
    "a flag for each": "seen[y] = True",
    "a set": "seen |= set(y.tolist())",
    "a set, item by item": "for a in y.tolist():\n        seen.add(a)",
    "a table, by item": "for k, a in zip(y.tolist(), out.argmax(1).tolist()):\n        found[k] = a",
    "rows added up": "n += out.detach().sum(1)",
    "the largest": "n = max(n, out.max().tolist())",
    "the largest in a tensor": "n = torch.maximum(n, out.detach().amax(0))",
    "a norm": "p.append(out.norm().item())",
    "a function's number": "p.append(measured(out, y))",
    "written": "file.write(str(out.argmax(1).tolist()))",
    "each item shown": "for a in out.argmax(1).tolist():\n        logger.info(a)",
    "a metric": "metric.update(out.argmax(1), y)",
    "a score": "n += score(out, y)",
    "rows": "rows.append((out.detach(), y))",
    "a dict's": "for k, v in measured(out, y).items():\n        t[k] += v",
}


@pytest.mark.parametrize("text", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_is_not_known_stays_and_is_reported(text: str) -> None:
    result = convert_text(f"{HEAD}{LOOP}    {text}\n")
    assert f"    {text}\n" in result.after.decode()
    assert "BMT037" in {finding.code for finding in result.reported}


def test_a_loop_over_either_data_names_the_loader() -> None:
    text = HEAD.replace(
        "loader = DataLoader(data, batch_size=8)", 'loaders = {k: DataLoader(d[k]) for k in ("train", "val")}'
    )
    loop = LOOP.replace("loader)", "loaders[part])").replace("    loss.b", "    if part == 'train':\n        loss.b")
    after = converted(f"{text}{loop}    n += len(x)\n    p.extend(y.tolist())\n")
    assert "n += bmt.total(len(x), of=loaders[part])\n" in after
    assert "p.extend(bmt.gather_samples(y.tolist(), of=loaders[part]))\n" in after


SUMS = {
    "reduction": 'loss = F.mse_loss(out, x, reduction="sum")',
    "a tensor's": "loss = ((out - x) ** 2).sum()",
    "torch's": "loss = torch.sum((out - x) ** 2)",
    "by a number": 'loss = F.mse_loss(out, x, reduction="sum") / 8',
    "terms": 'kl = -0.5 * torch.sum(out.exp())\n    loss = F.mse_loss(out, x, reduction="sum") + 0.1 * kl',
    "size_average": "loss = F.mse_loss(out, x, size_average=False)",
    "a function's": "loss = both(out, x)",
    "a criterion's": "loss = both(out, x) + 2 * criterion(out, x)",
}
FUNCTIONS = """criterion = torch.nn.MSELoss(reduction="sum")


def both(a, b):
    return criterion(a, b) + torch.sum(a.pow(2))


"""


@pytest.mark.parametrize("text", SUMS.values(), ids=SUMS.keys())
def test_a_sum_is_the_whole_batchs(text: str) -> None:
    loop = LOOP.replace("loss = F.cross_entropy(out, y)", text)
    functions = FUNCTIONS if "both" in text or "criterion" in text else ""
    result = convert_text(HEAD + functions + loop + "    t += loss.item()\n    print(loss.item() / len(x))\n")
    after = result.after.decode()
    assert ".backward(loss * bmt.world_size())\n" in after
    assert "t += bmt.total(loss.item())\n" in after
    assert "bmt.sum_loss(" in after.splitlines()[-1]
    assert not any("sum over" in finding.message for finding in result.reported)


NO_SUMS = {
    "a mean": "loss = F.mse_loss(out, x)",
    "of the batch's size": 'loss = F.mse_loss(out, x, reduction="sum") / x.size(0)',
    "along a dimension": "loss = (out - x).pow(2).sum(1).mean()",
    "a mean beside": 'loss = F.mse_loss(out, x, reduction="sum") + out.mean()',
}


@pytest.mark.parametrize("text", NO_SUMS.values(), ids=NO_SUMS.keys())
def test_another_loss_is_left(text: str) -> None:
    assert ".backward(loss)\n" in converted(HEAD + LOOP.replace("loss = F.cross_entropy(out, y)", text))


COUNTED = {
    "a module": ("torch.nn.CrossEntropyLoss(ignore_index=0)", True),
    "by default": ("torch.nn.CrossEntropyLoss()", False),
    "a sum": ("torch.nn.CrossEntropyLoss(ignore_index=0, reduction='sum')", False),
    "a sum of old": ("torch.nn.CrossEntropyLoss(ignore_index=0, size_average=False)", False),
    "weights": ("torch.nn.CrossEntropyLoss(weight=w)", True),
    "weights by place": ("torch.nn.NLLLoss(w)", True),
    "no weights": ("torch.nn.CrossEntropyLoss(weight=None, label_smoothing=0.1)", False),
}


@pytest.mark.parametrize(("made", "changes"), COUNTED.values(), ids=COUNTED.keys())
def test_what_counts_on_all_ranks(made: str, changes: bool) -> None:
    after = converted(f"{HEAD}criterion = {made}\n" + LOOP.replace("F.cross_entropy(", "criterion("))
    assert (f"criterion = bmt.loss.mean_over_ranks({made})\n" in after) is changes
    called = "F.cross_entropy(out, y, ignore_index=0)"
    wanted = "bmt.loss.mean_over_ranks(F.cross_entropy)(out, y, ignore_index=0)"
    assert wanted in converted(HEAD + LOOP.replace("F.cross_entropy(out, y)", called))


def test_what_counts_on_all_ranks_already() -> None:
    text = f"{HEAD}criterion = bmt.loss.mean_over_ranks(torch.nn.CrossEntropyLoss(ignore_index=0))\n"
    text += LOOP.replace("F.cross_entropy(", "criterion(")
    assert converted("import bmtrain as bmt\n" + text).count("mean_over_ranks") == 1


CALLED = {
    "weights": ("(out, y, weight=w)", True),
    "weights by place": ("(out, y, w)", True),
    "a mask": ("(out[mask], y[mask])", True),
    "an attribute": ("(out[x.train_mask], y)", True),
    "a comparison": ("(out[y > 0], y[y > 0])", True),
    "a slice": ("(out[:, 0], y)", False),
    "one sample": ("(out[i], y[i])", False),
    "losses": ("(out[mask], y[mask], reduction='none').mean()", False),
}


@pytest.mark.parametrize(("call", "changes"), CALLED.values(), ids=CALLED.keys())
def test_what_a_mask_or_weights_leave(call: str, changes: bool) -> None:
    after = converted(HEAD + LOOP.replace("(out, y)", call))
    assert (f"loss = bmt.loss.mean_over_ranks(F.cross_entropy){call}" in after) is changes, after


def test_packed_sequences() -> None:
    packed = "y = torch.nn.utils.rnn.pack_padded_sequence(y, n, batch_first=True)[0]\n    out = net(x)"
    after = converted(HEAD + "criterion = torch.nn.CrossEntropyLoss()\n" + LOOP.replace("out = net(x)", packed).replace(
        "F.cross_entropy(", "criterion("))  # fmt: skip
    assert "criterion = bmt.loss.mean_over_ranks(torch.nn.CrossEntropyLoss())\n" in after


# Which loaders train ----------------------------------------------------------------------------------------------

TESTED = """

def measure(net, data):
    return [net(x).argmax(1) for x, y in data]


"""


def shards(text: str) -> bool:
    return "rest = bmt.shard_loader(" in convert_text(text).after.decode()


OTHER = "rest = DataLoader(held_out, sampler=torch.utils.data.SequentialSampler(held_out))\n"
USES = {
    "a loop": ("for x, y in rest:\n    print(net(x))\n", False),
    "a function's loop": ("measure(net, rest)\n", False),
    "a list": ("scores = [net(x) for x, y in rest]\n", False),
    "by another name": ("again = rest\nfor x, y in again:\n    net(x)\n", False),
    "a bar": ("from tqdm import tqdm\nfor x, y in tqdm(rest):\n    net(x)\n", False),
    "trained on": ("for x, y in rest:\n    F.cross_entropy(net(x), y).backward()\n    opt.step()\n", True),
    "endless": ("it = iter(rest)\nfor i in range(9):\n    x, y = next(it)\n    net(x).mean().backward()\n", True),
    "not seen": ("run(rest)\n", True),
}


@pytest.mark.parametrize(("use", "trains"), USES.values(), ids=USES.keys())
def test_what_is_done_with_the_batches_decides(use: str, trains: bool) -> None:
    assert shards(HEAD + OTHER + TESTED + LOOP + use) is trains


def test_a_word_inside_a_name_decides_nothing() -> None:
    text = HEAD.replace("loader =", "retrieval_loader =") + LOOP.replace("(loader)", "(retrieval_loader)")
    assert "retrieval_loader = bmt.shard_loader(" in converted(text)


def test_a_generator_method_hands_each_loader_to_its_own_loop(tmp_path: Path) -> None:
    (tmp_path / "log.py").write_text(
        "class Log:\n    def every(self, data):\n        for x in data:\n            yield x\n"
    )
    loop = LOOP.replace("enumerate(loader)", "enumerate(log.every(loader))")
    (tmp_path / "train.py").write_text(
        f"from log import Log\n{HEAD}{OTHER}log = Log()\n{loop}for x, y in log.every(rest):\n    net(x)\n"
    )
    results = convert_paths(sorted(tmp_path.glob("*.py")), Options(), [tmp_path])
    after = next(result.after.decode() for result in results if result.path.name == "train.py")
    assert "loader = bmt.shard_loader(" in after and "rest = DataLoader(" in after


# Who steps, who holds a loss --------------------------------------------------------------------------------------


def test_optimizers_of_any_name() -> None:
    text = HEAD.replace("opt = torch.optim.Adam(net.parameters())", "a, b = torch.optim.SGD(p), torch.optim.SGD(q)")
    train = (
        "def train(x, first, second):\n    first.zero_grad()\n    second.zero_grad()\n    net(x).mean().backward()\n"
    )
    after = converted(f"{text}{train}    first.step()\n    second.step()\n\n\nfor x in loader:\n    train(x, a, b)\n")
    for name in ("first", "second"):
        assert f"{name}_manager.add_optimizer({name})\n" in after and f"{name}_manager.step()\n" in after


def test_a_loss_that_is_added_up_is_a_loss() -> None:
    loop = LOOP.replace("loss = F.cross_entropy(out, y)", "loss = 0\n    loss += crit(out, y)")
    assert "t += bmt.sum_loss(loss).item()" in converted(f"{HEAD}{loop}    t += loss.item()\n")


def test_a_loss_that_another_object_holds(tmp_path: Path) -> None:
    learner = "class Learner:\n    def fit(self, x):\n        self.loss = net(x).mean()\n        self.loss.backward()\n"
    (tmp_path / "notes.py").write_text(
        "class Notes:\n    def after(self, run):\n        self.all.append(run.loss.item())\n"
    )
    (tmp_path / "train.py").write_text(f"from notes import Notes\n{HEAD}\n\n{learner}\n\nopt.step()\n")
    results = convert_paths(sorted(tmp_path.glob("*.py")), Options(), [tmp_path])
    assert b"self.all.append(bmt.sum_loss(run.loss).item())" in results[0].after


@pytest.mark.parametrize(
    "read", ["net.weight.detach().numpy()", "net.bias.data.cpu().tolist()", "net.weight.norm().item()"]
)
def test_a_parameter_that_is_shown(read: str) -> None:
    after = converted(f"{HEAD}{LOOP}np.save('w.npy', {read})\n")
    if "norm" in read:
        assert read in after
    else:
        name = read.split(".")[1]
        assert f"value = net.{name}.gather()\nif bmt.rank() == 0:\n    np.save('w.npy', value." in after


LINES = {
    "in brackets": "n += (0.3 * (out.argmax(1) == y).sum()\n          + 0.7 * (out.argmax(1) == y[p]).sum())",
    "after the sign": "n += ((out.argmax(1) == y)\n          .sum().item())",
    "in a call": "seen.append(step * 8 +\n                len(x))",
}


@pytest.mark.parametrize("text", LINES.values(), ids=LINES.keys())
def test_what_goes_over_lines(text: str) -> None:
    assert "bmt.total(" in converted(f"{HEAD}{LOOP}    {text}\n")


@pytest.mark.parametrize("value", ["loss.data.item()", "loss.data.cpu().numpy()", "loss.detach().data.item()"])
def test_a_losss_data_is_the_loss(value: str) -> None:
    result = convert_text(f"{HEAD}{LOOP}    total += {value}\n")
    assert "bmt.sum_loss(" in result.after.decode() and not [f for f in result.reported if f.code == "BMT037"]


SIZES = {
    "a reshape": ("x = x.reshape(size, -1)", True),
    "labels": ("real = torch.ones(size, 1)", True),
    "labels in a tuple": ("real = torch.zeros((size, 1))", True),
    "a state": ("state = net.init_hidden(size)", True),
    "rows": ("rows = torch.arange(size)", True),
    "an option": ("y = y.view(args.size, 4)", False),
    "the batch's own": ("real = torch.ones(x.size(0), 1)", False),
    "noise, which is shared out": ("noise = torch.randn(size, 4)", False),
}


@pytest.mark.parametrize(("text", "differs"), SIZES.values(), ids=SIZES.keys())
def test_the_loaders_size_is_not_a_shares(text: str, differs: bool) -> None:
    head = HEAD.replace("batch_size=8", "batch_size=size")
    result = convert_text(f"{head}{LOOP}    {text}\n")
    told = [finding for finding in result.reported if "fewer than size items" in finding.message]
    assert bool(told) is differs


def differing(text: str) -> list[int]:
    """The lines of which it is said that several ranks differ from one."""
    return [finding.line for finding in convert_text(text).reported if getattr(finding, "differs", False)]


OF_ALL = {
    "weights in a sum": "print(sum(p.detach().pow(2).sum().item() for p in net.parameters()) ** 0.5)",
    "weights in a loop": "for n, p in net.named_parameters():\n        print(n, round(p.detach().std().item(), 3))",
    "a weight": "print(net.weight.detach().norm().item())",
    "a divided sum": "F.cross_entropy(net(x), y, reduction='sum') / y.size(0)",
}


@pytest.mark.parametrize("statement", OF_ALL.values(), ids=OF_ALL.keys())
def test_what_is_of_all_ranks_is_not_reported(statement: str) -> None:
    assert not differing(f"{HEAD}{LOOP}    {statement}\n")


def test_a_summed_loss_of_an_evaluation_is_not_reported() -> None:
    text = f"{HEAD}valid = DataLoader(other, batch_size=8)\n{LOOP}with torch.no_grad():\n    for x, y in valid:\n"
    text += "        total += F.cross_entropy(net(x), y, reduction='sum').item()\n"
    assert not differing(text)
    assert differing(text.replace("torch.no_grad()", "torch.enable_grad()"))


HOOKS = {
    "a function": (
        "def hook(m, i, out):\n    seen.append(out.abs().mean().item())\n\n\nnet.register_forward_hook(hook)\n"
    ),
    "a lambda": "net.register_forward_hook(lambda m, i, o: seen.append(o.abs().mean().item()))\n",
    "made by a function": (
        "def make(name):\n    def hook(m, i, o):\n        seen[name] = o.std().item()\n    return hook\n\n\n"
        "net.register_forward_hook(make('a'))\n"
    ),
    "of the backward": "net.register_full_backward_hook(lambda m, i, o: seen.append(o[0].norm().item()))\n",
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
def test_numbers_that_hooks_make_are_reported(hook: str) -> None:
    text = f"{HEAD}{hook}{LOOP}"
    assert differing(text) == [next(n for n, line in enumerate(text.splitlines(), 1) if ".item()" in line)]
    assert not differing(text.replace(".item()", ".detach()"))


STEPS = {
    "a function": "def step(x, y):\n    loss = F.cross_entropy(net(x), y)\n    opt.zero_grad()\n    loss.backward()\n    opt.step()\n"
    "    return loss.item()\n\n\n",
    "one that leaves steps out": "def step(x, y):\n    loss = F.cross_entropy(net(x), y)\n    if loss.isnan():\n        return None\n"
    "    opt.zero_grad()\n    loss.backward()\n    opt.step()\n    return loss.item()\n\n\n",
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_a_loss_that_a_function_reads_is_of_all_ranks(step: str) -> None:
    loop = "for x, y in loader:\n    value = step(x, y)\n    if value is None:\n        continue\n    t += value * len(x)\n    u += value\n"
    text = f"{HEAD}{step}{loop}"
    after = converted(text)
    assert "return bmt.sum_loss(loss).item()" in after
    assert "    t += bmt.total(value * len(x))\n    u += value\n" in after and not differing(text)


def test_a_count_of_losses_is_alike_on_all_ranks() -> None:
    text = f"{HEAD}{LOOP}    if torch.isnan(loss):\n        bad += 1\n"
    assert not differing(text) and differing(text.replace("torch.isnan(loss)", "x.sum() > 0"))


@pytest.mark.parametrize(
    "loop",
    [
        "bar = trange(9)\nfor step in bar:",
        "bar = tqdm(range(9))\nfor step in bar:",
        "numbers = range(9)\nfor step in numbers:",
        "if True:\n  with trange(9) as bar:\n   for step in bar:",
        "for step in tqdm(range(9)):",
        "for _, step in enumerate(range(9)):",
    ],
)
def test_a_steps_number_is_no_share(loop: str) -> None:
    drawn = "def endless(loader):\n    while True:\n        for x in loader:\n            yield x\n\n\ndata = endless(loader)\n"
    body = (
        "\n    x = next(data)\n    net(x).mean().backward()\n    opt.step()\n    writer.add_scalar('rate', 0.1, step)\n"
    )
    result = convert_text(f"from tqdm import tqdm, trange\n{HEAD}{drawn}{loop}{body}    print(step)\n")
    assert not result.error
    assert "BMT037" not in {finding.code for finding in result.reported}


@pytest.mark.parametrize("key", ["(epoch, i)", "i", "f'{i}'", "x.size(0)"])
def test_an_extreme_that_a_table_keeps_is_reported(key: str) -> None:
    text = f"{HEAD}table = {{}}\n{LOOP}    table[{key}] = out.max().item()\nprint(table)\n"
    assert [f.line for f in convert_text(text).reported if f.code == "BMT037"]


def test_what_is_no_number_of_the_batch_may_be_kept_in_a_table() -> None:
    text = f"{HEAD}table = {{}}\n{LOOP}    table[(0, 1)] = net.weight.abs().max().item()\nprint(table)\n"
    assert not [f for f in convert_text(text).reported if f.code == "BMT037"]
