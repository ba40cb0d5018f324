"""Scripts that may be launched by Horovod are converted; those that always are stay."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

SCRIPT = """import argparse
import torch
import torch.distributed as dist
{imported}

args = argparse.ArgumentParser().parse_args()
{setup}
model = torch.nn.Linear(4, 1)
opt = torch.optim.AdamW(model.parameters())
for x in batches:
    model(x).mean().backward()
    opt.step()
    opt.zero_grad()
"""
IMPORT = "import horovod.torch as hvd"
TRIED = "try:\n    import horovod.torch as hvd\nexcept ImportError:\n    hvd = None"
BRANCHES = "def start(args):\n    if args.platform == 'local':\n        dist.init_process_group(backend='nccl')\n"
OPTIONAL = {
    "a platform": (
        "",
        BRANCHES
        + "    elif args.platform == 'azure':\n        import horovod.torch as hvd\n        hvd.init()\n"
        + "        args.rank = hvd.rank()\nstart(args)",
    ),
    "a flag": (IMPORT, "if args.horovod:\n    hvd.init()\n    torch.cuda.set_device(hvd.local_rank())"),
    "whether it is there": (TRIED, "if hvd is not None:\n    hvd.init()"),
    "the other branch": (IMPORT, "if not args.horovod:\n    dist.init_process_group('nccl')\nelse:\n    hvd.init()"),
}
ALWAYS = {
    "always": (IMPORT, "hvd.init()"),
    "unless it was": (IMPORT, "if not hvd.is_initialized():\n    hvd.init()"),
    "what the machine has": (IMPORT, "if torch.cuda.is_available():\n    hvd.init()"),
    "used always": (IMPORT, "if args.horovod:\n    hvd.init()\nrank = hvd.rank()"),
    "run as a script": (IMPORT, "if __name__ == '__main__':\n    hvd.init()"),
}


@pytest.mark.parametrize(("imported", "setup"), OPTIONAL.values(), ids=OPTIONAL.keys())
def test_a_script_that_may_do_without(imported: str, setup: str) -> None:
    after = converted(SCRIPT.format(imported=imported, setup=setup))
    assert "hvd.init()" not in after and 'raise RuntimeError("Horovod cannot train' in after
    assert "init_process_group" not in after and "optim_manager.backward(" in after


@pytest.mark.parametrize(("imported", "setup"), ALWAYS.values(), ids=ALWAYS.keys())
def test_a_script_that_cannot_do_without(imported: str, setup: str) -> None:
    result = convert_text(SCRIPT.format(imported=imported, setup=setup))
    assert not result.changed and "Horovod" in result.reported[0].message
