"""Scripts that may train through apex.amp are converted; those that always do are left."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

TOP = """import argparse
import torch
{imported}

args = argparse.ArgumentParser().parse_args()
model = torch.nn.Linear(4, 1)
opt = torch.optim.AdamW(model.parameters())
"""
STEP = """for x in batches:
    loss = model(x).mean()
    if {test}:
        with amp.scale_loss(loss, opt) as scaled_loss:
            scaled_loss.backward()
        torch.nn.utils.clip_grad_norm_(amp.master_params(opt), 1.0)
    else:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    model.zero_grad()
"""
TRIED = "try:\n    from apex import amp\nexcept ImportError:\n    amp = None"
SET_UP = '    model, opt = amp.initialize(model, opt, opt_level="O1")\n'
OPTIONAL = {
    "a flag": (TRIED, "if args.fp16:\n", "args.fp16"),
    "whether it is there": (TRIED, "if amp is not None:\n", "amp is not None"),
    "imported where it is asked for": (
        "",
        "if args.fp16:\n    try:\n        from apex import amp\n    except ImportError:\n        raise\n",
        "args.fp16",
    ),
    "the other branch": (TRIED, "if not args.fp16:\n    pass\nelse:\n", "args.fp16"),
    "a module": ("import apex\nfrom apex import amp", "if args.fp16:\n", "args.fp16"),
}


@pytest.mark.parametrize(("imported", "test", "again"), OPTIONAL.values(), ids=OPTIONAL.keys())
def test_a_script_that_may_do_without(imported: str, test: str, again: str) -> None:
    after = converted(TOP.format(imported=imported) + test + SET_UP + STEP.format(test=again))
    assert "amp.initialize" not in after and '    raise RuntimeError("apex.amp cannot train' in after
    assert "    else:\n        optim_manager.backward(loss)\n        optim_manager.clip_grad_norm(opt" in after


@pytest.mark.parametrize(
    "text",
    [
        TOP.format(imported="from apex import amp")
        + 'model, opt = amp.initialize(model, opt, opt_level="O1")\n'
        + STEP.format(test="args.fp16"),
        TOP.format(imported=TRIED) + "if args.fp16:\n" + SET_UP + "with amp.scale_loss(model(x).mean(), opt) as loss:\n"
        "    loss.backward()\nopt.step()\n",
        TOP.format(imported=TRIED)
        + "if torch.cuda.is_available():\n"
        + SET_UP
        + STEP.format(test="torch.cuda.is_available()"),
    ],
    ids=["set up always", "used always", "what the machine has"],
)
def test_a_script_that_cannot_do_without(text: str) -> None:
    result = convert_text(text)
    assert not result.changed and "apex.amp" in result.reported[0].message
