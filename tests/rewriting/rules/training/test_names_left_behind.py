"""What a loop over shares leaves in its names is the whole last batch's where it is read behind the loop."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.types import Remark

from ...helpers import IMPORTS, NET, converted

SCRIPT = (
    IMPORTS
    + NET
    + """
torch.manual_seed(0)
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=8)
for epoch in range(2):
    for {target} in loader:
{body}
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
{behind}
"""
)


def script(behind: str, target: str = "x, y", body: str = "pass") -> str:
    return SCRIPT.format(target=target, body="        " + body.replace("\n", "\n        "), behind=behind)


def told(text: str, words: str) -> list[str]:
    return [item.message for item in convert_text(text).reported if isinstance(item, Remark) and words in item.message]


LEFT = {
    "nothing is read": "",
    "a loss's number": "print(loss.item())",
    "another value before": "x, y = data[:4]\nprint(net(x))",
    "another loop's": "for x, y in other:\n    print(net(x))",
    "a comprehension's": "print([x.sum() for x in other])",
    "a function's": "def f(x, y):\n    return net(x) - y",
    "its kind": "print(x.device, x.dtype, type(y), isinstance(x, dict))",
    "what is taken away": "del x, y",
}


@pytest.mark.parametrize("behind", LEFT.values(), ids=LEFT.keys())
def test_other_reads_are_left(behind: str) -> None:
    text = script(behind)
    assert "gather_samples" not in converted(text)
    assert not any("last batch" in item.message for item in convert_text(text).reported if isinstance(item, Remark))


READS = {
    "a loss": "print(F.cross_entropy(net(x), y).item())",
    "in the loop around": "    print(F.cross_entropy(net(x), y).item())",
    "under a test": "if verbose:\n    print(net(x).mean(), y)",
    "in a with": "with torch.no_grad():\n    value = F.cross_entropy(net(x), y)",
    "hits": "hits = (net(x).argmax(1) == y).sum().item()\nprint(hits)",
    "sizes": "print(x.shape, len(y))",
    "a file": 'torch.save((x, y), "batch.pt")',
    "by itself": "x = x * 2\nprint(x, y)",
    "added to": "x += 1\ny += 1\nprint(x, y)",
    "by a function behind": "def show():\n    print(x.shape, len(y))\n\n\nshow()",
    "by a nameless function": "show = lambda: print(x.shape, len(y))\nshow()",
    "after one branch": "if fresh:\n    x, y = data[:4]\nprint(x, y)",
}


@pytest.mark.parametrize("behind", READS.values(), ids=READS.keys())
def test_tensors_of_the_batch_are_collected_behind_the_loop(behind: str) -> None:
    after = converted(script(behind))
    assert "        optim_manager.step()\n    x = bmt.gather_samples(x)\n    y = bmt.gather_samples(y)\n" in after
    assert not any(item.code == "BMT037" for item in convert_text(script(behind)).reported)


NOT_THEIRS = {
    "a function's own": "def show():\n    x = y = data[0]\n    print(x, y)\n\n\nshow()",
    "given ones": "def show(x, y):\n    print(x, y)\n\n\nshow(1, 2)",
    "a nameless function's": "show = lambda x, y: print(x, y)\nshow(1, 2)",
    "never called": "def show():\n    print(x, y)",
}


@pytest.mark.parametrize("behind", NOT_THEIRS.values(), ids=NOT_THEIRS.keys())
def test_names_of_functions_are_others(behind: str) -> None:
    assert "gather_samples" not in converted(script(behind))
    assert not told(script(behind), "last batch")


TRIED = """    try:
        for x, y in loader:
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
{ending}
"""
ENDINGS = {
    "finally": "    finally:\n        print(x.mean())",
    "else": "    except KeyboardInterrupt:\n        pass\n    else:\n        print(x.mean())",
    "behind what no error reaches": "    except KeyboardInterrupt:\n        raise\n    print(x.mean())",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_what_stands_behind_in_a_try(ending: str) -> None:
    text = SCRIPT[: SCRIPT.index("    for {target}")] + TRIED.format(ending=ending)
    assert "            optim_manager.step()\n        x = bmt.gather_samples(x)\n" in converted(text)


AFTER_ERRORS = {
    "where it is caught": ("    except KeyboardInterrupt:\n        print('stopped at', x)", 1),
    "behind": ("    except KeyboardInterrupt:\n        pass\n    torch.save((x, y), 'batch.pt')", 2),
    "nothing": ("    except KeyboardInterrupt:\n        print('stopped')", 0),
    "what is new": ("    except KeyboardInterrupt:\n        x = y = 0\n        print(x, y)", 0),
}


@pytest.mark.parametrize(("ending", "count"), AFTER_ERRORS.values(), ids=AFTER_ERRORS.keys())
def test_what_an_error_leaves(ending: str, count: int) -> None:
    text = SCRIPT[: SCRIPT.index("    for {target}")] + TRIED.format(ending=ending)
    assert "gather_samples" not in converted(text)
    assert len(told(text, "last batch")) == count


TRAINS = """

def train():
    for x, y in loader:
        out = net(x)
        loss = F.cross_entropy(out, y)
        opt.zero_grad()
        {step}
        opt.step()
        n = len(x)
        {leaves}


train()
"""
LEAVES = {
    "a batch": ("return x, loss.item()", 1),
    "outputs and targets": ("return out.detach(), y", 2),
    "hits": ("return (out.argmax(1) == y).sum().item(), loss.item()", 2),
    "a size": ("return n", 1),
    "under a test": ("if n:\n            return x", 1),
    "one by one": ("yield x", 1),
    "a loss": ("return loss.item()", 0),
    "its kind": ("return x.dtype, x.device", 0),
    "nothing": ("return", 0),
}


@pytest.mark.parametrize(("leaves", "count"), LEAVES.values(), ids=LEAVES.keys())
def test_what_a_loop_that_trains_gives_back_from_inside(leaves: str, count: int) -> None:
    head = SCRIPT[: SCRIPT.index("for epoch")]
    assert len(told(head + TRAINS.format(step="loss.backward()", leaves=leaves), "last batch")) == count


def test_what_a_loop_gives_back_that_does_not_train_is_left() -> None:
    head = SCRIPT[: SCRIPT.index("for epoch")]
    assert not told(head + TRAINS.format(step="loss.item()", leaves="yield x, y"), "last batch")


GLOBALS = {
    "a batch": ("global x", "print(x.shape)", "    x = bmt.gather_samples(x)\n", 0),
    "outputs": ("global out", "print(out.shape)", "", 1),
    "by another function": ("global x", "def show():\n    return x", "    x = bmt.gather_samples(x)\n", 0),
    "not read": ("global x", "print(1)", "", 0),
    "another function's own": ("global x", "def show(x):\n    return x", "", 0),
    "not global": ("pass", "print(x.shape)", "", 0),
}


@pytest.mark.parametrize(("first", "behind", "line", "count"), GLOBALS.values(), ids=GLOBALS.keys())
def test_what_a_function_leaves_in_globals(first: str, behind: str, line: str, count: int) -> None:
    text = (
        SCRIPT[: SCRIPT.index("for epoch")] + "x = out = None\n" + TRAINS.format(step="loss.backward()", leaves="pass")
    )
    text = text.replace("def train():\n", f"def train():\n    {first}\n") + behind + "\n"
    after = converted(text)
    assert line in after and after.count("gather_samples") == bool(line)
    assert len(told(text, "last batch")) == count


ROWS = {
    "one hot": "rows = F.one_hot(y, 3)",
    "losses of items": 'rows = F.cross_entropy(net(x), y, reduction="none")',
    "a criterion's": "rows = criterion(net(x), y)",
    "chosen": "rows = torch.where(y == 0, x, y)",
    "side by side": "rows = torch.cat([x, x], dim=1)",
    "from the end": "rows = torch.cat((x, y), -1)",
    "bounded": "rows = torch.clamp(x, 0, 1)",
}


@pytest.mark.parametrize("body", ROWS.values(), ids=ROWS.keys())
def test_rows_that_a_pass_makes_are_reported(body: str) -> None:
    made = 'criterion = nn.CrossEntropyLoss(reduction="none")\nfor epoch'
    text = script("print(rows.shape)", body=body).replace("for epoch", made)
    assert told(text, "rows is of this rank's share")


PARTS = {
    "unpacked": ("x, y = batch", ""),
    "moved": ('batch = [b.to("cpu") for b in batch]\nx, y = batch', ""),
    "moved to a tuple": ('batch = tuple(b.to("cpu") for b in batch)\nx, y = batch[0], batch[1]', ""),
    "gone through": ("x, y = [b.float() for b in batch]", ""),
    "gone through, as they are": ("x, y = (b for b in batch)", ""),
    "mapped": ("x, y = map(torch.Tensor.float, batch)", ""),
    "read in places": ("x = batch[0].float()\ny = batch[1]", ""),
    "one tensor": ("x, y = batch, batch[:, 0]", "bmt.total(len(batch))"),
}


@pytest.mark.parametrize(("body", "whole"), PARTS.values(), ids=PARTS.keys())
def test_how_many_parts_a_batch_has_is_no_size(body: str, whole: str) -> None:
    text = script("", "batch", f"{body}\nprint(len(batch))\nseen += len(batch)").replace(
        "for epoch", "seen = 0\nfor epoch"
    )
    after = converted(text)
    assert (whole or "print_rank(len(batch))") in after and after.count("bmt.total(") == 2 * bool(whole)
    assert not [item for item in convert_text(text).reported if item.code == "BMT037"]


def test_what_the_next_pass_reads_in_front_of_the_loop() -> None:
    again = script("").replace("    for x, y", "    if epoch:\n        print(x.mean())\n    for x, y")
    assert "    x = bmt.gather_samples(x)\n" in converted(again)
    assert "gather_samples" not in converted(again.replace("    if epoch", "    x = data[0][0]\n    if epoch"))


def test_what_the_loop_itself_reads_at_its_end_is_reported() -> None:
    text = script("    else:\n        print(x.mean())\n    print(len(x))")
    assert "gather_samples" not in converted(text)
    assert len(told(text, "last batch")) == 1


COUNTED = {
    "a size": ("n = len(x)", "print(n / len(x))", "bmt.sum_loss(n / len(x))"),
    "hits": ("hits = (net(x).argmax(1) == y).sum().item()", "print(hits / len(y))", "bmt.sum_loss(hits / len(y))"),
}


@pytest.mark.parametrize(("body", "behind", "after"), COUNTED.values(), ids=COUNTED.keys())
def test_counts_of_a_share_beside_sizes_of_it(body: str, behind: str, after: str) -> None:
    assert after in converted(script(behind, body=body))
    assert "gather_samples" not in converted(script(behind, body=body))


NUMBERS = "hits = (net(x).argmax(1) == y).sum().item()\nacc = hits / len(y)\nn = len(x)"
SHOWN = {
    "behind the loop": ("    print(hits, acc)", "print(bmt.total(hits), bmt.sum_loss(acc))"),
    "behind the loop around": ("print(hits, acc)", "print(bmt.total(hits), bmt.sum_loss(acc))"),
    "in a test": ("if verbose:\n    print(acc)", "print(bmt.sum_loss(acc))"),
}


@pytest.mark.parametrize(("behind", "after"), SHOWN.values(), ids=SHOWN.keys())
def test_numbers_that_are_shown_behind_any_loop(behind: str, after: str) -> None:
    assert after in converted(script(behind, body=NUMBERS)).replace("bmt.print_rank", "print")
    assert not told(script(behind, body=NUMBERS), "last batch")


USED = {
    "kept": ("    history.append(acc)", 1),
    "the best": ("    if acc > best:\n        best = acc\nprint(best)", 1),
    "made to another": ("    percent = 100 * acc\nprint(percent)", 1),
    "made anew": ("    acc = 0\n    history.append(acc)", 0),
    "a loss's": ("    history.append(loss.item())", 0),
}


@pytest.mark.parametrize(("behind", "count"), USED.values(), ids=USED.keys())
def test_numbers_that_are_used_behind_the_loop_are_reported(behind: str, count: int) -> None:
    assert len(told(script(behind, body=NUMBERS), "last batch")) == count


def test_what_was_made_whole_is_not_reported() -> None:
    body = "seen += len(x)\nhits += (net(x).argmax(1) == y).sum().item()\nprint(len(x))"
    text = script("    acc = hits / seen\n    history.append(acc)", body=body)
    assert "seen += bmt.total(len(x))" in converted(text)
    assert not told(text, "last batch")


def test_parts_of_a_batch_are_reported() -> None:
    text = script("print(net(x))", "batch", 'x = batch["x"].to(device)\ny = batch["y"]')
    assert len(told(text, "last batch")) == 1


def test_another_read_than_the_one_that_is_made_whole_is_reported() -> None:
    text = script("print(pred.shape, (pred == y).sum().item())", body="pred = net(x).argmax(1)")
    assert "bmt.total((pred == y).sum().item())" in converted(text)
    assert len(told(text, "last batch")) == 1


def test_what_a_pass_does_to_them_keeps_their_rows() -> None:
    for body in ("x, y = x.to(device), y.cuda()", "x = x.view(x.size(0), -1)", "x = x.reshape(-1, 4).float()"):
        assert "    x = bmt.gather_samples(x)\n" in converted(script("print(net(x))", body=body)), body
    assert "    x = bmt.gather_samples(x)\n" in converted(script("print(net(x))", "i, (x, y)").replace(
        "in loader", "in enumerate(loader)"
    ))  # fmt: skip


UNKNOWN = {
    "made by the model": ("print(out.std())", "x, y", "out = net(x)"),
    "one of what the model gives": ("print(mean.std())", "x, y", "mean, spread = net(x)"),
    "turned": ("print(net(x))", "x, y", "x = x.transpose(0, 1)"),
    "a dict": ("print(batch)", "batch", 'x, y = batch["x"], batch["y"]'),
    "a part of it": ("print(net(batch[0]))", "batch", "x, y = batch[0], batch[1]"),
    "with its columns": ("print(x)", "x, y", "x = x[:, :4]"),
}


@pytest.mark.parametrize(("behind", "target", "body"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_may_have_no_rows_is_reported(behind: str, target: str, body: str) -> None:
    text = script(behind, target, body)
    assert "gather_samples" not in converted(text)
    told = [item for item in convert_text(text).reported if isinstance(item, Remark) and "last batch" in item.message]
    assert len(told) == 1 and told[0].differs


DRAWN = (
    IMPORTS
    + NET
    + """
torch.manual_seed(0)
net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
X, Y = torch.randn(64, 4), torch.randint(3, (64,))
{taking}
    opt.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
print(F.cross_entropy(net({read}), y).item())
"""
)
TAKING = {
    "drawn": "for i in range(9):\n    rows = torch.randperm(64)[:8]\n    x, y = X[rows], Y[rows]",
    "by a function": "def draw():\n    rows = torch.randint(64, (8,))\n    return X[rows], Y[rows]\n\n\n"
    "for i in range(9):\n    x, y = draw()",
    "one by one": "batches = iter(DataLoader(data, batch_size=8))\nwhile more():\n    x, y = next(batches)",
    "moved": "batches = iter(DataLoader(data, batch_size=8))\nfor i in range(9):\n    x, y = next(batches)\n"
    "    x = x.to(device)",
}


@pytest.mark.parametrize("taking", TAKING.values(), ids=TAKING.keys())
def test_batches_that_no_loop_goes_through(taking: str) -> None:
    after = converted(DRAWN.format(taking=taking, read="x"))
    assert "x = bmt.gather_samples(x)\ny = bmt.gather_samples(y)\n" in after


def test_what_a_function_turns_is_reported() -> None:
    text = DRAWN.format(taking=TAKING["by a function"].replace("X[rows], Y", "X[rows].t(), Y"), read="x")
    assert "gather_samples" not in converted(text)
    assert any("last batch" in item.message for item in convert_text(text).reported if isinstance(item, Remark))


def test_means_and_sums_that_a_pass_makes_are_made_whole_where_they_are_shown() -> None:
    body = "acc = (net(x).argmax(1) == y).float().mean().item()\nn = len(x)"
    after = converted(script("    print(f'{acc:.3f}', n)", body=body))
    assert "{bmt.sum_loss(acc):.3f}" in after and "bmt.total(n)" in after


def test_rows_that_a_loader_pads_are_reported() -> None:
    text = script("print(x.shape)").replace("batch_size=8)", "batch_size=8, collate_fn=pad)")
    assert "gather_samples" not in converted(text)
    assert any("last batch" in item.message for item in convert_text(text).reported if isinstance(item, Remark))


GRADIENTS = {
    "shown": ("x.requires_grad_()", "print(x.grad.abs().mean().item())", 1),
    "added": ("x.requires_grad_()", "x = x + 0.1 * x.grad", 1),
    "its sign": ("x.requires_grad_()", "x = x + 0.1 * x.grad.sign()", 0),
    "cleared": ("x.requires_grad_()", "x.grad.zero_()", 0),
    "a parameter's": ("pass", "print(net.a.weight.grad.norm().item())", 0),
}


@pytest.mark.parametrize(("body", "line", "count"), GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients_of_a_batch_are_of_a_share(body: str, line: str, count: int) -> None:
    assert len(told(script("        " + line, body=body), "world_size() times")) == count


HOOKS = {
    "a lambda": "net.a.register_forward_hook(lambda m, i, o: seen.__setitem__('h', o))",
    "a function": "def keep(module, given, out):\n    seen['h'] = out.detach()\n\n\nnet.a.register_forward_hook(keep)",
    "a list": "net.a.register_forward_hook(lambda m, i, o: seen.append(o))",
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
def test_numbers_of_what_a_hook_has_kept_are_reported(hook: str) -> None:
    text = script("print(float(other.mean()), seen)\nprint(seen['h'].mean().item())")
    assert len(told(text.replace("opt = ", hook + "\nopt = ", 1), "a hook has kept")) == 1


NONLOCALS = {
    "a batch": ("nonlocal x", "print(x.shape)", 1),
    "outputs": ("nonlocal out", "print(out.shape)", 1),
    "by another function": ("nonlocal x", "def show():\n        return x", 1),
    "not read": ("nonlocal x", "print(1)", 0),
    "another function's own": ("nonlocal x", "def show(x):\n        return x", 0),
    "not shared": ("pass", "print(x.shape)", 0),
}


@pytest.mark.parametrize(("first", "behind", "count"), NONLOCALS.values(), ids=NONLOCALS.keys())
def test_what_a_function_leaves_in_the_one_around_it(first: str, behind: str, count: int) -> None:
    inner = TRAINS.format(step="loss.backward()", leaves="pass").replace(
        "def train():\n", f"def train():\n    {first}\n"
    )
    inner = "".join(f"    {line}\n" for line in inner.strip().splitlines())
    text = SCRIPT[: SCRIPT.index("for epoch")] + f"def main():\n    x = out = None\n{inner}    {behind}\n\n\nmain()\n"
    after = converted(text)
    assert len(told(text, "last batch")) + after.count("gather_samples") == count
