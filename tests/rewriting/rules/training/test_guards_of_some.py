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
