# ruff: noqa: E501 - tables of code are easier to read on one line
"""Scripts that train through DeepSpeed: left whole with the reasons, or converted whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rewriter.cli import main
from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from rewriter.types import Refusal
from tests.runtime.ranks import run_ranks

from ... import deepspeed_stand_in
from ...helpers import converted

CONFIG: dict[str, Any] = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
SCRIPT = """import torch
import deepspeed
from torch.utils.data import DataLoader

net = torch.nn.Linear(4, 1)
# before
config = {config}
engine, optimizer, _, schedule = deepspeed.initialize(model=net, config=config)
loader = DataLoader(train_set, batch_size=8)
for step, x in enumerate(loader):
    loss = engine(x).mean()
    # in front
    engine.backward(loss)
    engine.step()
    # in the loop
# behind
"""


def script(more: dict[str, Any] | None = None, given: str = "", config: str = "", **at: str) -> str:
    """The script with more in its configuration, and code at its places."""
    text = SCRIPT.replace("{config}", config or repr({**CONFIG, **(more or {})}))
    text = text.replace("model=net, ", f"model=net, {given}, ") if given else text
    for place, indent in (("before", ""), ("in front", "    "), ("in the loop", "    "), ("behind", "")):
        code = at.get(place.replace(" ", "_"), "pass").replace("\n", f"\n{indent}")
        text = text.replace(f"{indent}# {place}\n", f"{indent}{code}\n")
    return text


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.1, **params}}}


def schedule(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


MADE = "deepspeed.initialize(model=net, config=config)"
REFUSED = {
    "no configuration": script().replace(", config=config", ""),
    "told by arguments": script().replace("model=net, config=config", "args=args, model=net"),
    "a path of arguments": script().replace("config=config", "config=args.deepspeed_config"),
    "a file that is not there": script().replace("config=config", "config='no.json'"),
    "a function": script(config="made()"),
    "spread out": script(config="{**base, 'train_batch_size': 8}"),
    "changed afterwards": script().replace("engine, opt", "config['train_batch_size'] = 16\nengine, opt"),
    "changed by a function": script().replace("engine, opt", "fill(config)\nengine, opt"),
    "updated": script().replace("engine, opt", "config.update(more)\nengine, opt"),
    "given twice": script().replace("engine, opt", "config = other\nengine, opt"),
    "a number that a call computes": script(config="{'train_batch_size': size(), 'optimizer': {'type': 'Adam'}}"),
    "auto": script({"train_batch_size": "auto"}),
    "auto in the optimizer": script(optimizer("AdamW", weight_decay="auto")),
    "a loss scale": script({"fp16": {"enabled": True}}),
    "fp16 on request": script(config="{'train_batch_size': 8, 'fp16': {'enabled': args.half}, 'optimizer': {'type': 'Adam'}}"),
    "apex": script({"amp": {"enabled": True}}),
    "compression": script({"compression_training": {"weight_quantization": {}}}),
    "a curriculum": script({"curriculum_learning": {"enabled": True}}),
    "elasticity": script({"elasticity": {"enabled": True}}),
    "its own writers": script({"tensorboard": {"enabled": True}}),
    "NVMe": script({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}),
    "no optimizer": script(config="{'train_batch_size': 8}"),
    "1-bit Adam": script(optimizer("OneBitAdam")),
    "Lamb": script(optimizer("Lamb")),
    "no bias correction": script(optimizer("Adam", bias_correction=False)),
    "an unknown word": script(optimizer("Adam", max_coeff=1.0)),
    "one cycle": script(schedule("OneCycle", cycle_min_lr=0.1)),
    "cosine": script(schedule("WarmupCosineLR", total_num_steps=9)),
    "a rate by default": script(schedule("WarmupLR", warmup_num_steps=9)),
    "no total": script(schedule("WarmupDecayLR", warmup_max_lr=0.1)),
    "a total within the warmup": script(schedule("WarmupDecayLR", warmup_max_lr=0.1, total_num_steps=9, warmup_num_steps=9)),
    "two schedules": script(schedule("WarmupLR", warmup_max_lr=0.1), "lr_scheduler=made"),
    "a schedule's function": script(given="lr_scheduler=lambda o: made(o)"),
    "sizes for several GPUs": script({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}),
    "steps by the number of GPUs": script({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}),
    "clipping on request": script(config="{'train_batch_size': 8, 'gradient_clipping': args.clip, 'optimizer': {'type': 'Adam'}}"),
    "parallel models": script(given="mpu=mpu"),
    "options": script(given="**options"),
    "one name": script().replace("engine, optimizer, _, schedule =", "made ="),
    "under a test": script().replace(f"engine, optimizer, _, schedule = {MADE}", f"if args.deepspeed:\n    engine, optimizer, _, schedule = {MADE}\nelse:\n    engine = net"),
    "two engines": script(behind=f"second, *_ = {MADE}"),
    "a pipeline": script(behind="stages = deepspeed.pipe.PipelineModule(layers)"),
    "experts": script(behind="layer = deepspeed.moe.layer.MoE(4, net)"),
    "parameters under Init": script(before="with deepspeed.zero.Init():\n    big = Net()"),
    "gathered": script(behind="with deepspeed.zero.GatheredParameters(p):\n    pass"),
    "its checkpointing": script(behind="y = deepspeed.checkpointing.checkpoint(f, x)"),
    "its accelerator": script(behind="from deepspeed.accelerator import get_accelerator\nd = get_accelerator().device_name()"),
    "its collectives": script(behind="deepspeed.comm.all_reduce(x)"),
    "an annotation": script(behind="def f(e: deepspeed.DeepSpeedEngine):\n    pass"),
    "its step is used": script(behind="engine.train_batch(iterator)"),
    "a boundary that is set": script(in_front="engine.set_gradient_accumulation_boundary(step % 2)"),
    "no synchronisation": script(in_front="with engine.no_sync():\n    pass"),
    "a backward that is used": script().replace("    engine.backward", "    loss = engine.backward"),
    "not over the steps": script().replace("backward(loss)", "backward(loss, scale_wrt_gas=False)"),
    "a step that is told": script().replace("engine.step()", "engine.step(lr_kwargs={})"),
    "the optimizer's own step": script(in_the_loop="optimizer.step()"),
    "the optimizer's own backward": script(in_front="optimizer.backward(loss)"),
    "cleared while it adds up": script({"gradient_accumulation_steps": 2}, in_front="optimizer.zero_grad()"),
    "all cleared while it adds up": script({"gradient_accumulation_steps": 2}, in_front="engine.zero_grad()"),
    "a norm": script(in_the_loop="print(engine.get_global_grad_norm())"),
    "a rank in a text": script(behind="name = f'log{engine.local_rank}'"),
    "how many": script(behind="n = 8 * engine.world_size"),
    "set": script(behind="engine.optimizer = other"),
    "handed to others": script(behind="library.train(engine)\nthing(engine)"),
    "under another object": script(behind="class Run:\n    def more(self, x):\n        self.engine.backward(self.engine(x).mean())\n        self.engine.step()\nrun = Run()\nrun.engine = engine\nrun.more(1)"),
    "under a name that is not made": script().replace("engine, optimizer,", "made, optimizer,"),
    "by getattr": script(behind="made = getattr(thing, 'engine')\nmade.backward(loss)\nmade.step()"),
    "kept in a list": script(behind="engines = [engine]"),
    "a state that is told": script(behind="engine.save_checkpoint('out', exclude_frozen_parameters=True)"),
    "a folder by a call": script(behind="engine.save_checkpoint(folder())"),
    "a state whose parts are told": script(behind="engine.load_checkpoint('out', load_optimizer_states=args.all)"),
    "a state in one name": script(behind="state = engine.load_checkpoint('out')"),
    "a function without the optimizer": script(behind="def more(engine, x):\n    engine.backward(engine(x).mean())\n    engine.step()\nmore(engine, 1)").replace("engine, optimizer, _, schedule = ", "def made():\n    engine, optimizer, _, schedule = ").replace("config=config)\n", "config=config)\n    return engine\nengine = made()\n"),
    "its loader without data": script(behind="for x in _loader:\n    pass").replace("optimizer, _,", "optimizer, _loader,"),
    "data without its loader": script(given="training_data=train_set"),
    "data without sizes": script(given="training_data=train_set", config="{'optimizer': {'type': 'Adam'}}").replace("optimizer, _,", "optimizer, loader,").replace("loader = DataLoader(train_set, batch_size=8)\n", ""),
    "what the others refuse": script(behind="while True:\n    if rank != 0:\n        break\n    state = net.state_dict()"),
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_left_whole_with_a_reason(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = convert_text(text)
    assert not result.changed and not result.error
    assert result.reported and all(isinstance(finding, Refusal) for finding in result.reported)
    (tmp_path / "train.py").write_text(text)
    assert main([str(tmp_path / "train.py")]) == 3
    first = capsys.readouterr().err.splitlines()[0]
    assert "written for DeepSpeed and stays: " in first


def configured(more: dict[str, Any] | None = None, given: str = "", **at: str) -> str:
    after = converted(script(more, given, **at))
    assert "deepspeed" not in after and "engine.step" not in after
    return after


ADAM = "\noptimizer = bmt.optim.AdamOptimizer(engine.parameters(), lr="
CONFIGURED = {
    "Adam decays apart": (optimizer("Adam"), f"{ADAM}0.1, weight_decay=0.0)\n"),
    "AdamW decays nothing": (optimizer("AdamW", betas=[0.9, 0.95]), f"{ADAM}0.1, betas=(0.9, 0.95), weight_decay=0.0)\n"),
    "torch's AdamW": (optimizer("Adam", torch_adam=True), f"{ADAM}0.1, weight_decay=0.01)\n"),
    "Adam with L2": (optimizer("Adam", adam_w_mode=False, weight_decay=0.1), "\noptimizer = torch.optim.Adam(engine.parameters(), lr=0.1, weight_decay=0.1)\n"),
    "SGD": (optimizer("SGD", momentum=0.9), "\noptimizer = torch.optim.SGD(engine.parameters(), lr=0.1, momentum=0.9)\n"),
    "no numbers": ({"optimizer": {"type": "Adam"}}, f"{ADAM}0.001, weight_decay=0.0)\n"),
    "clipping": ({"gradient_clipping": 0.5}, "    optim_manager.clip_grad_norm(optimizer.param_groups, 0.5)\n    optim_manager.step()\n    optim_manager.zero_grad()\n"),
    "no clipping": ({"gradient_clipping": 0.0}, "    optim_manager.backward(loss)\n    optim_manager.step()\n    optim_manager.zero_grad()\n"),
    "adding up": ({"gradient_accumulation_steps": 4}, "    optim_manager.backward(loss / 4)\n    engine.micro_steps += 1\n    if engine.micro_steps % 4 == 0:\n        optim_manager.step()\n"),
    "bf16": ({"bf16": {"enabled": True}}, '\nengine.forward = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)(engine.forward)\n'),
    "a warmup": (schedule("WarmupLR", warmup_max_lr=0.2, warmup_num_steps=9), "\nschedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(math.log(max(step, 1)) / math.log(9), 1.0))\n"),
    "what is off": ({"fp16": {"enabled": False}, "amp": {"enabled": False}, "flops_profiler": {"enabled": False}, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "\nengine = net\n"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "wanted"), CONFIGURED.values(), ids=CONFIGURED.keys())
def test_what_the_configuration_says(more: dict[str, Any], wanted: str) -> None:
    assert wanted in configured(more)


def test_numbers_that_the_script_computes() -> None:
    text = script(
        before="args = parse()",
        config="{'train_batch_size': 8, 'gradient_accumulation_steps': args.steps, 'optimizer': {'type': 'Adam', 'params': {'lr': args.lr}}}",
    )
    after = converted(text)
    assert "engine.parameters(), lr=args.lr, weight_decay=0.0)" in after
    assert "backward(loss / args.steps)" in after and "if engine.micro_steps % args.steps == 0:" in after


GIVEN = {
    "an optimizer": ("optimizer=opt", "\noptimizer = opt\n"),
    "groups": ("model_parameters=groups(net)", "\noptimizer = bmt.optim.AdamOptimizer(groups(net), lr=0.01, weight_decay=0.0)\n"),
    "a schedule": ("lr_scheduler=made", "\nschedule = made\n"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "wanted"), GIVEN.values(), ids=GIVEN.keys())
def test_what_the_engine_is_given(given: str, wanted: str) -> None:
    before = "opt = torch.optim.SGD(net.parameters(), lr=0.1)\nmade = torch.optim.lr_scheduler.StepLR(opt, 1)"
    assert wanted in configured(given=given, before=before)


DEVICE = 'torch.device("cuda" if torch.cuda.is_available() else "cpu")'
USED = {
    "the model": ("m = engine.module", "\nm = engine\n"),
    "a place": ("y = y.to(engine.device)", f"\ny = y.to({DEVICE})\n"),
    "a place by its number": ("y = y.to(engine.local_rank)", f"\ny = y.to({DEVICE})\n"),
    "a place in a text": ("print(f\"{engine.device}\")", "torch.device('cuda' if"),
    "a rank": ("if engine.global_rank == 0:\n    done = 1", "\nif bmt.rank() == 0:\n"),
    "sizes": ("n = engine.train_batch_size()", "\nn = 8\n"),
    "a batch": ("n = engine.train_micro_batch_size_per_gpu()", "\nn = 8\n"),
    "steps": ("n = engine.gradient_accumulation_steps()", "\nn = 1\n"),
    "rates": ("r = engine.get_lr()[0]", '\nr = [group["lr"] for group in optimizer.param_groups][0]\n'),
    "precision": ("h = engine.fp16_enabled()", "\nh = False\n"),
    "counted": ("n = engine.global_steps", "\nn = engine.micro_steps // 1\n"),
    "half a model": ("engine.save_16bit_model('out')", "bmt.save(engine, os.path.join('out', \"pytorch_model.bin\"))\n"),
    "a state": ("engine.save_checkpoint('out', tag=step)", "\nengine_tag = step\nos.makedirs(os.path.join('out', str(engine_tag)), exist_ok=True)\n"),
    "a state again": ("path, client = engine.load_checkpoint('out')", "\n    optimizer.load_state_dict(engine_state[\"optimizer\"])\n"),
    "training": ("engine.eval()\nengine.train()", "\nengine.eval()\nengine.train()\n"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), USED.values(), ids=USED.keys())
def test_uses_of_the_engine(text: str, wanted: str) -> None:
    assert wanted in configured(behind=text)


def test_its_own_optimizers() -> None:
    before = "from deepspeed.ops.adam import FusedAdam\nopt = FusedAdam(net.parameters(), lr=0.1, adam_w_mode=False)"
    assert "\nopt = torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.0)\n" in configured(
        given="optimizer=opt", before=before
    )


PARTS = """import torch
import deepspeed
from steps import train


class Net(torch.nn.Module):
    def forward(self, x):
        return x


def setup():
    net = Net()
    engine, optimizer, loader, _ = deepspeed.initialize(
        model=net,
        training_data=data,
        config={"train_batch_size": 8, "gradient_accumulation_steps": 2, "optimizer": {"type": "Adam"}},
    )
    return engine, optimizer, loader


if __name__ == "__main__":
    engine, optimizer, loader = setup()
    train(engine, optimizer, loader)
"""
STEPS = """def train(model, opt, loader):
    for x in loader:
        model.backward(model(x).mean())
        model.step()
"""


def test_an_engine_that_is_handed_on(tmp_path: Path) -> None:
    files = {"main.py": PARTS, "steps.py": STEPS}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = sorted(tmp_path.iterdir())
    main_after, after = (result.after.decode() for result in convert_paths(paths, Options(), [tmp_path]))
    assert "loader = bmt.shard_loader(torch.utils.data.DataLoader(data, 8 // 2, sampler=" in main_after
    assert (
        "backward(model(x).mean() / 2)\n        model.micro_steps += 1\n        if model.micro_steps % 2 == 0:\n"
        in after
    )
    for text in (STEPS.replace("model.step()", "model.train_batch()"), STEPS.replace("opt, ", "")):
        (tmp_path / "steps.py").write_text(text)
        (tmp_path / "main.py").write_text(
            PARTS.replace("optimizer, loader)", "loader)") if "opt" not in text else PARTS
        )
        results = convert_paths(paths, Options(), [tmp_path])
        assert not any(result.changed for result in results)
        assert all(any("DeepSpeed" in f.message for f in result.reported) for result in results)


def test_a_file_of_the_script_that_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "main.py").write_text(PARTS)
    (tmp_path / "steps.py").write_text(STEPS)
    assert main([str(tmp_path / "main.py")]) == 3
    assert "steps.py takes part in this training" in capsys.readouterr().err.splitlines()[0]
    (tmp_path / "steps.py").write_text("def train(model, opt, loader):\n    model.eval()\n")
    assert main([str(tmp_path / "main.py")]) == 0


FIXTURES = Path(__file__).parents[2] / "fixtures"
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one step a batch": {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 4},
    "sizes of all": {"train_micro_batch_size_per_gpu": None, "train_batch_size": 12},
    "a warmup along a logarithm": schedule("WarmupLR", warmup_max_lr=0.03, warmup_num_steps=5),
    "SGD": optimizer("SGD", momentum=0.9),
}


def play(text: str, folder: str, *arguments: str) -> list[str]:
    """What one rank prints."""
    os.chdir(folder)
    sys.argv = ["train.py", *arguments]
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")
    vars(sys.modules["deepspeed"]).update(vars(deepspeed_stand_in))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(text, "train.py", "exec"), {"__name__": "__main__"})
    return output.getvalue().splitlines()


def test_a_whole_script(tmp_path: Path) -> None:
    (after,) = convert_paths([FIXTURES / "deepspeed_train.py"], Options(), [FIXTURES])
    assert after.after.decode() == (FIXTURES / "deepspeed_train_converted.py").read_text()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_ranks_train_as_one_process(variant: dict[str, Any], tmp_path: Path) -> None:
    config = {**json.loads((FIXTURES / "ds.json").read_text()), **variant}
    text = (FIXTURES / "deepspeed_train.py").read_text()
    folders = [tmp_path / name for name in ("original", "one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "ds.json").write_text(
            json.dumps({name: value for name, value in config.items() if value is not None})
        )
        (folder / "train.py").write_text(text)
    (result,) = convert_paths([folders[0] / "train.py"], Options(), [folders[0]])
    assert result.changed
    (wanted,) = run_ranks(1, play, text, str(folders[0]), initialize=False, fresh=True)
    (again,) = run_ranks(1, play, text, str(folders[0]), "--resume", initialize=False, fresh=True)
    for number, folder in enumerate(folders[1:], 1):
        first, *others = run_ranks(number, play, result.after.decode(), str(folder), initialize=False, fresh=True)
        assert first == wanted and all(printed == [] for printed in others)
        first, *others = run_ranks(
            number, play, result.after.decode(), str(folder), "--resume", initialize=False, fresh=True
        )
        assert first == again


TRAINER = """import deepspeed
import torch
from torch import nn
from torch.utils.data import TensorDataset

torch.manual_seed(2)


class Trainer:
    def __init__(self, model, data):
        self.engine, _, self.loader, _ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.4),
            training_data=data,
            config={
                "train_batch_size": 16,
                "gradient_accumulation_steps": 2,
                "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 3}},
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": 1},
            },
        )

    def train(self):
        self.engine.train()
        for x, y in self.loader:
            loss = nn.functional.cross_entropy(self.engine(x), y)
            self.engine.backward(loss)
            self.engine.step()
            print(f"{loss.item():.5f} {self.engine.get_lr()} {self.engine.global_steps}")


x = torch.randn(56, 5)
model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
Trainer(model, TensorDataset(x, (x.sum(1) > 0).long())).train()
"""


def test_a_trainer_whose_engine_makes_the_loader(tmp_path: Path) -> None:
    (wanted,) = run_ranks(1, play, TRAINER, str(tmp_path), initialize=False, fresh=True)
    after = converted(TRAINER)
    for number in (1, 2):
        first, *others = run_ranks(number, play, after, str(tmp_path), initialize=False, fresh=True)
        assert first == wanted and all(printed == [] for printed in others)
