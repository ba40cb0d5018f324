"""Sizes of a share that are kept, and losses that a callback shows, are reported."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
train_loader = DataLoader(data, batch_size=8, shuffle=True)
history = []
"""
STEP = "    loss = F.mse_loss(net(x), y)\n    loss.backward()\n    opt.step()\n    opt.zero_grad()\n"
FOR = f"for i, (x, y) in enumerate(train_loader):\n{STEP}"
NEXT = f"""it = iter(train_loader)
while True:
    batch = next(it, None)
    if batch is None:
        break
    x, y = batch
{STEP}"""
DDP = "from torch.utils.data.distributed import DistributedSampler\nsampler = DistributedSampler(data)\n"


def told(text: str, words: str) -> int:
    return sum(words in finding.message for finding in convert_text(text).reported)


@pytest.mark.parametrize("size", ["len(x)", "x.size(0)", "x.shape[0]", "len(y)"])
def test_a_size_that_is_kept(size: str) -> None:
    line = f'    history.append({{"loss": 0.0, "seen": {size}}})\n'
    for loop in (FOR, NEXT):
        assert f"bmt.total({size})".encode() in convert_text(f"{HEAD}{loop}{line}").after


def test_a_size_that_is_kept_by_a_script_for_ddp() -> None:
    assert told(f'{HEAD}{DDP}{FOR}    history.append({{"seen": len(x)}})\n', "size of this rank's share") == 1


@pytest.mark.parametrize(
    "line",
    ["history.append(len(train_loader))", "history.append(i)", "seen = {'seen': len(x)}", "total.update(1, len(x))"],
)
def test_other_lengths(line: str) -> None:
    assert told(f"{HEAD}{FOR}    {line}\n", "size of this rank's share") == 0


@pytest.mark.parametrize(
    "count",
    ["len(x) * args.world_size", "world_size * x.size(0)", "x.size(0) * args.world_size / seconds", "len(x) * n"],
)
def test_a_size_times_the_number_of_ranks_is_that_of_the_batch(count: str) -> None:
    text = f"{HEAD}{DDP}{FOR}    print('{{:.1f}}'.format({count}))\n"
    assert told(text, "of this rank's share") == ("* n" in count)


@pytest.mark.parametrize("held", ['state["loss"]', "state[name]", "self.loss", "total"])
@pytest.mark.parametrize("read", ["out.loss.item()", "float(out.loss)"])
def test_a_loss_that_is_the_mean_over_the_ranks_is_not_reported(held: str, read: str) -> None:
    step = STEP.replace("loss = F.mse_loss(net(x), y)", "out = net(x, y)").replace("loss.backward", "out.loss.backward")
    text = f"{HEAD}state = {{'loss': 0}}\nfor x, y in train_loader:\n{step}    {held} += {read}\n    print({held})\n"
    assert "bmt.sum_loss(out.loss)" in convert_text(text).after.decode()
    assert told(text, "share of the data") == 0


KEPT = {
    "in a dict": ('logs["a"] = part.item()', 'logs["a"] = bmt.sum_loss(part.item())'),
    "by a name": ("logs[name] = part.item()", "logs[name] = bmt.sum_loss(part.item())"),
    "as a number": ('logs["a"] = float(part)', 'logs["a"] = bmt.sum_loss(float(part))'),
    "now and then": (
        'if i % 9 == 0:\n        logs["a"] = part.item()',
        'if i % 9 == 0:\n        logs["a"] = bmt.sum_loss(part.item())',
    ),
    "a display": ("kept = {'a': part.item()}\n    print(kept)", "kept = {'a': bmt.sum_loss(part.item())}"),
    "shown": ("print({'a': part.item()})", "bmt.print_rank({'a': bmt.sum_loss(part.item())})"),
    "shown with a size": (
        "print({'a': part.item(), 'n': len(x)})",
        "bmt.print_rank({'a': bmt.sum_loss(part.item()), 'n': bmt.total(len(x))})",
    ),
    "handed on": ("note({'a': part.item()}, i)", "note({'a': bmt.sum_loss(part.item())}, i)"),
    "updated": ("logs.update({'a': part.item()})", "logs.update({'a': bmt.sum_loss(part.item())})"),
    "of an object": ('self.logs["a"] = part.item()', 'self.logs["a"] = bmt.sum_loss(part.item())'),
    "of what comes out": ('logs["a"] = out.mean().item()', 'logs["a"] = bmt.sum_loss(out.mean().item())'),
    "with a loss": ("note({'a': loss.item(), 'b': part.item()})", "{'a': bmt.sum_loss(loss).item(), 'b': bmt.sum_loss"),
}


@pytest.mark.parametrize("name", KEPT)
def test_means_that_a_dict_takes_are_those_of_all_ranks(name: str) -> None:
    line, expected = KEPT[name]
    part = "    out = net(x)\n    part = torch.mean(torch.abs(out - y))\n    loss = F.mse_loss(out, y) + part\n"
    step = STEP.replace("    loss = F.mse_loss(net(x), y)\n", part)
    text = f"{HEAD}logs = {{}}\nfor i, (x, y) in enumerate(train_loader):\n{step}    {line}\n"
    result = convert_text(text)
    assert expected in result.after.decode()
    assert not any("share of" in finding.message for finding in result.reported)


@pytest.mark.parametrize("line", ['logs["a"] = out.sum().item()', "logs['a'] = float(out[-1])"])
def test_what_is_no_mean_is_reported_where_a_dict_takes_it(line: str) -> None:
    step = STEP.replace("loss = F.mse_loss(net(x), y)", "out = net(x)\n    loss = F.mse_loss(out, y)")
    assert told(f"{HEAD}logs = {{}}\nfor x, y in train_loader:\n{step}    {line}\n", "share of the data") == 1


def test_means_are_averaged_where_the_loader_may_serve_a_test_too() -> None:
    text = """import torch
from torch.utils.data import DataLoader


class Solver:
    def __init__(self, loader):
        self.loader = loader
        self.net = torch.nn.Linear(4, 1)
        self.opt = torch.optim.Adam(self.net.parameters())

    def train(self):
        loader = self.loader
        it = iter(loader)
        for i in range(9):
            try:
                x, y = next(it)
            except:
                it = iter(loader)
                x, y = next(it)
            real = -torch.mean(self.net(x))
            fake = torch.mean(self.net(y))
            loss = real + fake
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            logs = {}
            logs["real"] = real.item()
            logs["fake"] = fake.item()
            print(logs)

    def test(self):
        with torch.no_grad():
            for i, (x, y) in enumerate(self.loader):
                print(self.net(x))


def get(mode):
    return DataLoader(data, batch_size=8, shuffle=(mode == "train"))


solver = Solver(get(config.mode))
if config.mode == "train":
    solver.train()
else:
    solver.test()
"""
    result = convert_text(text)
    assert 'logs["real"] = bmt.sum_loss(real.item())' in result.after.decode()
    assert 'logs["fake"] = bmt.sum_loss(fake.item())' in result.after.decode()
    assert not any("item() is of this rank's share" in finding.message for finding in result.reported)


CALLBACK = """class Log:
    def on_step(self, i, loss):
        print(i, {shown})


"""


@pytest.mark.parametrize(
    "shown",
    ["loss.item()", "float(loss)", "round(float(loss.detach().cpu()), 4)", "loss.data.item()", "'%.4f' % loss", "loss"],
)
def test_a_callback_shows_the_loss(shown: str) -> None:
    text = (
        CALLBACK.format(shown=shown)
        + HEAD
        + f"{FOR}    for callback in callbacks:\n        callback.on_step(i, loss)\n"
    )
    assert told(text, "bmt.sum_loss(loss)") == 1


def test_a_callback_that_gets_no_loss_or_shows_none() -> None:
    text = (
        CALLBACK.format(shown="loss.item()")
        + HEAD
        + f"{FOR}    for callback in callbacks:\n        callback.on_step(loss, i)\n"
    )
    assert told(text, "bmt.sum_loss(loss)") == 0
    text = (
        CALLBACK.format(shown="1") + HEAD + f"{FOR}    for callback in callbacks:\n        callback.on_step(i, loss)\n"
    )
    assert told(text, "bmt.sum_loss(loss)") == 0


def test_who_imports_what_ddp_needs_and_no_more_is_not_parallel() -> None:
    text = f"import logging\n{DDP.splitlines()[0]}\n{HEAD}logging.basicConfig(level=logging.INFO)\n{FOR}"
    assert b"logging.INFO if bmt.rank() == 0 else logging.WARNING" in convert_text(text).after


ACCURACY = "(net(x).argmax(-1) == y).float().mean().item()"
PARALLEL = f"{HEAD}{DDP}".replace("shuffle=True", "sampler=sampler")
STEPS = f"""def steps_of(loader):
    for i, (x, y) in enumerate(loader):
{STEP.replace("    ", "        ")}        yield i, loss, x, y


"""
LOOPS = {
    "for": FOR,
    "zip": FOR.replace("enumerate(train_loader)", "zip(range(9), train_loader)"),
    "next": NEXT,
    "range": f"it = iter(train_loader)\nfor i in range(len(train_loader)):\n    x, y = next(it)\n{STEP}",
    "generator": f"{STEPS}for i, loss, x, y in steps_of(train_loader):\n    pass\n",
    "step": f"def step(x, y):\n{STEP}\n\nfor i, (x, y) in enumerate(train_loader):\n    step(x, y)\n",
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize(
    "line",
    [
        "history.append({'seen': len(x)})",
        f"acc = {ACCURACY}\n    print(f'{{acc:.4f}}')",
        f"print('accuracy', {ACCURACY})",
        "sys.stdout.write(f'{x.size(0)}')",
        "logging.info('%d right', (net(x).argmax(1) == y).sum().item())",
    ],
)
def test_what_a_script_for_ddp_shows(loop: str, line: str) -> None:
    assert told(f"{PARALLEL}{loop}    {line}\n", "of this rank's share of the batch") == 1


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize(
    "line",
    [
        f"acc = torch.tensor({ACCURACY})\n    dist.all_reduce(acc)\n    print(acc.item())",
        f"acc = reduce_mean({ACCURACY})\n    print(acc)",
        "print(loss.item())",
        "print(len(train_loader))",
        "print(x.shape[1], x.dtype)",
        "hits += (net(x).argmax(1) == y).sum().item()",
        "meter.update(loss.item(), x.size(0))",
    ],
)
def test_what_is_of_all_ranks_or_no_share(loop: str, line: str) -> None:
    text = f"import torch.distributed as dist\n{PARALLEL}{loop}    {line}\n"
    assert told(text, "of this rank's share of the batch") == 0


def test_a_generator_hands_on_the_batch() -> None:
    text = f"{HEAD}{LOOPS['generator']}    history.append({{'step': i, 'loss': loss.item(), 'seen': len(x)}})\n"
    wanted = b"history.append({'step': i, 'loss': bmt.sum_loss(loss).item(), 'seen': bmt.total(len(x))})"
    assert wanted in convert_text(text).after


def test_a_step_function_keeps_counts() -> None:
    text = f"{HEAD}def step(i, x, y):\n{STEP}    history.append((i, len(x)))\n\n\n"
    text += "for i, (x, y) in enumerate(train_loader):\n    step(i, x, y)\n"
    assert b"history.append((i, bmt.total(len(x))))" in convert_text(text).after


@pytest.mark.parametrize("loop", [FOR, LOOPS["step"]])
def test_how_many_kinds_there_are_is_no_sum(loop: str) -> None:
    assert b"bmt.total(len(set" not in convert_text(f"{HEAD}{loop}    kinds += len(set(y.tolist()))\n").after


@pytest.mark.parametrize(
    ("uses", "said"),
    [
        ("    print(D_x)\n", 0),
        ("    print('%.4f %.4f' % (loss.item(), D_x))\n", 0),
        ("    history.append(D_x)\n    print(D_x)\n", 0),
        ("    print(D_x)\n    keep(D_x)\n", 1),
        ("    keep(D_x)\n", 1),
    ],
)
def test_a_mean_that_is_made_whole_wherever_it_is_read(uses: str, said: int) -> None:
    text = f"{HEAD}{FOR}    out = net(x)\n    D_x = out.sigmoid().mean().item()\n{uses}"
    assert told(text, "is of this rank's share of the data") == said


@pytest.mark.parametrize(("data", "said"), [("valid", 0), ("enumerate(valid)", 0), ("parts", 1)])
def test_a_comprehension_over_other_data_is_of_no_share(data: str, said: int) -> None:
    loop = "".join(f"    {line}\n" for line in FOR.splitlines())
    shown = f"        parts = x.chunk(2)\n    print(sum(F.l1_loss(net(a), a).item() for a in {data}))\n"
    text = f"{HEAD}valid = DataLoader(rest)\nfor epoch in range(2):\n{loop}{shown}"
    assert told(text, "is of this rank's share of the data") == said


@pytest.mark.parametrize(
    "line",
    [
        "print(len(x), out.norm().item())",
        "seen += len(x); top += out.max().item()",
        "print((out.argmax(1) == y).float().mean().item(), out.median().item())",
        "print(f'{len(x)} {out.std().item():.4f}')",
        "history.append((len(x), out.max().item()))",
        "print('%d %.3f' % (x.size(0), out.max().item()))",
    ],
)
def test_what_stands_on_a_line_with_a_value_that_is_made_whole_is_reported(line: str) -> None:
    step = STEP.replace("loss = F.mse_loss(net(x), y)", "out = net(x)\n    loss = F.mse_loss(out, y)")
    text = f"{HEAD}top = seen = 0\nfor x, y in train_loader:\n{step}    {line}\n"
    assert told(text, "share of the data") == 1
    assert "bmt.total(" in (after := convert_text(text).after.decode()) or "bmt.sum_loss((out.argmax" in after


@pytest.mark.parametrize(
    "count", ["len(set(y.tolist()))", "len(y.unique())", "y.unique().numel()", "y.unique().size(0)"]
)
@pytest.mark.parametrize("line", ["print(len(x), {})", "seen += {}", "history.append({})", "logs[i] = {}", "print({})"])
def test_how_many_distinct_items_a_share_has_is_reported(count: str, line: str) -> None:
    text = f"{HEAD}seen, logs = 0, {{}}\n{FOR}    {line.format(count)}\n"
    assert told(text, f"{count} may be of this rank's share of the data") == 1
    assert "len(x)" not in line or "bmt.total(len(x))" in convert_text(text).after.decode()


def test_losses_of_a_callback_are_reported_one_by_one() -> None:
    shown = "class Shown:\n    def end(self, loss, other):\n        print(loss.item(), other.item())\n\n\n"
    step = STEP.replace("    loss = ", "    other = F.mse_loss(net(x), y)\n    loss = other + ")
    text = f"{HEAD}{shown}for x, y in train_loader:\n{step}    callback.end(loss, other)\n"
    assert told(text, "in Shown.end is of this rank's share") == 2


TAKEN_APART = f"""{HEAD.replace("torch.nn.Linear(4, 1)", "torch.nn.parallel.DistributedDataParallel(build())")}{DDP}
for x, y in train_loader:
    {{made}} = net(x, y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    right = ({{read}}.argmax(-1) == y).float().mean().item()
    print(right)
"""


@pytest.mark.parametrize("read", ["net(x)[1]", "net(x, None)[1]", "net(x)[-1]"])
def test_what_a_model_gives_that_is_not_seen_is_a_tuple_where_it_is_taken_apart(read: str) -> None:
    assert told(TAKEN_APART.format(made="loss, out", read=read), "right is a mean of this rank's share") == 1
    assert told(TAKEN_APART.format(made="loss", read=read), "right is a mean of this rank's share") == 0
