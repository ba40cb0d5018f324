# ruff: noqa: E501 - tables of code are easier to read on one line
"""Scripts that train through accelerate: left whole with the reasons, or converted whole."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import types
from pathlib import Path

import pytest

from rewriter.cli import main
from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options
from rewriter.types import Refusal
from tests.runtime.ranks import run_ranks

from ...helpers import converted

SCRIPT = """import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
train_loader = DataLoader(train_set, batch_size=8)
eval_loader = DataLoader(eval_set, batch_size=8)
model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)
for step, (x, y) in enumerate(train_loader):
    loss = torch.nn.functional.mse_loss(model(x), y)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    # in the loop
for x, y in eval_loader:
    out = model(x)
    # evaluated
# behind
"""


def script(options: str = "", imports: str = "", **at: str) -> str:
    """The script with options of its Accelerator, and code in its loops and behind them."""
    text = imports + SCRIPT.replace("Accelerator()", f"Accelerator({options})")
    for place, indent in (("in the loop", "    "), ("evaluated", "    "), ("behind", "")):
        code = at.get(place.replace(" ", "_"), "pass").replace("\n", f"\n{indent}")
        text = text.replace(f"{indent}# {place}\n", f"{indent}{code}\n")
    return text


def accumulating(steps: str, text: str = SCRIPT) -> str:
    block = text[text.index("    loss = ") : text.index("    # in the loop")]
    inside = "    with accelerator.accumulate(model):\n" + block.replace("    ", "        ")
    return text.replace(block, inside).replace("Accelerator()", f"Accelerator(gradient_accumulation_steps={steps})")


def accumulating_over(batches: str) -> str:
    """Gradients are added up over what a variable holds, which is the loader itself on another way."""
    made = f"active = train_loader\nif resume:\n    active = {batches}\nfor step, (x, y) in enumerate(active):"
    return accumulating("2").replace("for step, (x, y) in enumerate(train_loader):", made)


REFUSED = {
    "a model that is not named": script(behind="accelerator.unwrap_model(*models)"),
    "a plugin": script("deepspeed_plugin=plugin"),
    "fsdp": script("fsdp_plugin=FullyShardedDataParallelPlugin()"),
    "a compiler": script("dynamo_backend='inductor'"),
    "options": script("**options"),
    "options that a function changes": script("**options", "options = {}\nfill(options)\n"),
    "options that are updated": script("**options", "options = {}\noptions.update(more)\n"),
    "options with a name that is not seen": script("**options", "options = {name: 1}\n"),
    "options under a test": script("**options", "options = {}\nif half:\n    options['mixed_precision'] = 'bf16'\n"),
    "a plugin in options": script("**options", "options = {'fsdp_plugin': plugin}\n"),
    "a loss scale": script("mixed_precision='fp16'"),
    "all trackers": script("log_with='all'", behind="accelerator.init_trackers('run')"),
    "a tracker by its name": script("log_with=LoggerType.COMETML", behind="accelerator.init_trackers('run')"),
    "trackers": script("log_with=['wandb', 'aim']", behind="accelerator.init_trackers('run')"),
    "a tracker that is not known where it starts": script("log_with=kind", imports="def start(accelerator):\n    accelerator.init_trackers('run')\n\n"),
    "a seed and kernels": script(imports="from accelerate.utils import set_seed\nset_seed(1, deterministic=True)\n"),
    "batches without a number": accumulating_over("itertools.islice(train_loader, 3)"),
    "batches left out in the loop": accumulating_over("train_loader").replace("enumerate(active)", "enumerate(accelerator.skip_first_batches(active, 2))"),
    "its own names for states": script("project_config=ProjectConfiguration(automatic_checkpoint_naming=True)"),
    "a handler": script("kwargs_handlers=[FP8RecipeKwargs()]"),
    "a handler in a variable": script("kwargs_handlers=[made]", behind="made = GradScalerKwargs()"),
    "no placement": script("device_placement=False"),
    "a trigger whose answer is kept": script(in_the_loop="stop = accelerator.check_trigger()"),
    "a tracker of its own": script(behind="accelerator.get_tracker('wandb').tracker.log(1)"),
    "a decorator": script(behind="@accelerator.on_main_process\ndef say():\n    print(1)"),
    "uneven inputs": script(behind="with accelerator.join_uneven_inputs([model]):\n    pass"),
    "a state in no folder": script(behind="accelerator.save_state()"),
    "a state whose place is used": script(behind="path = accelerator.save_state('out')"),
    "a state of elsewhere": script(behind="def save():\n    accelerator.save_state('out')"),
    "set free under another name": script(behind="a, b = accelerator.free_memory(model, optimizer)"),
    "objects": script(imports="from accelerate.utils import gather_object\n", behind="a = gather_object([1])"),
    "a launcher": script(imports="from accelerate import notebook_launcher\n", behind="notebook_launcher(f)"),
    "big models": script(imports="from accelerate import dispatch_model\n", behind="m = dispatch_model(model)"),
    "the state": script(imports="from accelerate import PartialState\n", behind="s = PartialState()"),
    "handed to others": script(behind="library.train(accelerator)"),
    "whose share": script(behind="a = accelerator.gather(b)"),
    "whose share of a function": script(behind="def total(a):\n    return accelerator.reduce(a)"),
    "two loaders at once": script(behind="for a, b in zip(train_loader, eval_loader):\n    pass"),
    "a list": script().replace("accelerator.prepare(model, optimizer, train_loader, eval_loader)", "accelerator.prepare(*parts)"),
    "another loop that adds up": script("gradient_accumulation_steps=2", behind="while True:\n    with accelerator.accumulate(model):\n        accelerator.backward(model(x))\n        optimizer.step()"),
    "a step that starts late": script("gradient_accumulation_steps=2").replace("enumerate(train_loader)", "enumerate(train_loader, 1)").replace("    loss = ", "    with accelerator.accumulate(model):\n        pass\n    loss = "),
    "cleared before it adds up": script("gradient_accumulation_steps=2").replace("    loss = ", "    optimizer.zero_grad()\n    with accelerator.accumulate(model):\n        pass\n    loss = "),
    "asked before it adds up": script("gradient_accumulation_steps=2").replace("    loss = ", "    print(accelerator.sync_gradients)\n    with accelerator.accumulate(model):\n        pass\n    loss = "),
    "no GPU": script("cpu=True"),
    "no name": SCRIPT.replace("accelerator = Accelerator()", "fit(Accelerator())"),
    "what the others refuse": script().replace("torch.optim.SGD", "KFAC"),
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_left_whole_with_a_reason(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = convert_text(text)
    assert not result.changed and not result.error
    assert result.reported and all(isinstance(finding, Refusal) for finding in result.reported)
    (tmp_path / "train.py").write_text(text)
    assert main([str(tmp_path / "train.py")]) == 3
    assert "written for accelerate" in capsys.readouterr().err.splitlines()[0]


OPTIONS = {
    "a dict": "options = {'gradient_accumulation_steps': 2}\n",
    "a call": "options = dict(gradient_accumulation_steps=2)\n",
    "items": "options = {}\noptions['gradient_accumulation_steps'] = 2\n",
    "logs under a test": "options = {'gradient_accumulation_steps': 2}\nif log:\n    options['log_with'] = 'wandb'\n"
    "    options['project_dir'] = out\n",
}


@pytest.mark.parametrize("made", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_are_all_seen_are_keywords(made: str) -> None:
    wanted = converted(script("gradient_accumulation_steps=2"))
    assert converted(script("**options", made)).replace(made, "") == wanted


def test_no_options_are_none() -> None:
    assert converted(script("**options", "options = {}\n")).replace("options = {}\n", "") == converted(script())


ONE = "(bmt.rank() == 0)"
DEVICE = 'torch.device("cuda" if torch.cuda.is_available() else "cpu")'
SYNCED = "(step + 1) % 2 == 0 or step + 1 == len(train_loader)"
IN_LOOP = {
    "printed": ("accelerator.print(step, loss.item())", "bmt.print_rank(step, bmt.sum_loss(loss).item())"),
    "a norm": ("accelerator.clip_grad_norm_(model.parameters(), 1.0)", "optim_manager.clip_grad_norm(optimizer.param_groups, 1.0)"),
    "gathered losses": ("total = accelerator.gather(loss.repeat(8)).mean()", "total = bmt.gather_result(loss.repeat(8)).mean()"),
    "gathered pairs": ("a, b = accelerator.gather_for_metrics((x, y))", "a, b = (bmt.gather_result(x), bmt.gather_result(y),)"),
    "summed": ("n = accelerator.reduce(n)", 'n = bmt.distributed.all_reduce(n, "sum")'),
    "averaged": ("n = accelerator.reduce(loss, reduction='mean')", 'n = bmt.distributed.all_reduce(loss, "avg")'),
    "without accumulation": ("if accelerator.sync_gradients:\n    done += 1", "    optim_manager.zero_grad()\n    done += 1\n"),
    "skipped": ("if accelerator.optimizer_step_was_skipped:\n    done += 1", "if False:"),
    "log without tracker": ("accelerator.log({'a': 1}, step=step)\ndone = 1", "    optim_manager.zero_grad()\n    done = 1\n"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), IN_LOOP.values(), ids=IN_LOOP.keys())
def test_in_the_loop(text: str, wanted: str) -> None:
    after = converted(script(in_the_loop=text))
    assert wanted in after and "accelerat" not in after


EVALUATED = {
    "gathered": ("a, b = accelerator.gather_for_metrics((out, y))", "    a, b = (out, y)\n"),
    "one": ("out = accelerator.gather(out)", "    out = out\n"),
    "summed": ("n += accelerator.reduce(out.sum())", "    n += out.sum()\n"),
    "padded": ("out = accelerator.pad_across_processes(out, dim=1, pad_index=0)", "    out = out\n"),
}


@pytest.mark.parametrize(("text", "wanted"), EVALUATED.values(), ids=EVALUATED.keys())
def test_every_rank_evaluates_all(text: str, wanted: str) -> None:
    after = converted(script(evaluated=text))
    assert wanted in after and "accelerat" not in after


BEHIND = {
    "a model by its name": ("net = accelerator.unwrap_model(model=model, keep_fp32_wrapper=False)", "net = model\n"),
    "its state by its name": ("s = accelerator.get_state_dict(model=model)", "s = model.state_dict()\n"),
    "a signature": (
        "names = inspect.signature(accelerator.unwrap_model(model).forward).parameters",
        "names = inspect.signature(model.forward).parameters\n",
    ),
    "a function": ("nets = map(accelerator.unwrap_model, nets)", "nets = map(lambda model, **_: model, nets)\n"),
    "a model's own": ("net = accelerator.unwrap_model(model)", "net = model\n"),
    "saved under a guard": ("if accelerator.is_main_process:\n    torch.save(accelerator.get_state_dict(model), p)", "\nbmt.save(model, p)\n"),
    "saved": ("accelerator.save(accelerator.unwrap_model(model).state_dict(), p)", "\nbmt.save(model, p)\n"),
    "a whole model": ("accelerator.save_model(model, p)", 'os.makedirs(p, exist_ok=True)\nbmt.save(model, os.path.join(p, "pytorch_model.bin"))\n'),
    "a state": ("accelerator.save_state(output_dir=p)", 'bmt.save_checkpoint(optimizer.state_dict(), os.path.join(p, "optimizer.bin"))\n'),
    "a state again": ("accelerator.load_state(p)", 'optimizer.load_state_dict(torch.load(os.path.join(p, "optimizer.bin"), map_location="cpu"))\n'),
    "more of a state": ("accelerator.register_for_checkpointing(ema)\naccelerator.save_state(p)", 'os.path.join(p, "custom_checkpoint_0.pkl"))\n'),
    "waited": ("accelerator.wait_for_everyone()", "\nbmt.synchronize()\n"),
    "a place": ("z = torch.zeros(1, device=accelerator.device)", f"z = torch.zeros(1, device={DEVICE})\n"),
    "counts": ("n = 8 * accelerator.num_processes", "n = 8 * (1)\n"),
    "an index that is compared": ("if accelerator.process_index == 0:\n    print(1)", "if bmt.rank() == 0:\n    print(1)"),
    "an index": ("part = data[accelerator.process_index :: accelerator.num_processes]", "part = data[(0) :: (1)]\n"),
    "a bar": ("for a in tqdm(b, disable=not accelerator.is_local_main_process):\n    pass", f"disable=not {ONE}):"),
    "first one": ("with accelerator.main_process_first():\n    data = tokenize(data)", "\nwith bmt.rank_0_first():\n    data = tokenize(data)\n"),
    "no reduction": ("with accelerator.no_sync(model):\n    y = 1", "\ny = 1\n"),
    "no reduction at times": ("c = accelerator.no_sync(model) if x else d", "c = contextlib.nullcontext() if x else d\n"),
    "without precision": ("with accelerator.autocast():\n    y = 1", "\ny = 1\n"),
    "split": ("with accelerator.split_between_processes(prompts) as part:\n    y = f(part)", "\npart = prompts\ny = f(part)\n"),
    "batches left out": ("for x, y in accelerator.skip_first_batches(eval_loader, 3):\n    out = model(x)", "for x, y in bmt.skip_batches(eval_loader, 3):\n    x, y = bmt.to_device((x, y))\n"),
    "ended": ("accelerator.end_training()\naccelerator.free_memory()\ndone = 1", "\ndone = 1\n"),
    "set free": ("model, optimizer = accelerator.free_memory(model, optimizer)\ndone = 1", "    pass\ndone = 1\n"),
    "totals behind a loop": ("seen = accelerator.gather(loss)", "seen = bmt.gather_result(loss)\n"),
    "totals of evaluation": ("seen = accelerator.gather(out)", "seen = out\n"),
    "a pretrained model": (
        "inner = accelerator.unwrap_model(model)\ninner.save_pretrained('out', is_main_process=accelerator.is_main_process, "
        "save_function=accelerator.save, max_shard_size='1GB')",
        "inner = model\nbmt.save_pretrained(inner, 'out', max_shard_size='1GB')\n",
    ),
    "precision asked for": ("p = accelerator.mixed_precision", 'p = "no"\n'),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), BEHIND.values(), ids=BEHIND.keys())
def test_behind_the_loop(text: str, wanted: str) -> None:
    after = converted(script(behind=text))
    assert wanted in after and "accelerat" not in after


def test_gradients_are_added_up() -> None:
    after = converted(accumulating("2"))
    assert "optim_manager.backward(loss / 2)\n" in after
    assert f"    if {SYNCED}:\n        optim_manager.step()\n        optim_manager.zero_grad()\n" in after
    assert "optim_manager.backward(loss)\n" in converted(accumulating("1"))
    counted = converted(
        accumulating("args.n").replace("step, (x, y) in enumerate(train_loader)", "x, y in train_loader")
    )
    assert "for (index, (x, y)) in enumerate(train_loader):\n    x, y = bmt.to_device((x, y))\n" in counted
    assert "if (index + 1) % args.n == 0 or index + 1 == len(train_loader):\n" in counted
    assert "loss / args.n" in counted


@pytest.mark.parametrize("skip", ["accelerator.skip_first_batches", "skip_first_batches"])
def test_the_rest_of_an_epoch_adds_up_by_its_own_length(skip: str) -> None:
    after = converted(f"from accelerate import skip_first_batches\n{accumulating_over(f'{skip}(train_loader, done)')}")
    assert "    active = bmt.skip_batches(train_loader, done)\nfor step, (x, y) in enumerate(active):\n" in after
    assert "    if (step + 1) % 2 == 0 or step + 1 == len(active):\n        optim_manager.step()" in after
    assert "accelerat" not in after


def test_schedulers_follow_the_optimizer() -> None:
    text = accumulating("2").replace(
        "train_loader = D", "lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)\ntrain_loader = D", 1
    )
    text = text.replace("optimizer, train_loader,", "optimizer, lr_scheduler, train_loader,").replace(
        "        optimizer.zero", "        lr_scheduler.step()\n        optimizer.zero"
    )
    wanted = "        optim_manager.step()\n        lr_scheduler.step()\n        optim_manager.zero_grad()\n"
    assert f"if {SYNCED}:\n{wanted}" in converted(text)
    alone = text.replace("steps=2)", "steps=2, step_scheduler_with_optimizer=False)")
    assert f"if {SYNCED}:\n        optim_manager.step()\n    lr_scheduler.step()\n    if" in converted(alone)


def test_trackers() -> None:
    made = "accelerator.init_trackers('run', config={'lr': 1})\n"
    text = script(
        "log_with='tensorboard', project_dir=folder", in_the_loop="accelerator.log({'loss': loss.item()}, step=step)"
    )
    text = (
        text.replace("for step", f"if accelerator.is_main_process:\n    {made}for step")
        + "accelerator.end_training()\n"
    )
    after = converted(text)
    assert (
        "tracker = bmt.on_rank_0(SummaryWriter)(os.path.join(folder, 'run'))\nif bmt.rank() == 0:\n    tracker.add_hp"
        in after
    )
    assert (
        "    value = bmt.sum_loss(loss).item()\n    if bmt.rank() == 0:\n        tracker.add_scalar('loss', value, step)\n"
        in after
    )
    assert after.endswith("\ntracker.close()\n")
    wandb = converted(
        text.replace("'tensorboard'", '"wandb"').replace("if accelerator.is_main_process:\n    accel", "accel")
    )
    assert (
        "wandb.init(project='run', config={'lr': 1}, mode=None if" in wandb
        and "wandb.log({'loss': value}, step=step)" in wandb
    )
    assert not convert_text(text.replace(", project_dir=folder", "")).changed
    asked = converted(text.replace("if accelerator.is_main_process:\n", "if args.tracked:\n"))
    assert "tracker = None\nif args.tracked:\n    tracker = bmt.on_rank_0(SummaryWriter)" in asked
    assert (
        "    if tracker is not None:\n        value = bmt.sum_loss(loss).item()\n        if bmt.rank() == 0:\n" in asked
    )
    assert asked.endswith("\nif tracker is not None:\n    tracker.close()\n")
    assert "\nif True:" not in asked and "tracker" not in converted(text.replace(made, "pass\n"))


def test_a_tracker_that_an_option_names() -> None:
    options = (
        "options = {}\nif args.tracked:\n    options['log_with'] = args.report\n    options['project_dir'] = folder\n"
    )
    text = script("**options", options, behind="if args.tracked:\n    accelerator.init_trackers('run', vars(args))")
    start = text.index("if args.tracked:\n    accelerator.init")
    text = text[:start].replace("for step", text[start:] + "for step") + "accelerator.end_training()\n"
    after = converted(text)
    asked = """tracker = None
if args.tracked:
    if args.report not in (None, "tensorboard"):
        raise ValueError(f"{args.report} is no tracker of this script: say 'tensorboard'")
    if args.report is not None:
        tracker = bmt.on_rank_0(SummaryWriter)(os.path.join(folder, 'run'))
    if tracker is not None:
        if bmt.rank() == 0:
            tracker.add_hparams(vars(args), {})
"""
    assert asked in after and after.endswith("\nif tracker is not None:\n    tracker.close()\n")
    assert "tracker" not in converted(script("log_with=args.report_to"))


def test_what_is_there_may_be_asked_for() -> None:
    asked = "from accelerate.utils import is_xpu_available\nfast = is_xpu_available()\n"
    assert asked in converted(script(imports=asked))


SHOWN = {
    "a number": ("{'n': 3}", "tracker.add_scalar('n', 3, step)\n"),
    "a count": ("{'n': step}", "tracker.add_scalar('n', step, step)\n"),
    "a rate": ("{'n': done / 2}", "tracker.add_scalar('n', done / 2, step)\n"),
    "a text": ("{'n': f'{step}'}", "tracker.add_text('n', f'{step}', step)\n"),
    "of a kind that is not known": ("{'n': scores}", "tracker.add_scalars('n', scores, step)\n"),
    "given by a function": ("{'n': metric.compute()}", "tracker.add_scalars('n', value, step)\n"),
    "all that there is": ("scores", "tracker.add_scalars(name, value, step)\n"),
}


@pytest.mark.parametrize(("values", "wanted"), SHOWN.values(), ids=SHOWN.keys())
def test_values_are_shown_by_what_they_are(values: str, wanted: str) -> None:
    text = script("log_with='tensorboard', project_dir='x'", in_the_loop=f"accelerator.log({values}, step=step)")
    after = converted(text.replace("for step", "accelerator.init_trackers('run')\nfor step"))
    assert wanted in after and ("add_scalars" in after) == ("add_scalars" in wanted)
    assert ("isinstance" in after) == ("add_scalars" in wanted)


def test_precision() -> None:
    cast = f"model.forward = convert_outputs_to_fp32(torch.autocast({DEVICE[13:-1]}, dtype=torch.bfloat16)(model.forward))\n"
    assert f"\n{cast}" in converted(script("mixed_precision='bf16'"))
    asked = converted(script("mixed_precision=args.precision"))
    assert f'\nif args.precision == "bf16":\n    {cast}' in asked and "raise ValueError" in asked
    assert "convert_outputs" not in converted(script("mixed_precision='no'"))


def test_seeds_and_logs() -> None:
    imports = "from accelerate.logging import get_logger\nfrom accelerate.utils import set_seed\n"
    text = script(behind="logger.info('x', main_process_only=False)", imports=imports)
    text = text.replace("accelerator = ", "logger = get_logger(__name__)\nset_seed(args.seed)\naccelerator = ")
    after = converted(text)
    assert 'logger = logging.getLogger(__name__)\nlogger.disabled = os.environ.get("RANK", "0") != "0"\n' in after
    assert "bmt.init_distributed(seed=args.seed)\nrandom.seed(args.seed)\nnumpy.random.seed(args.seed)\n" in after
    assert "logger.info('x')\n" in after


TRAINER = """import torch
from accelerate import Accelerator


class Trainer:
    def __init__(self, model, loader, args):
        self.accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, self.optimizer, loader)

    def train(self):
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(batch).mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            save(self.accelerator, self.model)


def save(accelerator, model):
    accelerator.wait_for_everyone()
    accelerator.save(model.state_dict(), "x.pt")
"""
MAIN = """import torch
from torch.utils.data import DataLoader
from trainer import Trainer


class Net(torch.nn.Module):
    def forward(self, x):
        return x


if __name__ == "__main__":
    Trainer(Net(), DataLoader(data, batch_size=4), args).train()
"""


def test_a_trainer_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "trainer.py").write_text(TRAINER)
    paths = sorted(tmp_path.iterdir())
    main_after, after = (result.after.decode() for result in convert_paths(paths, Options(), [tmp_path]))
    assert "self.accelerator = types.SimpleNamespace(gradient_accumulation_steps=args.accumulate)\n" in after
    assert "self.optim_manager.backward(loss / self.accelerator.gradient_accumulation_steps)\n" in after
    assert 'bmt.synchronize()\n    bmt.save(model, "x.pt")\n' in after and "save(self.accelerator, self.model)" in after
    assert "bmt.init_distributed()" in main_after and "bmt.shard_loader(DataLoader" in main_after
    for text in (
        TRAINER.replace("wait_for_everyone()", "set_seed()"),
        TRAINER.replace(".step()", ".step(), KFAC(1)"),
    ):
        (tmp_path / "trainer.py").write_text(text)
        results = convert_paths(paths, Options(), [tmp_path])
        assert not any(result.changed for result in results)
        assert all(any("written for accelerate" in f.message for f in result.reported) for result in results)


def test_an_accelerator_that_another_file_imports(tmp_path: Path) -> None:
    (tmp_path / "say.py").write_text("from train import accelerator\n\naccelerator.print(1)\n")
    (tmp_path / "train.py").write_text(SCRIPT + "import say\n")
    results = convert_paths(sorted(tmp_path.iterdir()), Options(), [tmp_path])
    assert not any(result.changed for result in results)


def test_what_it_is_told_in_another_file_is_refused_there(tmp_path: Path) -> None:
    (tmp_path / "say.py").write_text("def say(accelerator):\n    accelerator.print(1)\n")
    made = "from accelerate.utils import FP8RecipeKwargs\nfrom say import say\n" + "# long\n" * 50
    made += SCRIPT.replace("Accelerator(", "Accelerator(kwargs_handlers=[FP8RecipeKwargs()], ") + "say(accelerator)\n"
    assert "kwargs_handlers" in made
    (tmp_path / "train.py").write_text(made)
    results = convert_paths(sorted(tmp_path.iterdir()), Options(), [tmp_path])
    assert not any(result.changed for result in results)
    assert any("kwargs_handlers=[FP8RecipeKwargs()] is an engine's" in f.message for f in results[1].reported)


def test_lines_are_those_of_the_file_as_it_was() -> None:
    text = script(behind="torch.save(model.state_dict(), 'x')\nwriter = open('y', 'w')")
    result = convert_text(text)
    lines = text.splitlines()
    for finding in (*result.applied, *result.reported):
        if finding.code in {"BMT022", "BMT026", "BMT033"}:
            assert {"BMT022": "optimizer =", "BMT026": "torch.save", "BMT033": "open"}[finding.code] in lines[
                finding.line - 1
            ]


FIXTURES = Path(__file__).parents[2] / "fixtures"
PRINTED = ["0: 2.6346 0.3885 52 2 0.0400", "1: 2.1121 0.3029 52 4 0.0320", "2: 1.7824 0.2850 52 6 0.0256"]
RESUMED = ["2: 1.7824 0.2850 52 2 0.0256"]
"""What the script prints with accelerate 1.15 on one process, from its start and from its second state."""


def play(text: str, folder: str, *arguments: str) -> tuple[list[str], list[str]]:
    """What one rank prints, and the files of all ranks since."""
    os.chdir(folder)
    sys.argv = ["train.py", *arguments]
    for name in ("accelerate", "safetensors", "safetensors.torch"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["accelerate"].Accelerator = object  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(text, "train.py", "exec"), {"__name__": "__main__"})
    return output.getvalue().splitlines(), sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())


def test_a_whole_script() -> None:
    before = (FIXTURES / "accelerate_train.py").read_text()
    assert converted(before) == (FIXTURES / "accelerate_train_converted.py").read_text()


@pytest.mark.parametrize("number", [1, 2])
def test_the_ranks_train_as_one_process(number: int, tmp_path: Path) -> None:
    text = (FIXTURES / "accelerate_train_converted.py").read_text()
    (first, files), *others = run_ranks(number, play, text, str(tmp_path), initialize=False, fresh=True)
    assert first == PRINTED and all(printed == [] for printed, _ in others)
    states = [f"out/epoch_{n}/{part}.bin" for n in range(3) for part in ("optimizer", "pytorch_model", "scheduler")]
    random_states = [f"out/epoch_{n}/random_states_0.pkl" for n in range(3)]
    assert files == sorted([*states, *random_states, "out/last.pt"])
    again = run_ranks(number, play, text, str(tmp_path), "--resume", "2", initialize=False, fresh=True)
    assert again[0][0] == RESUMED


def test_models_of_a_library_with_a_trainer_are_converted(tmp_path: Path) -> None:
    """Its other files may take helpers of accelerate; only the trainer's own file stays."""
    library = tmp_path / "library"
    library.mkdir()
    files = {
        "__init__.py": "from .modeling import Net\nfrom .training import Trainer\n",
        "modeling.py": "import torch\nfrom accelerate.hooks import add_hook_to_module\n\n\n"
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.ones(3))\n\n    def forward(self, x):\n        return x * self.weight\n",
        "training.py": "from accelerate import Accelerator\nfrom .modeling import Net\n\n\nclass Trainer:\n"
        "    def __init__(self, args):\n        self.accelerator = Accelerator(**args)\n\n"
        "    def train(self, loss):\n        self.accelerator.backward(loss)\n",
        "tool.py": "from library import Net\n\nif __name__ == '__main__':\n    print(Net())\n",
    }
    for name, text in files.items():
        (library / name).write_text(text)
    after = {result.path.name: result for result in convert_paths(sorted(library.iterdir()), Options())}
    assert b"class Net(bmt.DistributedModule)" in after["modeling.py"].after
    assert not after["training.py"].changed and not after["tool.py"].reported


ENDLESS = """import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader


def cycle(loader):
    while True:
        for data in loader:
            yield data


accelerator = Accelerator()
model = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(model.parameters())
loader = DataLoader(data, batch_size=8, shuffle=True)
val_loader = DataLoader(val, batch_size=8)
{prepared}
for step in range(10):
    x, y = next(batches)
    loss = torch.nn.functional.mse_loss(model(x), y)
    accelerator.backward(loss)
    opt.step()
    opt.zero_grad()
    with torch.no_grad():
        held_out = model(next(val_batches)[0]).mean()
        accelerator.print(held_out.item())
"""
PREPARED = {
    "loaders": """model, opt, loader, val_loader = accelerator.prepare(model, opt, loader, val_loader)
batches = cycle(loader)
val_batches = iter(val_loader)""",
    "what goes through them": """batches = cycle(loader)
val_batches = iter(val_loader)
model, opt, batches, val_batches = accelerator.prepare(model, opt, batches, val_batches)""",
}


@pytest.mark.parametrize("prepared", PREPARED.values(), ids=PREPARED.keys())
def test_batches_taken_one_by_one(prepared: str) -> None:
    after = converted(ENDLESS.format(prepared=prepared))
    assert "accelerate" not in after
    assert "x, y = bmt.to_device(next(batches))" in after and "bmt.to_device(next(val_batches))[0]" in after
    assert "\nloader = bmt.shard_loader(" in after and "\nval_loader = DataLoader(" in after


def test_a_prepared_loader_that_nothing_trains_on_evaluates_whatever_it_is_called() -> None:
    text = script(evaluated="a, b = accelerator.gather_for_metrics((out, y))").replace("eval_loader", "second")
    after = converted(text)
    assert "    a, b = (out, y)\n" in after and "accelerat" not in after
