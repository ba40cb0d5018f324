"""Entries of tables that are added to, statistics that are no means, and what of a batch goes into files."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

SCRIPT = """import json
import pickle
import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader

net = nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
rows, m, table = [], {{}}, np.zeros(9)
for epoch in range(3):
    for x, y in DataLoader(data, batch_size=8):
        out = net(x)
        loss = nn.functional.cross_entropy(out, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        pred = out.argmax(1)
        {body}
"""


def after(body: str) -> tuple[str, list[str]]:
    result = convert_text(SCRIPT.format(body=body.replace("; ", "\n        ")))
    told = [found.message for found in result.reported if "share of the data" in found.message]
    behind = result.after.decode().partition("pred = out.argmax(1)\n")[2]
    return behind, told


LEFT = {
    "a number": 'm["n"] = m.get("n", 0) + 1',
    "weights": 'np.save("w.npy", net.weight.detach().numpy())',
    "a setting": 'json.dump({"epoch": epoch}, open("f", "w"))',
    "made anew": 'd = {}; d["p"] = pred.tolist()',
    "another entry": 'm["a"] = m["b"] * 2',
    "the model": 'torch.save(net.state_dict(), "m.pt")',
}


@pytest.mark.parametrize("body", LEFT.values(), ids=LEFT)
def test_other_entries_and_files_need_no_word(body: str) -> None:
    behind, told = after(body)
    assert not told and "bmt.total" not in behind and "gather_samples" not in behind


ADDED = {
    "an entry": ('m["n"] = m["n"] + len(x)', 'm["n"] = m["n"] + bmt.total(len(x))'),
    "the other way": ('m["n"] = len(x) + m["n"]', 'm["n"] = bmt.total(len(x)) + m["n"]'),
    "by get": ('m["n"] = m.get("n", 0) + len(x)', 'm["n"] = m.get("n", 0) + bmt.total(len(x))'),
    "by a name": ("m[epoch] = m.get(epoch, 0) + len(x)", "m[epoch] = m.get(epoch, 0) + bmt.total(len(x))"),
    "an array's": ("table[epoch] = table[epoch] + len(x)", "table[epoch] = table[epoch] + bmt.total(len(x))"),
    "a weighed loss": (
        'm["l"] = m.get("l", 0.0) + loss.item() * len(x)', 'm["l"] = m.get("l", 0.0) + bmt.total(loss.item() * len(x))'
    ),
    "a mean": (
        'm["a"] = m.get("a", 0) + (pred == y).float().mean().item()',
        'm["a"] = m.get("a", 0) + bmt.sum_loss((pred == y).float().mean().item())',
    ),
    "accuracy of a package": (
        "rows.append(accuracy_score(y.numpy(), pred.numpy()))",
        "rows.append(bmt.sum_loss(accuracy_score(y.numpy(), pred.numpy())))",
    ),
    "a size in a file": ('torch.save({"n": len(x)}, "n.pt")', 'bmt.save_checkpoint({"n": bmt.total(len(x))}, "n.pt")'),
}  # fmt: skip


@pytest.mark.parametrize(("body", "wanted"), ADDED.values(), ids=ADDED)
def test_what_is_added_to_an_entry_is_the_batchs(body: str, wanted: str) -> None:
    behind, told = after(body)
    assert wanted in behind and not told


SAID = {
    "an item's entry": "m[y[1].item()] = m.get(y[1].item(), 0) + 1.0 * len(x)",
    "the last labels": 'm["last"] = pred.tolist()',
    "the last outputs": 'm["last"] = out.detach()',
    "a quantile": "rows.append(torch.quantile(out, 0.5).item())",
    "a percentile": "rows.append(np.percentile(out.detach().numpy(), 90))",
    "a correlation": "rows.append(np.corrcoef(pred.numpy(), y.numpy())[0, 1])",
    "F1 of a package": 'rows.append(f1_score(y.numpy(), pred.numpy(), average="macro"))',
    "AUC of a package": "rows.append(roc_auc_score(y.numpy(), out.detach().numpy()[:, 1]))",
    "AUC by name": "auc = roc_auc_score(y.numpy(), pred.numpy()); rows.append(auc)",
    "means of features": "rows.append(out.detach().mean(0).tolist())",
    "one for each class": "per = [(pred[y == c] == c).float().mean().item() for c in range(4)]; rows.append(per)",
    "an array in a file": 'np.save("p.npy", pred.numpy())',
    "a list in a file": 'json.dump({"p": pred.tolist()}, open("f", "w"))',
    "a tensor in a file": 'torch.save(out, "out.pt")',
    "pickled": 'pickle.dump(pred, open("f", "wb"))',
    "a histogram": 'writer.add_histogram("out", out, epoch)',
}


@pytest.mark.parametrize("body", SAID.values(), ids=SAID)
def test_what_is_of_a_share_there_is_said(body: str) -> None:
    behind, told = after(body)
    assert told and "gather_samples" not in behind and "bmt.sum_loss(" not in behind
