# ruff: noqa: E501 - tables of code are easier to read on one line
"""The GPUs that a script chooses hold where each rank gets one; else ranks take those of the launch."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from rewriter.convert import convert_text
from rewriter.types import Remark

from ...helpers import converted

SCRIPT = """import os
import torch

{choice}
net = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
net(torch.ones(2, 2)).sum().backward()
optimizer.step()
"""
CHOICES = {
    "a number": ('os.environ["CUDA_VISIBLE_DEVICES"] = "3"', "3", ("3", "old", "old")),
    "an option": ('os.environ["CUDA_VISIBLE_DEVICES"] = args.gpu', "3", ("3", "old", "old")),
    "an option under a test": ('if args.gpu:\n    os.environ["CUDA_VISIBLE_DEVICES"] = args.gpu', "3", ("3", "old", "old")),
    "as a text": ('os.environ["CUDA_VISIBLE_DEVICES"] = str(args.gpu)', 3, ("3", "old", "old")),
    "formatted": ('os.environ["CUDA_VISIBLE_DEVICES"] = "%d" % args.gpu', 3, ("3", "old", "old")),
    "in an f-string": ("os.environ['CUDA_VISIBLE_DEVICES'] = f'{args.gpu}'", 3, ("3", "old", "old")),
    "in an f-string of a name": ("gpu = args.gpu\nos.environ['CUDA_VISIBLE_DEVICES'] = f'{gpu}'", 3, ("3", "old", "old")),
    "over lines": ('os.environ["CUDA_VISIBLE_DEVICES"] = str(\n    args.gpu) if args.gpu else args.gpu', 3, ("3", "old", "old")),
    "over lines, with a remark": ('os.environ["CUDA_VISIBLE_DEVICES"] = ",".join([\n    str(i)  # one\n    for i in args.gpu\n])', [4, 5], ("4,5", "4,5", "old")),
    "a text over lines": ('os.environ["CUDA_VISIBLE_DEVICES"] = """3""".strip(\n)', 3, ("3", "old", "old")),
    "as many": ('os.environ["CUDA_VISIBLE_DEVICES"] = "4,5"', None, ("4,5", "4,5", "old")),
    "as many, listed": (
        'os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(i) for i in args.gpu)', [4, 5], ("4,5", "4,5", "old"),
    ),
    "a default": ('os.environ.setdefault("CUDA_VISIBLE_DEVICES", "3")', None, ("old", "old", "old")),
    "none": ('os.environ["CUDA_VISIBLE_DEVICES"] = ""', None, ("", "", "")),
    "the CPU": ('os.environ["CUDA_VISIBLE_DEVICES"] = "-1"', None, ("-1", "-1", "-1")),
}  # fmt: skip
LEFT = {
    "chosen anew": 'os.environ["CUDA_VISIBLE_DEVICES"] = free_gpu()',
    "read again": 'os.environ["CUDA_VISIBLE_DEVICES"] = gpu\ncount = len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))',
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gpus_are_those_of_the_script_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, name: str, ranks: int
) -> None:
    choice, gpu, expected = CHOICES[name]
    after = converted(SCRIPT.format(choice=choice))
    chosen = after[after.index("\n", after.index("import bmtrain")) : after.index("bmt.init_distributed")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "old")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    exec(chosen, {"os": os, "args": SimpleNamespace(gpu=gpu)})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected[ranks - 1]


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_seen_to_be_enough_is_reported(name: str) -> None:
    result = convert_text(SCRIPT.format(choice=LEFT[name]))
    assert LEFT[name].encode() in result.after
    found = [finding for finding in result.reported if isinstance(finding, Remark) and finding.code == "BMT040"]
    assert len(found) == 1 and found[0].differs and found[0].line == 4
