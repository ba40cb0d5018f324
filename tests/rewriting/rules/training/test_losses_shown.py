"""Every spelling of a loss's value is the mean over the ranks; what is none stays."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import csv
import numpy as np
import torch

net = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(net.parameters())
for x, y in loader:
    loss = torch.nn.functional.mse_loss(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
READ = [
    "loss.detach().cpu().numpy().item()",
    "loss.cpu().detach().numpy()",
    "float(loss.data)",
    "float(loss.detach().cpu())",
    "loss.data.tolist()",
    "loss.data.cpu().numpy().tolist()",
    "loss.detach().numpy()",
    "loss.data.item()",
    "loss.to('cpu').detach().squeeze().item()",
    "np.asarray(loss.detach().cpu())",
    "str(loss.detach())",
]


@pytest.mark.parametrize("reading", READ)
def test_a_value_is_read(reading: str) -> None:
    wanted = f"    value = {reading.replace('loss', 'bmt.sum_loss(loss)', 1)}\n"
    assert wanted in converted(f"{HEAD}    value = {reading}\n")


SHOWN = [
    "print(loss.data)",
    "print(loss.detach().cpu().numpy())",
    'print(f"{loss.detach():.3f}")',
    'print(f"{loss.detach().cpu().numpy():.3f}")',
    'print("%.3f" % loss.data)',
    'print("%d %.3f" % (1, loss.detach()))',
    'print("{:.3f}".format(loss.data))',
    'print("{v:.3f}".format(v=loss.data))',
    "history.append(loss.detach())",
    "history.append(loss.data.cpu().numpy())",
    "history.append((1, loss.detach()))",
    'logger.info("loss %.3f", loss)',
]


@pytest.mark.parametrize("statement", SHOWN)
def test_a_value_is_shown(statement: str) -> None:
    wanted = "bmt.sum_loss(loss)".join(statement.rsplit("loss", 1)).replace("print(", "bmt.print_rank(")
    assert f"    {wanted}\n" in converted(f"{HEAD}    {statement}\n")


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ('writer.add_scalar("loss", loss, 1)', 'writer.add_scalar("loss", value, 1)'),
        ("table.writerow([1, loss.detach().cpu().numpy()])", "table.writerow([1, value])"),
        ("table.writerow([1, loss.data])", "table.writerow([1, value])"),
    ],
)
def test_a_writer_of_one_rank_gets_what_all_have_made(statement: str, shown: str) -> None:
    after = converted(f"{HEAD}    {statement}\n")
    assert f"    if bmt.rank() == 0:\n        {shown}\n" in after and "value = bmt.sum_loss(loss)" in after


def test_the_mean_is_made_before_one_rank_opens_its_file() -> None:
    after = converted(f'{HEAD}    with open("log", "a") as file:\n        file.write(f"{{loss:.3f}}")\n')
    assert "    value = bmt.sum_loss(loss)\n    if bmt.rank() == 0:\n" in after and 'write(f"{value:.3f}")' in after


KEPT = [
    "total = total + loss",
    "again = loss.detach()",
    "other.detach().cpu().numpy()",
    "x.data.tolist()",
    "print(x.detach().numpy())",
    'f"{x.data}"',
    "history.append(x.detach())",
    "loss.data.zero_()",
    "losses = {}",
    "fresh = x.shape[0] - y.shape[0]\n    logger.info('%d', fresh)",
]


@pytest.mark.parametrize("statement", KEPT)
def test_what_is_no_value_of_a_loss_stays(statement: str) -> None:
    assert "sum_loss" not in converted(f"{HEAD}    {statement}\n")


def test_a_loss_that_has_become_a_number_is_averaged_once() -> None:
    after = converted(f"{HEAD}    loss = loss.detach().cpu().numpy()\n    print(loss, f'{{loss:.3f}}')\n")
    assert after.count("sum_loss") == 1


ROWS = {
    "a row": ('rows.append([1, f"{loss.item():.3f}"])', 'rows.append([1, f"{bmt.sum_loss(loss).item():.3f}"])'),
    "text": ('rows.append(f"{loss.item():.3f}")', 'rows.append(f"{bmt.sum_loss(loss).item():.3f}")'),
    "text by %": ('rows.append("%.3f" % loss.item())', 'rows.append("%.3f" % bmt.sum_loss(loss).item())'),
    "text by format": ('rows.append("{}".format(loss.item()))', 'rows.append("{}".format(bmt.sum_loss(loss).item()))'),
    "a dict": (
        'rows.append({"n": 1, "loss": loss.item()})',
        'rows.append({"n": 1, "loss": bmt.sum_loss(loss).item()})',
    ),
    "a row in a row": (
        "rows.append([1, [round(loss.item(), 3)]])",
        "rows.append([1, [round(bmt.sum_loss(loss).item(), 3)]])",
    ),
}


@pytest.mark.parametrize(("before", "after"), ROWS.values(), ids=ROWS.keys())
def test_rows_hold_one_value_for_all_ranks(before: str, after: str) -> None:
    result = convert_text(f"{HEAD}    {before}\n")
    assert f"    {after}\n" in result.after.decode()
    assert not [
        finding for finding in result.reported if getattr(finding, "differs", False) and finding.code != "BMT023"
    ]


LISTS = {
    "a list": ("history.append(loss)", "history.append(bmt.sum_loss(loss))"),
    "a table": ('history["loss"].append(loss)', 'history["loss"].append(bmt.sum_loss(loss))'),
    "a row": ("history.append((step, loss))", "history.append((step, bmt.sum_loss(loss)))"),
    "a multiple": ("history.append(loss * 4)", "history.append(bmt.sum_loss(loss) * 4)"),
    "its negative": ("history.append(-loss)", "history.append(-bmt.sum_loss(loss))"),
    "a list of one": ("history.extend([loss])", "history.extend([bmt.sum_loss(loss)])"),
    "in front": ("history.insert(0, loss)", "history.insert(0, bmt.sum_loss(loss))"),
    "a place": ("history[step] = loss", "history[step] = bmt.sum_loss(loss)"),
    "an entry": ('last["loss"] = loss', 'last["loss"] = bmt.sum_loss(loss)'),
}


@pytest.mark.parametrize(("before", "after"), LISTS.values(), ids=LISTS.keys())
def test_a_loss_that_was_trained_on_is_kept_as_that_of_all_ranks(before: str, after: str) -> None:
    assert f"    {after}\n" in converted(f"{HEAD}    {before}\n")


@pytest.mark.parametrize("behind", ["torch.stack(history).mean().backward()", "whole = sum(history)\nwhole.backward()"])
def test_a_list_that_is_trained_on_stays(behind: str) -> None:
    assert "append(loss)" in converted(f"{HEAD}    history.append(loss)\n{behind}\n")


def test_a_loss_that_another_loop_trains_on_stays() -> None:
    text = HEAD.replace("    loss = ", "    for part in x:\n        history.append(loss)\n    loss = ")
    assert "append(loss)" in converted(text)


SHOWN_BEHIND = [
    "torch.stack(history).mean().item()", "sum(history) / len(history)", "float(sum(history)) / len(history)",
    "torch.tensor(history).mean()", "[one.item() for one in history]",
]  # fmt: skip


@pytest.mark.parametrize("kept", ["loss", "loss.detach()", "loss.item()"])
@pytest.mark.parametrize("shown", SHOWN_BEHIND)
def test_what_is_shown_of_a_list_that_holds_the_batchs_needs_no_word(shown: str, kept: str) -> None:
    head = HEAD.replace("for x, y in loader", "history = []\nfor x, y in loader")
    text = f"{head}    history.append({kept})\n    if step % 9 == 0:\n        print({shown})\n"
    result = convert_text(text)
    assert "append(bmt.sum_loss(loss)" in result.after.decode() and "sum_loss(sum" not in result.after.decode()
    assert not [found.message for found in result.reported if "share of the data" in found.message]


ALIASES = {
    "itself": ("last = loss", "print(last.item())", "bmt.sum_loss(last).item()"),
    "cut off": ("last = loss.detach()", "print(float(last))", "bmt.sum_loss(last)"),
    "in a text": ("last = loss", 'print("%.3f" % last)', '"%.3f" % bmt.sum_loss(last)'),
}


@pytest.mark.parametrize(("named", "shown", "after"), ALIASES.values(), ids=ALIASES.keys())
def test_a_loss_by_another_name(named: str, shown: str, after: str) -> None:
    assert after in converted(f"{HEAD}    {named}\n{shown}\n")


BESIDE = {
    "collected": ("rows.append({loss}.item())", "rows.append(bmt.sum_loss({loss}.item()))"),
    "shown": ("print({loss}.item())", "bmt.print_rank(bmt.sum_loss({loss}.item()))"),
    "parts as an array": (
        "rows.append(torch.stack([{loss}, {loss}]).detach().numpy())",
        "rows.append(bmt.sum_loss(torch.stack([{loss}, {loss}]).detach().numpy()))",
    ),
}


@pytest.mark.parametrize("function", ["torch.nn.functional.l1_loss(net(x), y)", "torch.nn.HuberLoss()(net(x), y)"])
@pytest.mark.parametrize(("before", "after"), BESIDE.values(), ids=BESIDE.keys())
def test_a_loss_beside_that_which_is_trained_on(function: str, before: str, after: str) -> None:
    head = HEAD.replace("in loader", "in torch.utils.data.DataLoader(data, batch_size=8)")
    assert f"    {after.format(loss=function)}\n" in converted(f"{head}    {before.format(loss=function)}\n")


@pytest.mark.parametrize(
    "function", ["pairwise_distance(net(x), y)", "normalize(net(x))", "l1_loss(net(x), y, reduction='none')"]
)
def test_rows_of_functions_beside_losses_are_no_means(function: str) -> None:
    head = HEAD.replace("in loader", "in torch.utils.data.DataLoader(data, batch_size=8)")
    after = converted(f"{head}    rows.append(torch.nn.functional.{function}.detach())\n")
    assert "sum_loss" not in after


OF_OTHER_NAMES = ["(loss / 2).backward()", "(0.5 * loss).backward()", "scaler.scale(loss / 2).backward()"]


@pytest.mark.parametrize("backward", OF_OTHER_NAMES)
def test_a_loss_of_terms(backward: str) -> None:
    head = HEAD.replace(
        "    loss = torch.nn.functional.mse_loss(net(x), y)\n",
        "    ce = torch.nn.functional.mse_loss(net(x), y)\n    loss = ce + 0.1 * ce.square()\n",
    )
    text = head.replace("loss.backward()", backward)
    if "scaler" in backward:
        text = text.replace("for x", "scaler = torch.amp.GradScaler()\nfor x")
        text = text.replace("opt.step()", "scaler.step(opt)\n    scaler.update()")
    after = converted(f"{text}    print(loss.item(), ce.item())\n")
    assert "    bmt.print_rank(bmt.sum_loss(loss).item(), bmt.sum_loss(ce).item())\n" in after


@pytest.mark.parametrize("made", ["os.path.splitext(path)[0] + '.pt'", "sizes[0] * 2", "names[0] + names[1]"])
def test_an_entry_with_something_is_no_loss(made: str) -> None:
    text = "import os\nimport torch\nnet = torch.nn.Linear(4, 1)\nopt = torch.optim.Adam(net.parameters())\n"
    text += f"kept = {made}\n"
    text += "for x in loader:\n    loss = net(x).mean()\n    loss.backward()\n    opt.step()\nprint('kept %s' % kept)\n"
    assert "bmt.print_rank('kept %s' % kept)" in converted(text)


@pytest.mark.parametrize("reading", ["loss.item()", "float(loss)", "loss.detach().item()"])
@pytest.mark.parametrize(
    "use",
    ["print(value)", "history.append(value)", 'print(f"{value:.3f}")', "total += value", "rows.append((1, value))"],
)
def test_a_number_that_has_a_name_is_averaged_once(reading: str, use: str) -> None:
    after = converted(f"history, rows, total = [], [], 0.0\n{HEAD}    value = {reading}\n    {use}\n")
    assert after.count("bmt.sum_loss(") == 1 and "bmt.sum_loss(value)" not in after


@pytest.mark.parametrize("use", ["print(value.item())", "history.append(value.item())"])
def test_a_loss_that_has_another_name_is_averaged_where_it_is_read(use: str) -> None:
    loader = "from torch.utils.data import DataLoader\nloader, history = DataLoader(data, batch_size=8), []\n"
    assert "bmt.sum_loss(value" in converted(f"{loader}{HEAD}    value = loss.detach()\n    {use}\n")


def test_what_a_loss_decides_may_be_counted() -> None:
    """All ranks have the same number, and so the same count; of what a share decides it is said."""
    loader = "from torch.utils.data import DataLoader\nloader = DataLoader(data, batch_size=8)\nskipped = 0\n"
    for test, said in (("value > 9", 0), ("x.max() > 9", 1)):
        text = f"{loader}{HEAD}    value = loss.item()\n    if {test}:\n        skipped += 1\n"
        found = [f.message for f in convert_text(text).reported if f.code == "BMT037"]
        assert len(found) == said and all(message.startswith("skipped may be of") for message in found)


@pytest.mark.parametrize("start", ["0", "0.0", "0."])
@pytest.mark.parametrize("grown", ["loss += part", "loss = loss + part"])
@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        ("print('%.4f' % loss)", "bmt.print_rank('%.4f' % bmt.sum_loss(loss))"),
        ("print(f'{loss:.4f}')", "bmt.print_rank(f'{bmt.sum_loss(loss):.4f}')"),
        ("history.append(loss.item())", "history.append(bmt.sum_loss(loss).item())"),
    ],
)
def test_a_loss_that_starts_from_nothing_is_one(start: str, grown: str, shown: str, wanted: str) -> None:
    parts = f"    loss = {start}\n    for part in (net(x).mean(), net(y).mean()):\n        {grown}\n"
    text = HEAD.replace("    loss = torch.nn.functional.mse_loss(net(x), y)\n", parts) + f"    {shown}\n"
    assert wanted in converted(text)


@pytest.mark.parametrize("start", ["None", "1.0"])
def test_a_loss_that_may_be_another_number_stays(start: str) -> None:
    text = HEAD.replace("for x, y", f"loss = {start}\nfor x, y") + "print(loss)\n"
    assert "sum_loss" not in converted(text)
