"""Scripts for DeepSpeed that stay as they are are told line by line what an ordinary loop has there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from rewriter.report import launch, left_training
from rewriter.types import Refusal, Result

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95]}},
}
SCRIPT = """import deepspeed
import torch

net = torch.nn.Linear(4, 1)
{config}
engine, optimizer, _, _ = deepspeed.initialize(model=net, {given})
for step, x in enumerate(batches):
    loss = engine(x).mean()
    engine.backward(loss)
    engine.step()
engine.save_checkpoint("out")
print(engine.get_global_grad_norm())
"""
STEP = "if (step + 1) % 2 == 0: torch.nn.utils.clip_grad_norm_(engine.parameters(), 0.5); optimizer.step(); "


def told(result: Result) -> dict[int, str]:
    assert not result.changed and not result.error
    assert all(isinstance(found, Refusal) and found.code == "BMT090" for found in result.reported)
    assert left_training(result) and launch([result], lambda path: path).startswith("not ready to launch")
    return {found.line: found.message for found in result.reported}


def lines(config: object, given: str = "config=config") -> dict[int, str]:
    return told(convert_text(SCRIPT.format(config=f"config = {config!r}", given=given)))


def check(found: dict[int, str]) -> None:
    assert "engine = net; optimizer = torch.optim.AdamW(engine.parameters(), lr=0.01, betas=(0.9, 0.95), " in found[6]
    assert "batch_size is 4 * the number of GPUs, 2 batches for each step" in found[6] and "bfloat16" in found[6]
    assert found[9].endswith("instead of engine.backward(loss): (loss / 2).backward()")
    assert STEP in found[10]
    assert 'torch.save(engine.state_dict(), os.path.join("out", "model.pt"))' in found[11]


def test_a_dict_in_the_script() -> None:
    check(lines(CONFIG))
    check(lines(CONFIG, "config_params=config"))


@pytest.mark.parametrize("given", ['config="ds.json"', 'config=json.load(open("ds.json"))'])
def test_a_file_beside_it(tmp_path: Path, given: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    (tmp_path / "train.py").write_text(SCRIPT.format(config="import json", given=given))
    (result,) = convert_paths([tmp_path / "train.py"], Options(), [tmp_path])
    check(told(result))


@pytest.mark.parametrize("config", ["made()", "{**base, 'a': 1}"])
def test_a_configuration_that_is_not_read_is_said(config: str) -> None:
    found = told(convert_text(SCRIPT.format(config=f"config = {config}", given="config=config")))
    assert "its configuration is not read" in found[6]
    assert found[9].endswith("(loss / gradient_accumulation_steps).backward()")
    assert "engine.parameters(), gradient_clipping)" in found[10]


def test_one_backward_for_each_step() -> None:
    found = lines({"train_batch_size": 32}, "optimizer=opt, lr_scheduler=sched, config=config")
    assert "batch_size is 32" in found[6] and "torch.optim" not in found[6]
    assert found[9].endswith(": loss.backward()")
    assert found[10].endswith("optimizer.step(); optimizer.zero_grad(); scheduler.step()")


def test_deepspeeds_own_defaults() -> None:
    found = lines({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "adam_w_mode": False}}})
    assert "torch.optim.Adam(engine.parameters(), lr=0.1)" in found[6]
    found = lines({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}})
    assert "torch.optim.AdamW(engine.parameters(), lr=0.1, weight_decay=0.0)" in found[6]
    assert (
        "torch.optim....(engine.parameters(), lr=0.1)"
        in lines({"optimizer": {"type": "Lamb", "params": {"lr": 0.1}}})[6]
    )
