# ruff: noqa: E501 - tables of code are easier to read on one line
"""Models that look at the padding of a batch, of which a rank's share has less, are reported; others are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import converted

SCRIPT = """import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader


{collate}

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 8, padding_idx=0)
        {layers}
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x{more}):
        x = self.embed(x)
        {pooled}
        return self.head(x)


torch.manual_seed(0)
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x, y{more} in DataLoader(data, batch_size=4, collate_fn={given}):
    loss = F.cross_entropy(net(x{more}), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
"""
PAD = "def collate(items):\n    xs, ys = zip(*items)\n    return pad_sequence(xs, batch_first=True), torch.tensor(ys)\n"
BY_HAND = "def collate(items):\n    longest = max(len(x) for x, _ in items)\n    xs = torch.zeros(len(items), longest, dtype=torch.long)\n    for i, (x, _) in enumerate(items):\n        xs[i, : len(x)] = x\n    return xs, torch.tensor([y for _, y in items])\n"
CALLED = "class Collate:\n    def __call__(self, items):\n        xs, ys = zip(*items)\n        return pad_sequence(xs, batch_first=True), torch.tensor(ys)\n"
FIXED = BY_HAND.replace("max(len(x) for x, _ in items)", "12")
GRU = "self.rnn = torch.nn.GRU(8, 8, batch_first=True)"


def script(pooled: str, layers: str = "pass", collate: str = PAD, given: str = "collate", more: str = "") -> str:
    return SCRIPT.format(pooled=pooled, layers=layers, collate=collate, given=given, more=more)


def told(text: str) -> list[str]:
    return [found.message for found in convert_text(text).reported if "looks at the padding" in found.message]


SEEN = {
    "a mean": script("x = x.mean(1)"),
    "a mean by name": script("x = torch.mean(x, dim=1)"),
    "a maximum": script("x = x.max(dim=1).values"),
    "a pool": script("x = F.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(2)"),
    "a pool of all": script("x = x.transpose(1, 2)\n        x = F.max_pool1d(x, x.size(2)).squeeze(2)"),
    "attention by hand": script("a = torch.softmax(x @ x.transpose(1, 2), dim=-1)\n        x = (a @ x)[:, 0]"),
    "attention": script(
        "x = self.attend(x, x, x)[0][:, 0]", "self.attend = torch.nn.MultiheadAttention(8, 2, batch_first=True)"
    ),
    "an encoder": script(
        "x = self.encode(x)[:, 0]",
        "self.encode = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)",
    ),
    "the last state": script("_, h = self.rnn(x)\n        x = h.squeeze(0)", GRU),
    "the last step": script("out, _ = self.rnn(x)\n        x = out[:, -1]", GRU),
    "the last state on one line": script("_, h = self.rnn(x); x = h[0]", GRU),
    "the last state by its place": script("x = self.rnn(x)[1].squeeze(0)", GRU),
    "the states of an LSTM": script("_, (h, c) = self.rnn(x)\n        x = h[0]", GRU.replace("GRU", "LSTM")),
    "both ways beside a mask": script(
        "x = self.rnn(x)[0][..., :8]\n        x = (x * mask).sum(1) / mask.sum(1)",
        GRU.replace("8, 8", "8, 8, bidirectional=True"),
        more=", mask",
    ),
    "the last state beside lengths": script(
        "_, h = self.rnn(x)\n        x = h[0] / lengths[:, None]", GRU, more=", lengths"
    ),
    "both ways": script("x = self.rnn(x)[0][:, 0, :8]", GRU.replace("8, 8", "8, 8, bidirectional=True")),
    "padded by hand": script("x = x.mean(1)", collate=BY_HAND),
    "an object that pads": script("x = x.mean(1)", collate=CALLED, given="Collate()"),
    "a lambda": script("x = x.mean(1)", given="lambda items: collate(items)"),
    "a partial": script("x = x.mean(1)", given="functools.partial(collate)").replace(
        "import torch\n", "import functools\nimport torch\n", 1
    ),
}
NOT_SEEN = {
    "one length": script("x = x.mean(1)", collate=FIXED),
    "nothing padded": script("x = x.mean(1)", given="None"),
    "lengths": script("x = x.sum(1) / lengths[:, None]", more=", lengths"),
    "a mask": script("x = (x * mask).sum(1) / mask.sum(1)", more=", mask"),
    "packed": script(
        "x = torch.nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True)\n        _, h = self.rnn(x)\n        x = h[0]",
        GRU,
        more=", n",
    ),
    "a mask of its own": script("keep = (x != 0)\n        x = x.mean(1)"),
    "the value that pads": script("keep = x.ne(0)\n        x = x.mean(1)"),
    "the first position": script("x = x[:, 0]"),
    "steps where they end": script("x = self.rnn(x)[0][torch.arange(len(x)), lengths - 1]", GRU, more=", lengths"),
    "a state that nothing reads": script("x, h = self.rnn(x)\n        x = x[:, 0]", GRU),
    "steps alone": script("x = self.rnn(x)[0][:, 0]", GRU),
    "features": script("x = x.mean(-1)"),
}


@pytest.mark.parametrize("text", SEEN.values(), ids=SEEN.keys())
def test_padding_that_a_model_looks_at_is_said(text: str) -> None:
    (message,) = told(text)
    assert "Net looks at the padding" in message and convert_text(text).changed


@pytest.mark.parametrize("text", NOT_SEEN.values(), ids=NOT_SEEN.keys())
def test_what_is_masked_or_padded_alike_is_not(text: str) -> None:
    assert not told(text)


def test_a_model_and_a_collate_of_other_files(tmp_path: Path) -> None:
    text = script("x = x.mean(1)")
    head, _, rest = text.partition(PAD)
    net, _, train = rest.partition("\n\ntorch.manual_seed")
    (tmp_path / "data.py").write_text(head + PAD)
    (tmp_path / "net.py").write_text(head + net)
    (tmp_path / "train.py").write_text(
        f"{head}from data import collate\nfrom net import Net\n\ntorch.manual_seed{train}"
    )
    results = convert_paths(sorted(tmp_path.iterdir()), Options(), [tmp_path])
    found = [(r.path.name, f.line) for r in results for f in r.reported if "looks at the padding (net.py:" in f.message]
    assert found == [("data.py", 9)]


# On two ranks: what is said is so ----------------------------------------------------------------------------------


def play(text: str) -> float:
    import torch

    sizes = [2, 9, 3, 4, 8, 2, 5, 3]
    data = [(torch.arange(1, n + 1, device="cpu"), n % 2) for n in sizes]
    given = {"data": data, "__name__": "__main__"}
    exec(compile(text, "program.py", "exec"), given)
    return float(sum(value.double().sum() for value in given["net"].state_dict().values()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "differs"), [("a mean", True), ("the last state", True), ("the first position", False)]
)
def test_the_ranks_differ_where_it_is_said(name: str, differs: bool) -> None:
    text = (SEEN | NOT_SEEN)[name]
    (one,) = run_ranks(1, play, text, initialize=False, fresh=True)
    two = run_ranks(2, play, converted(text), initialize=False, fresh=True)
    assert two[0] == two[1] and (two[0] != pytest.approx(one, rel=1e-5)) == differs
