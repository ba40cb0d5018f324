# ruff: noqa: E501 - tables of code are easier to read on one line
"""Optimizers in a list, a tuple or a dict get one manager, which steps each by itself; what is not followed is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from tests.runtime.ranks import run_ranks

from ...helpers import IMPORTS, NET, converted, weights_after

SCRIPT = """{imports}

{net}

{head}

torch.manual_seed(0)
net = Net()
data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
loader = DataLoader(data, batch_size=12)
{made}
for x, y in loader:
{body}
"""
CLEAR = "for o in opts:\n    o.zero_grad()\n"
LOSS = "F.cross_entropy(net(x), y).backward()\n"
STEP = "for o in opts:\n    o.step()\n"
EACH = CLEAR + LOSS + STEP
VALUES = EACH.replace("in opts", "in opts.values()")
LIST = "[torch.optim.Adam(net.a.parameters(), 0.05), torch.optim.SGD(net.b.parameters(), 0.1)]"
DICT = "{'a': torch.optim.Adam(net.a.parameters(), 0.05), 'b': torch.optim.SGD(net.b.parameters(), 0.1)}"
NAMED = "a = torch.optim.Adam(net.a.parameters(), 0.05)\nb = torch.optim.SGD(net.b.parameters(), 0.1)\n"
TRAINER = (
    """class Trainer:
    def __init__(self, net):
        self.net = net
        self.opts = {made}

    def configure(self):
        net = self.net
        return """
    + LIST
    + """

    def fit(self, loader):
        for x, y in loader:
            for o in self.opts:
                o.zero_grad()
            F.cross_entropy(self.net(x), y).backward()
            for o in self.opts:
                o.step()
"""
)


def script(made: str, body: str = EACH, head: str = "") -> str:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return SCRIPT.format(imports=IMPORTS, net=NET, head=head, made=made, body=lines)


TRAIN = "def train(net, opts, loader):\n    for x, y in loader:\n" + "".join(
    f"        {line}\n" for line in EACH.splitlines()
)
MAKE = f"def make(net):\n    return {LIST}\n"
APPENDS = "def make(net):\n    opts = []\n    opts.append(torch.optim.SGD(net.a.parameters(), 0.05))\n    opts.append(torch.optim.SGD(net.b.parameters(), 0.1))\n    return opts\n"
CONFIGURE = (
    f"def configure(net):\n    a, b = {LIST[1:-1]}\n    return [a, b], [torch.optim.lr_scheduler.StepLR(a, 1, 0.5)]\n"
)
CONVERTED = {
    "a list": script(f"opts = {LIST}"),
    "a tuple of names": script(f"{NAMED}opts = (a, b)"),
    "a list of names": script(f"{NAMED}opts = [a, b]"),
    "a dict": script(f"opts = {DICT}", VALUES),
    "items of a dict": script(f"opts = {DICT}", EACH.replace("for o in opts", "for k, o in opts.items()")),
    "a dict that is called": script(
        "opts = dict(a=torch.optim.Adam(net.a.parameters(), 0.05), b=torch.optim.SGD(net.b.parameters(), 0.1))", VALUES
    ),
    "by index": script(f"opts = {LIST}", f"net.zero_grad()\n{LOSS}opts[0].step(); opts[1].step()\n"),
    "by key": script(
        f"opts = {DICT}", f"opts['a'].zero_grad()\nopts['b'].zero_grad()\n{LOSS}opts['a'].step()\nopts['b'].step()\n"
    ),
    "a comprehension": script(f"opts = {LIST}", f"[o.zero_grad() for o in opts]\n{LOSS}[o.step() for o in opts]\n"),
    "made by a comprehension": script(
        "opts = [torch.optim.SGD(m.parameters(), lr) for m, lr in ((net.a, 0.1), (net.b, 0.05))]"
    ),
    "appended": script("opts = []\nfor m in (net.a, net.b):\n    opts.append(torch.optim.SGD(m.parameters(), 0.1))"),
    "put by key": script(
        "opts = {}\nfor k, m in (('a', net.a), ('b', net.b)):\n    opts[k] = torch.optim.SGD(m.parameters(), 0.1)",
        VALUES,
    ),
    "put by index": script(
        "opts = [None] * 2\nfor i, m in enumerate((net.a, net.b)):\n    opts[i] = torch.optim.SGD(m.parameters(), 0.1)"
    ),
    "of a function": script("opts = make(net)", head=MAKE),
    "of a function, by index": script(
        "opts = make(net)", f"net.zero_grad()\n{LOSS}opts[0].step(); opts[1].step()\n", MAKE
    ),
    "of a function that appends": script("opts = make(net)", head=APPENDS),
    "beside schedules": script(
        "opts, schedules = configure(net)", EACH + "for s in schedules:\n    s.step()\n", CONFIGURE
    ),
    "an argument": script(f"opts = {LIST}", "pass\n", TRAIN) + "train(net, opts, loader)\n",
    "of a class": script("Trainer(net).fit(loader)", "pass\n", TRAINER.format(made=LIST)),
    "of a method": script("Trainer(net).fit(loader)", "pass\n", TRAINER.format(made="self.configure()")),
    "counted": script(f"opts = {LIST}", EACH.replace("for o in opts", "for i, o in enumerate(opts)")),
    "beside others": script(f"opts = {LIST}", EACH.replace("for o in opts", "for o, g in zip(opts, (1, 2))")),
    "unpacked": script(
        f"opts = {LIST}",
        f"first, second = opts\nfirst.zero_grad(); second.zero_grad()\n{LOSS}first.step(); second.step()\n",
    ),
    "by a name for each": script(
        f"opts = {LIST}",
        f"for i in range(2):\n    optimizer = opts[i]\n    optimizer.zero_grad()\n{LOSS}for i in range(2):\n    optimizer = opts[i]\n    optimizer.step()\n",
    ),
    "in turns": script(
        f"opts = {DICT}", f"for k in ('a', 'b'):\n    opts[k].zero_grad()\n    {LOSS}    opts[k].step()\n"
    ),
    "clipped": script(f"opts = {LIST}", f"{CLEAR}{LOSS}torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)\n{STEP}"),
    "with schedules": script(
        f"opts = {LIST}\nschedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in opts]",
        EACH + "for s in schedules: s.step()\n",
    ),
    "with a closure": script(
        f"opts = {LIST}",
        f"def closure():\n    opts[0].zero_grad()\n    {LOSS}\nopts[0].step(closure)\n{CLEAR}{LOSS}opts[1].step()\n",
    ),
    "beside one with a name": script(
        f"c = torch.optim.SGD(net.parameters(), 0.01)\nopts = {LIST}", f"c.zero_grad()\n{LOSS}c.step()\n{EACH}"
    ),
}


@pytest.mark.parametrize("text", CONVERTED.values(), ids=CONVERTED.keys())
def test_two_ranks_train_as_one_process(text: str) -> None:
    after = converted(text)
    assert "_manager.step(" in after and "_manager.add_optimizer(" in after
    (one,) = run_ranks(1, weights_after, text, initialize=False, fresh=True)
    assert run_ranks(2, weights_after, after, initialize=False, fresh=True) == pytest.approx([one] * 2, rel=1e-6)


def reasons(text: str) -> list[str]:
    result = convert_text(text, Options())
    assert not result.error and not result.changed
    return [finding.message for finding in result.reported]


@pytest.mark.parametrize(
    ("made", "body", "reason"),
    [
        (
            f"opts = {LIST}\nbox = types.SimpleNamespace(opts=opts)",
            EACH,
            "the optimizers of opts go where they are not followed",
        ),
        (f"opts = {LIST}\nregister(opts)", EACH, "the optimizers of opts go where they are not followed"),
        (
            f"{NAMED}opts = {{'net': net, 'a': a, 'b': b}}",
            f"{LOSS}opts['a'].step(); opts['b'].step()\n",
            "opts has more than optimizers",
        ),
        (
            f"opts = {LIST}",
            EACH.replace("in opts:\n    o.step", "in opts[:1]:\n    o.step"),
            "o is one optimizer of several",
        ),
        (
            f"opts = {LIST}\nscaler = torch.amp.GradScaler()",
            f"{CLEAR}scaler.scale(F.cross_entropy(net(x), y)).backward()\nfor o in opts:\n    scaler.step(o)\nscaler.update()\n",
            "o is one optimizer of several",
        ),
        ("", EACH, "opts is not made in this file"),
    ],
)
def test_what_is_not_followed_is_refused(made: str, body: str, reason: str) -> None:
    assert any(reason in said for said in reasons(script(made, body)))


@pytest.mark.parametrize(
    "step",
    [
        "a.step(); b.step()",
        "a.step(); b.step()\n[s.step() for s in schedules]",
        "a.step(); b.step()\nfor s in schedules: s.step()",
        "a.step(); b.step(); schedules[0].step()",
    ],
)
def test_names_of_their_own_and_schedules(step: str) -> None:
    schedules = "schedules = [torch.optim.lr_scheduler.StepLR(a, 1), torch.optim.lr_scheduler.StepLR(b, 1)]\n"
    after = converted(script(NAMED + schedules, f"net.zero_grad()\n{LOSS}{step}\n"))
    assert "a_manager.step(); b_manager.step()" in after


def test_a_loop_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(f"import torch.nn.functional as F\n\n\n{TRAIN}")
    text = script(f"opts = {LIST}", "pass\n").replace("import torch\n", "import torch\nfrom loop import train\n", 1)
    (tmp_path / "train.py").write_text(f"{text}train(net, opts, loader)\n")
    results = convert_paths(sorted(tmp_path.iterdir()), Options(), [tmp_path])
    after = {result.path.name: result.after.decode() for result in results}
    assert "optim_manager.step(o)" in after["loop.py"] and "optim_manager.add_optimizer(each)" in after["loop.py"]
    assert "optim_manager" not in after["train.py"]


def test_a_name_that_is_taken_stays() -> None:
    after = converted(script(f"each = 3\nopts = {LIST}"))
    assert "for each_ in opts:\n    optim_manager.add_optimizer(each_)\n" in after
