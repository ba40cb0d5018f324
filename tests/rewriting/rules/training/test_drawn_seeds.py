"""Seeds that a script draws at random, and seeds that are set between the first output and their use."""

from __future__ import annotations

import pytest

from ...helpers import converted

SCRIPT = """import argparse
import random
import time
import numpy as np
import torch

opt = argparse.Namespace(seed=None)
{lines}
torch.manual_seed({seed})
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for x in batches:
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("lines", "seed"),
    [
        ("opt.seed = random.randint(1, 10000)", "opt.seed"),
        ("if opt.seed is None:\n    opt.seed = random.randint(1, 10000)", "opt.seed"),
        ("opt.seed = random.randint(1, 10000)\nprint(opt.seed)\nrandom.seed(opt.seed)", "opt.seed"),
        ("seed = int(time.time())", "seed"),
        ("seed = np.random.randint(10)\nprint(seed)", "seed"),
    ],
)
def test_a_drawn_seed_is_rank_0s(lines: str, seed: str) -> None:
    after = converted(SCRIPT.format(lines=lines, seed=seed))
    start = f"bmt.init_distributed()\n{seed} = bmt.store.broadcast_object({seed})\n"
    assert start in after and f"torch.manual_seed({seed})\n" in after
    assert after.index(lines.splitlines()[0]) < after.index(start)


def test_a_seed_drawn_behind_the_first_output_is_drawn_by_ranks_that_are_seeded_alike() -> None:
    lines = "print(opt)\nopt.seed = random.randint(1, 10000)\nrandom.seed(opt.seed)"
    after = converted(SCRIPT.format(lines=lines, seed="opt.seed"))
    assert "bmt.init_distributed()\nbmt.print_rank(opt)\nopt.seed = " in after and "broadcast" not in after


def test_a_seed_set_behind_the_first_output_stays_there() -> None:
    after = converted(SCRIPT.format(lines="print(opt)\nopt.seed = 3", seed="opt.seed"))
    assert "bmt.init_distributed()\nbmt.print_rank(opt)\nopt.seed = 3\ntorch.manual_seed(opt.seed)\n" in after


def test_a_seed_that_is_known_is_given() -> None:
    after = converted(SCRIPT.format(lines="opt.seed = 3\nprint(opt)", seed="opt.seed"))
    assert "bmt.init_distributed(seed=opt.seed)\nbmt.print_rank(opt)\n" in after
