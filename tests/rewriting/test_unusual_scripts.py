# ruff: noqa: E501 - tables of code are easier to read on one line
"""Scripts in styles that the other tests do not have: where they start, what they open, what they pickle."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

from .helpers import converted

HEAD = "import torch\n\n\nclass Net(torch.nn.Module):\n    pass\n\n\n"
TRAIN = """    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(1).mean()
    loss.backward()
    optimizer.step()
"""


def body(text: str) -> str:
    """The statements of ``train`` after conversion."""
    return converted(text).partition("train(")[2]


@pytest.mark.parametrize(
    ("head", "call"),
    [
        ("import fire\n", "fire.Fire(train)"),
        ("import fire\n", 'fire.Fire({"train": train})'),
        ("from absl import app\n", "app.run(train)"),
        ("import typer\n", "typer.run(train)"),
    ],
)
def test_a_launcher_that_is_handed_the_function_starts_it(head: str, call: str) -> None:
    text = f'{head}{HEAD}def train():\n{TRAIN}\n\nif __name__ == "__main__":\n    {call}\n'
    assert "):\n    bmt.init_distributed()\n    model = Net()" in body(text)


@pytest.mark.parametrize(
    ("head", "decorator", "call"),
    [
        ("import click\n", "@click.command()", "train()"),
        ("import typer\napp = typer.Typer()\n", "@app.command()", "app()"),
        ("import hydra\n", "@hydra.main(config_path=None)", "train()"),
    ],
)
def test_a_decorated_function_is_where_the_script_starts(head: str, decorator: str, call: str) -> None:
    text = f'{head}{HEAD}{decorator}\ndef train():\n{TRAIN}\n\nif __name__ == "__main__":\n    {call}\n'
    assert "):\n    bmt.init_distributed()\n    model = Net()" in body(text)


def test_two_commands_start_the_ranks_before_either() -> None:
    other = TRAIN.replace("Net()", "Net().eval()")
    text = f"import typer\napp = typer.Typer()\n{HEAD}@app.command()\ndef train():\n{TRAIN}\n\n@app.command()\ndef tune():\n"
    text += f'{other}\n\nif __name__ == "__main__":\n    app()\n'
    assert converted(text).endswith("    bmt.init_distributed()\n    app()\n")


def test_an_installed_command_starts_where_it_reads_its_arguments() -> None:
    text = f"import argparse\n{HEAD}def train():\n    args = argparse.ArgumentParser().parse_args()\n{TRAIN}"
    assert "parse_args()\n    bmt.init_distributed()\n    model" in body(text)


def test_statements_beside_a_main_guard_run_first() -> None:
    text = HEAD + TRAIN.replace("    ", "") + '\n\nif __name__ == "__main__":\n    print(1)\n'
    assert "bmt.init_distributed()\nmodel = Net()" in converted(text)


def test_a_module_that_others_import_starts_under_its_guard_only(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        f'{HEAD}print("imported")\n\n\ndef train():\n{TRAIN}\n\nif __name__ == "__main__":\n    train()\n'
    )
    (tmp_path / "b.py").write_text("from a import train\n\ntrain()\n")
    results = convert_paths([tmp_path / "a.py", tmp_path / "b.py"], Options(), [tmp_path])
    after = {result.path.name: result.after.decode() for result in results}
    assert "def train():\n    if not bmt.is_initialized():\n        bmt.init_distributed()\n" in after["a.py"]
    assert "bmt.init_distributed()" not in after["a.py"].partition("def train")[0]


def test_training_that_no_script_starts_is_pointed_out() -> None:
    result = convert_text(f"{HEAD}def train():\n{TRAIN}")
    assert any("no script here starts this training" in finding.message for finding in result.reported)
    result = convert_text(f"{HEAD}def train():\n{TRAIN}\n\ntrain()\n")
    assert not any("no script here starts this training" in finding.message for finding in result.reported)


def test_the_import_stands_in_front_of_its_first_use() -> None:
    text = "import torch\n\ntorch.manual_seed(1)\nprint(1)\nimport json\n\nfrom os import path\n\n"
    after = converted(text + HEAD.removeprefix("import torch\n") + TRAIN.replace("    ", ""))
    assert after.startswith("import torch\nimport bmtrain as bmt\n\nbmt.init_distributed(seed=1)\n")
    assert after.count("import bmtrain") == 1


LOOP = HEAD + "torch.manual_seed(1)\n" + TRAIN.replace("    ", "")


def test_a_line_of_a_log_has_its_loss_computed_by_all_ranks_first() -> None:
    log = 'with open("log", "a") as f:\n    f.write(f"{loss.item():.3f}")\n'
    wanted = 'value = bmt.sum_loss(loss).item()\nif bmt.rank() == 0:\n    with open("log", "a") as f:\n        f.write(f"{value:.3f}")\n'
    assert converted(LOOP + log).endswith("\n" + wanted)
    guarded = "if rank == 0:\n    " + log.replace("\n    f", "\n        f")
    assert converted(LOOP + guarded).endswith("\n" + wanted)


def test_a_file_that_is_written_with_what_its_loop_computes_keeps_its_guard() -> None:
    text = (
        'if rank == 0:\n    with open("log", "a") as f:\n        for x in data:\n            f.write(str(model(x)))\n'
    )
    result = convert_text(LOOP + text)
    assert not result.changed
    assert any("while one rank has a file open" in finding.message for finding in result.reported)


def test_a_checkpoint_written_through_an_open_file() -> None:
    one = 'with open("m.pt", "wb") as f:\n    torch.save(model.state_dict(), f)\n'
    assert converted(LOOP + one).endswith('bmt.save(model, "m.pt")\n')
    two = one + "    torch.save(1, f)\n"
    wanted = 'value = model.state_dict()\nif bmt.rank() == 0:\n    with open("m.pt", "wb") as f:\n        torch.save(value, f)\n'
    assert wanted in converted(LOOP + two)
    memory = "import io\nbuffer = io.BytesIO()\ntorch.save(model.state_dict(), buffer)\n"
    assert converted(LOOP + memory).endswith(memory)


def test_loaders_of_two_phases() -> None:
    loaders = "from torch.utils.data import DataLoader\nloaders = {x: DataLoader(data[x]) for x in ['train', 'val']}\n"
    wanted = (
        "{x: bmt.shard_loader(DataLoader(data[x])) if x == 'train' else DataLoader(data[x]) for x in ['train', 'val']}"
    )
    assert wanted in converted(LOOP + loaders)


def test_averaged_models_and_what_depends_on_the_whole_batch() -> None:
    swa = "from torch.optim.swa_utils import AveragedModel\naveraged = AveragedModel(model)\naveraged.update_parameters(model)\n"
    wanted = "with bmt.gathered(averaged, write=True), bmt.gathered(model):\n    averaged.update_parameters(model)\n"
    assert converted(LOOP + swa).endswith(wanted)
    summed = "torch.nn.functional.mse_loss(x, y, reduction='sum')\nlabels = torch.arange(x.shape[0])\n"
    assert not any("rank's share" in finding.message for finding in convert_text(LOOP + summed).reported)
    loader = "from torch.utils.data import DataLoader\nloader = DataLoader(1)\n"
    messages = [finding.message for finding in convert_text(LOOP + loader + summed).reported]
    assert any("sum over a rank's share" in message for message in messages)
    assert any("compared with each other" in message for message in messages)


def test_tensors_of_a_state_dict_that_are_written() -> None:
    text = (
        "import copy\nema = copy.deepcopy(model)\nstate = model.state_dict()\nfor k, v in ema.state_dict().items():\n"
    )
    after = converted(LOOP + text + "    v *= 0.9\n    v += 0.1 * state[k].detach()\n")
    assert after.endswith(
        "state = model.state_dict(keep_vars=True)\n"
        "with torch.no_grad(), bmt.gathered(ema, write=True), bmt.gathered(model):\n"
        "    for k, v in ema.state_dict(keep_vars=True).items():\n"
        "        v *= 0.9\n        v += 0.1 * state[k].detach()\n"
    )
    assert "gathered" not in converted(LOOP + text + "    show(v.mean())\n")
    pairs = "for a, b in zip(ema.state_dict().values(), model.state_dict().values()):\n    a.copy_(0.9 * a + 0.1 * b)\n"
    assert "bmt.gathered(ema, write=True), bmt.gathered(model):" in converted(LOOP + pairs)


def test_lines_of_a_log_share_one_test_of_the_rank() -> None:
    log = 'writer.add_scalar("a", 1)\nwriter.add_scalar("b",\n    2)\nwriter.add_scalar("c", loss.item())\n'
    assert converted(LOOP + log).endswith(
        'if bmt.rank() == 0:\n    writer.add_scalar("a", 1)\n    writer.add_scalar("b",\n        2)\n'
        'value = bmt.sum_loss(loss).item()\nif bmt.rank() == 0:\n    writer.add_scalar("c", value)\n'
    )
    inner = "for name, p in model.named_parameters():\n    writer.add_histogram(name, p)\n    writer.add_scalar(name, p.max())\n"
    assert converted(LOOP + inner).endswith(
        "with bmt.gathered(model):\n    for name, p in model.named_parameters():\n        if bmt.rank() == 0:\n"
        "            writer.add_histogram(name, p)\n            writer.add_scalar(name, p.max())\n"
    )
    skipped = log.replace('"b",\n    2)', '"b", 2)  # bmt: skip')
    assert '    writer.add_scalar("a", 1)\nwriter.add_scalar("b", 2)  # bmt: skip\n' in converted(LOOP + skipped)


def test_a_log_that_is_written_before_the_model_is_made_starts_the_ranks() -> None:
    log = 'writer.add_text("a", "b")\n'
    assert converted(HEAD + log + LOOP.removeprefix(HEAD)).index("init_distributed") < len(HEAD) + 60


def test_a_script_in_a_package_whose_statements_train(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "ppo.py").write_text('if __name__ == "__main__":\n    size = 1\n' + LOOP)
    (result,) = [r for r in convert_paths([tmp_path / "ppo.py"], Options(), [tmp_path]) if r.changed]
    assert b"bmt.init_distributed(seed=1)" in result.after


def test_the_list_of_clipped_parameters_is_one_list() -> None:
    clip = "torch.nn.utils.clip_grad_norm_(list(model.head.parameters()), 1.0)\n"
    assert '([{"params": list(model.head.parameters())}], 1.0)' in converted(LOOP.replace("loss.b", clip + "loss.b"))


def test_values_of_data_that_nobody_shares_are_the_scripts_own() -> None:
    text = LOOP.replace("loss.backward()", "for x in data:\n    loss.backward()\n    seen += len(x)")
    assert "seen += len(x)" in converted(text)
    shared = text.replace("data", "loader").replace(
        "import torch\n", "import torch\nfrom torch.utils.data import DataLoader\nloader = DataLoader(1)\n", 1
    )
    assert "seen += bmt.total(len(x))" in converted(shared)


@pytest.mark.parametrize(
    "text",
    [
        'loaders = {"train": 1, "val": DataLoader(data)}\n',
        "def get_test_loaders():\n    yield DataLoader(data)\n",
        "def predict(data):\n    loader = DataLoader(data)\n    return list(loader)\n",
    ],
)
def test_loaders_of_evaluations(text: str) -> None:
    after = converted(LOOP + "from torch.utils.data import DataLoader\n" + text)
    assert after.endswith(text)
    shared = text.replace("val", "train").replace("test", "train").replace("predict", "feed")
    assert "bmt.shard_loader(DataLoader(data))" in converted(
        LOOP + "from torch.utils.data import DataLoader\n" + shared
    )


def test_views_of_parameters_that_are_written() -> None:
    text = "for p in model.parameters():\n    p.detach().zero_()\n"
    assert converted(LOOP + text).endswith(
        "with bmt.gathered(model, write=True):\n    " + text.replace("\n    p", "\n        p")
    )


def test_values_of_a_validation_between_the_epochs_are_not_of_a_share() -> None:
    text = "from torch.utils.data import DataLoader\nloader = DataLoader(1)\nfor epoch in range(3):\n    for x in loader:\n"
    text += (
        "        model(x).mean().backward()\n    for x in val_loader:\n        hits = (model(x) == 1).sum().item()\n"
    )
    assert "BMT037" not in {finding.code for finding in convert_text(LOOP + text).reported}


def test_what_each_rank_says_of_itself_is_said_by_each() -> None:
    assert converted(LOOP + 'rank = 1\nprint(f"rank {rank}: {loss}")\n').count("print_rank") == 0


def test_a_loss_that_is_moved_before_it_is_read() -> None:
    assert converted(LOOP + "total = loss.to('cpu').item()\n").endswith("total = bmt.sum_loss(loss).to('cpu').item()\n")


def test_a_function_that_returns_a_container_of_modules() -> None:
    make = "def make(depth):\n    net = torch.nn.Sequential(*[Net() for _ in range(depth)])\n    return net\n\n\n"
    after = converted(HEAD + make + TRAIN.replace("    ", "").replace("Net()", "make(2)"))
    assert "model = bmt.BMTrainModelWrapper(make(2))" in after


def test_parameters_that_are_broadcast() -> None:
    text = "import torch.distributed as dist\nwith torch.no_grad():\n    for p in model.parameters():\n"
    assert converted(LOOP + text + "        dist.broadcast(p, src=0)\n").endswith(
        "with torch.no_grad():\n    with bmt.gathered(model, write=True):\n        for p in model.parameters():\n"
        "            p.copy_(bmt.distributed.broadcast(p, 0))\n"
    )


def test_a_test_of_a_count_above_a_checkpoint_is_pointed_out() -> None:
    text = "from torch.utils.data import DataLoader\nloader = DataLoader(1)\nfor x in loader:\n"
    text += "    model(x).mean().backward()\n    hits += score(model(x))\nshare = hits / 8\n"
    saved = "if share > best:\n    torch.save(model.state_dict(), 'x')\n"
    told = [finding.message for finding in convert_text(LOOP + text + saved).reported]
    assert any("model.state_dict(...) waits forever" in message for message in told)
    told = [finding.message for finding in convert_text(LOOP + text + saved.replace("share", "epoch")).reported]
    assert not any("waits forever" in message for message in told)
    text = text.replace("score(model(x))", "(model(x) == 1).sum().item()")
    told = [finding.message for finding in convert_text(LOOP + text + saved).reported]
    assert not any("waits forever" in message for message in told)
