"""Rank guards beside which there is another way in, and guards of one rank in each node."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")
net = DDP(torch.nn.Linear(4, 1))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in batches:
    loss = net(x).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
SAVE = "\n    torch.save({'m': net.state_dict()}, 'x.pt')\n"
OPENED = {
    "as torchvision's": (
        "if not args.mp or (args.mp and args.rank % gpus == 0):",
        "if not args.mp or (args.mp):",
    ),
    "without brackets": ("if not args.mp or args.mp and rank == 0:", "if not args.mp or args.mp:"),
    "in a step": (
        "if not args.mp or (args.mp and step % 2 == 0 and dist.get_rank() == 0):",
        "if not args.mp or (args.mp and step % 2 == 0):",
    ),
    "two ways": ("if (a and rank == 0) or (b and rank == 0):", "if (a) or (b):"),
    "either": ("if not args.mp or rank == 0:", ""),
    "in a node": ("if args.rank % gpus == 0:", ""),
    "in a node, and": ("if args.mp and local_rank % gpus == 0:", "if args.mp:"),
    "not of a rank": (
        "if not args.mp or (args.mp and step % gpus == 0):",
        "if not args.mp or (args.mp and step % gpus == 0):",
    ),
}


@pytest.mark.parametrize(("test", "wanted"), OPENED.values(), ids=OPENED.keys())
def test_all_ranks_enter(test: str, wanted: str) -> None:
    after = converted(HEAD + test + SAVE)
    indented = "    " if wanted else ""
    saved = f"{indented}bmt.save_checkpoint({{'m': net.state_dict()}}, 'x.pt')\n"
    assert after.endswith(f"{wanted}\n{saved}") and "rank ==" not in after and "rank %" not in after


def test_what_prints_there_is_one_ranks() -> None:
    after = converted(f"{HEAD}if not args.mp or (args.mp and args.rank % gpus == 0):\n    print(1)\n")
    assert after.endswith("    bmt.print_rank(1)\n")


@pytest.mark.parametrize("test", ["rank == size - 1 or (args.mp and rank == 0)", "rank % 2 == 0"])
def test_the_other_way_in_must_be_equal_on_all_ranks(test: str) -> None:
    result = convert_text(f"{HEAD}if {test}:{SAVE}")
    assert "BMT039" in {finding.code for finding in result.reported}


@pytest.mark.parametrize(
    "line",
    [
        "with open(os.path.join(model_folder, 'a.yml'), 'w') as file:\n            file.write('a')",
        "shutil.copy('a.yml', model_folder)",
        "os.makedirs(model_folder, exist_ok=True)",
    ],
)
def test_the_folder_of_a_model_is_no_model(line: str) -> None:
    function = f"\n\ndef keep(model_folder):\n    if rank == 0:\n        {line}\n\n\nkeep('out')\n"
    assert function in converted("import os\nimport shutil\n" + HEAD + function)


FIRST = [
    "RANK in {-1, 0}", "RANK in (0, -1)", "LOCAL_RANK <= 0", "RANK < 1", "0 == RANK or -1 == RANK", "0 >= RANK",
    "not RANK > 0", "not LOCAL_RANK >= 1", "os.environ.get('RANK', '0') == '0'", "rank in (None, 0)", "leads",
]  # fmt: skip


@pytest.mark.parametrize("test", FIRST)
def test_what_no_launcher_started_is_the_first_rank_too(test: str) -> None:
    head = HEAD + "RANK = int(os.getenv('RANK', -1))\nleads = RANK == -1 or RANK == 0\n"
    after = converted(f"{head}if {test}:{SAVE}if {test}:\n    print(1)\n")
    assert after.endswith(f"\nbmt.save_checkpoint({{'m': net.state_dict()}}, 'x.pt')\nif {test}:\n    print(1)\n")


@pytest.mark.parametrize("test", ["RANK == -1", "RANK < 0", "RANK != -1", "LOCAL_RANK > -1", "0 <= RANK", "-1 == RANK"])
def test_whether_there_is_a_launcher_is_no_guard_of_one_rank(test: str) -> None:
    text = f"{HEAD}if {test} and step:{SAVE}"
    assert f"if {test} and step:\n    bmt.save_checkpoint" in converted(text)
    assert not any("launcher" in found.message or "torchrun" in found.message for found in convert_text(text).reported)
    alone = "import torch\nnet = torch.nn.Linear(4, 1)\n" + text[text.index("opt =") :]
    said = [found for found in convert_text(alone).reported if f"{test} has the other answer" in found.message]
    assert [found.code for found in said] == ["BMT031"]


def test_a_model_that_is_wrapped_without_a_launcher_is_that_of_all_ranks() -> None:
    text = (
        HEAD
        + "if cuda and RANK == -1:\n    net = torch.nn.DataParallel(net)\nif RANK in {-1, 0}:\n    net.eval()"
        + SAVE
    )
    assert "\nnet.eval()\nbmt.save_checkpoint" in converted(text)


def test_a_copy_that_one_rank_makes_is_made_by_all() -> None:
    average = "class Average:\n    def __init__(self, model):\n        self.model = copy.deepcopy(model).eval()\n\n\n"
    text = f"import copy\n{HEAD}{average}ema = Average(net) if RANK in {{-1, 0}} else None\n"
    text += "name = 'a' if rank == 0 else None\n"
    after = converted(text + "if RANK in {-1, 0}:" + SAVE.replace("net.", "ema.model."))
    assert "\nema = Average(net)\n" in after and "name = 'a' if rank == 0 else None\n" in after
    assert converted(after) == after


def test_a_loss_that_one_rank_averages_is_averaged_by_all() -> None:
    head, _, step = HEAD.partition("for x in")
    keeps = "    if RANK in {-1, 0}:\n        kept = 0.9 * kept + 0.1 * loss.detach()\n        print(x.shape)\n"
    after = converted(
        f"{head}kept = torch.zeros(1)\nfor x in{step}{keeps}if RANK in {{-1, 0}}:\n    print(kept.item()){SAVE}"
    )
    assert "    kept = 0.9 * kept + 0.1 * loss.detach()\n    bmt.print_rank(x.shape)\n" in after
    assert "bmt.print_rank(bmt.sum_loss(kept).item())" in after


@pytest.mark.parametrize("test", ["rank not in [-1, 0]", "rank != 0", "RANK > 0"])
def test_barriers_of_all_but_one_are_paired(test: str) -> None:
    first = f"def first(rank):\n    if {test}:\n        dist.barrier()\n    yield\n"
    first += "    if rank == 0:\n        dist.barrier()\n"
    assert (
        f"    if {test}:\n        bmt.synchronize()\n    yield\n    if rank == 0:\n        bmt.synchronize()\n"
        in converted(HEAD + first)
    )
