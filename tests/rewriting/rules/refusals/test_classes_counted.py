"""Classes that are weighed by how often they are in a batch are weighed otherwise on a rank's share of it."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.types import Remark

from ...helpers import IMPORTS, NET

SCRIPT = (
    "from collections import Counter\n\nimport numpy as np\n"
    + IMPORTS
    + NET
    + """
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x, y in DataLoader(data, batch_size=8):
    {body}
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
)
EACH = "F.cross_entropy(net(x), y, reduction='none')"
NOT_OF_THE_BATCH = {
    "written out": "loss = F.cross_entropy(net(x), y, weight=torch.tensor([1.0, 2.0]))",
    "of all data": "loss = F.cross_entropy(net(x), y, weight=1 / torch.bincount(labels).float())",
    "hits": "hits = (net(x).argmax(1) == y).sum()\n    loss = F.cross_entropy(net(x), y)\n    print(hits)",
    "counted and shown": "counts = torch.bincount(y)\n    print(counts)\n    loss = F.cross_entropy(net(x), y)",
    "looked up": f"loss = ({EACH} * weights[y]).mean()",
}


def told(body: str) -> list[str]:
    found = convert_text(SCRIPT.format(body=body)).reported
    return [item.message for item in found if isinstance(item, Remark) and "classes are weighed" in item.message]


@pytest.mark.parametrize("body", NOT_OF_THE_BATCH.values(), ids=NOT_OF_THE_BATCH.keys())
def test_other_weights_are_left(body: str) -> None:
    assert not told(body)


def test_a_function_that_makes_a_criterion_of_all_labels_is_left() -> None:
    made = "nn.CrossEntropyLoss(weight=1 / torch.bincount(labels))"
    text = f"def make(labels):\n    return {made}\n\n\ncriterion = make(all)"
    body = "loss = criterion(net(x), y)"
    found = convert_text(SCRIPT.format(body=body).replace("net = Net()", f"net = Net()\n{text}")).reported
    assert not [item for item in found if "classes are weighed" in item.message]


COUNTED = {
    "bincount": "loss = F.cross_entropy(net(x), y, weight=1 / torch.bincount(y, minlength=2).float())",
    "named": "n = torch.bincount(y).float()\n    w = n.sum() / n\n    loss = F.cross_entropy(net(x), y, weight=w)",
    "numpy's": "n = np.bincount(y.numpy())\n    loss = F.cross_entropy(net(x), y, weight=torch.tensor(1.0 / n))",
    "a histogram": "loss = F.cross_entropy(net(x), y, weight=1 / torch.histc(y.float(), 2))",
    "a counter": (
        "n = Counter(y.tolist())\n    w = torch.tensor([1.0 / n[k] for k in range(2)])\n"
        "    loss = F.cross_entropy(net(x), y, weight=w)"
    ),
    "one hot": "n = F.one_hot(y, 2).float().sum(0)\n    loss = F.cross_entropy(net(x), y, weight=1 / n)",
    "compared": (
        "w = torch.stack([1 / (y == c).sum() for c in range(2)])\n    loss = F.cross_entropy(net(x), y, weight=w)"
    ),
    "a criterion made there": (
        "criterion = nn.CrossEntropyLoss(weight=1 / torch.bincount(y))\n    loss = criterion(net(x), y)"
    ),
    "at once": "loss = nn.CrossEntropyLoss(weight=1 / torch.bincount(y))(net(x), y)",
    "of positives": (
        "t = F.one_hot(y, 2).float()\n"
        "    loss = F.binary_cross_entropy_with_logits(net(x), t, pos_weight=len(y) / t.sum(0))"
    ),
    "looked up": f"w = 1 / torch.bincount(y).float()\n    loss = ({EACH} * w[y]).mean()",
    "by place": (
        f"_, at, n = torch.unique(y, return_inverse=True, return_counts=True)\n    loss = ({EACH} / n[at]).sum()"
    ),
}


@pytest.mark.parametrize("body", COUNTED.values(), ids=COUNTED.keys())
def test_counts_of_a_share_are_reported(body: str) -> None:
    assert len(told(body)) == 1


def test_a_loss_of_the_projects_own() -> None:
    text = "def balanced(out, y):\n    w = 1 / torch.bincount(y)\n    return F.cross_entropy(out, y, weight=w)\n"
    found = convert_text(
        SCRIPT.format(body="loss = balanced(net(x), y)").replace("net = Net()", f"{text}\n\nnet = Net()")
    )
    assert any("classes are weighed" in item.message for item in found.reported)
