# ruff: noqa: E501 - tables of code are easier to read on one line
"""A test that decides whether a script joins other processes: reported where the launch does not answer it."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import argparse
import os
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

"""
GIVEN = """parser = argparse.ArgumentParser()
parser.add_argument("--distributed", action="store_true")
parser.add_argument("--world_size", type=int, default=1)
parser.add_argument("--local_rank", type=int, default=-1)
args = parser.parse_args()
"""
JOIN = 'dist.init_process_group("gloo")'
TRAIN = """net = torch.nn.Linear(4, 1)
sampler = DistributedSampler(data) if {flag} else None
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in DataLoader(data, sampler=sampler):
    opt.zero_grad()
    net(x).mean().backward()
    opt.step()
"""
SETUP = "def setup(args):\n    {first}\n    dist.init_process_group('gloo')\n\n"
CLUSTER = "if 'RANK' in os.environ:\n        args.rank = int(os.environ['RANK'])\n    else:\n        args.distributed = False\n        return"

USERS = {
    "a constant": (f"distributed = False\nif distributed:\n    {JOIN}\n", "distributed"),
    "an option": (f"{GIVEN}if args.distributed:\n    {JOIN}\n", "args.distributed"),
    "what is made of one": (f"{GIVEN}many = args.world_size > 1\nif many:\n    {JOIN}\n", "many"),
    "an item": (f'settings = {{"dist": False}}\nif settings["dist"]:\n    {JOIN}\n', 'settings["dist"]'),
    "numbers of GPUs in a text": (f"many = len(gpus.split(',')) > 1\nif many:\n    {JOIN}\n", "many"),
    "a function that returns": (SETUP.format(first="if not args.distributed:\n        return") + f"{GIVEN}setup(args)\n", "args.distributed"),
    "a function that is called": (SETUP.format(first="pass") + f"{GIVEN}if args.distributed:\n    setup(args)\n", "args.distributed"),
    "a sampler alone": (GIVEN, "args.distributed"),
}  # fmt: skip
LAUNCHED = {
    "no test": (f"{JOIN}\n", "True"),
    "the environment": (f'if "WORLD_SIZE" in os.environ:\n    {JOIN}\n', "dist.is_initialized()"),
    "what is made of it": (f'many = int(os.environ.get("WORLD_SIZE", 1)) > 1\nif many:\n    {JOIN}\n', "many"),
    "a function": (f"def many():\n    return 'RANK' in os.environ\n\nif many():\n    {JOIN}\n", "many()"),
    "a function that returns": (SETUP.format(first=CLUSTER) + f"{GIVEN}setup(args)\n", "args.distributed"),
    "the number of its node": (f"{GIVEN}if args.local_rank != -1:\n    {JOIN}\n", "args.local_rank != -1"),
    "GPUs": (f"many = torch.cuda.device_count() > 1\nif many:\n    {JOIN}\n", "many"),
    "torch": (f"if not dist.is_initialized():\n    {JOIN}\n", "True"),
    "the program": (f'if __name__ == "__main__":\n    {JOIN}\n    args = torch.load(path)\n', "True"),
}  # fmt: skip


def said(start: str, flag: str) -> list[str]:
    found = convert_text(HEAD + start + TRAIN.format(flag=flag)).reported
    return [finding.message for finding in found if "decides whether ranks share the work" in finding.message]


@pytest.mark.parametrize(("start", "flag"), USERS.values(), ids=USERS.keys())
def test_what_the_user_sets_is_reported(start: str, flag: str) -> None:
    (message,) = said(start, flag)
    assert flag in message


@pytest.mark.parametrize(("start", "flag"), LAUNCHED.values(), ids=LAUNCHED.keys())
def test_what_the_launch_sets_is_not(start: str, flag: str) -> None:
    assert said(start, flag) == []


def test_a_test_above_the_whole_training_is_not() -> None:
    whole = f"{GIVEN}if args.distributed:\n    {JOIN}\n" + "".join(
        f"    {line}\n" for line in TRAIN.format(flag="True").splitlines()
    )
    assert not any("decides whether" in finding.message for finding in convert_text(HEAD + whole).reported)
