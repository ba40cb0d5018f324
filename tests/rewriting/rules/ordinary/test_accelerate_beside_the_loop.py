# ruff: noqa: E501 - tables of code are easier to read on one line
"""What scripts ask of an Accelerator beside their loop: folders, hooks of states, trackers, plugins, levels of logs."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text
from rewriter.types import Refusal

from ...helpers import converted
from .test_accelerate import accumulating, script

LEVEL = "from accelerate.logging import get_logger\nlogger = get_logger(__name__, {})\n"
HOOK = """def save_hook(models, weights, folder):
    if accelerator.is_main_process:
        for number, model in enumerate(models):
            model.save_pretrained(folder)
            weights.pop()


def load_hook(models, folder):
    while len(models) > 0:
        one = models.pop()
        one.load_state_dict(library.read(folder))


"""
REGISTERED = "accelerator.register_save_state_pre_hook({})\n"
IN_BRANCHES = (
    "model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)\n"
)
OTHER = "if {test}:\n    model, other, optimizer, train_loader, eval_loader = accelerator.prepare(model, other, optimizer, train_loader, eval_loader)\nelse:\n    "


def hooked(hook: str, imports: str = HOOK) -> str:
    return script(imports=imports, behind=REGISTERED.format(hook) + "accelerator.save_state('out')")


def in_branches(test: str, behind: str, other: str = OTHER) -> str:
    made = "other = torch.nn.Linear(4, 4)\n" + other.format(test=test) + IN_BRANCHES
    return script(behind=behind).replace(IN_BRANCHES, made)


REFUSED = {
    "a hook of elsewhere": hooked("library.hook"),
    "a hook without a name": hooked("lambda models, weights, folder: None"),
    "a hook that reads the states": hooked("save_hook", HOOK.replace("weights.pop()", "library.write(weights[number])")),
    "a hook that keeps a state": hooked("save_hook", HOOK.replace("weights.pop()", "last = weights.pop()")),
    "a hook that can be taken back": script(imports=HOOK, behind="handle = accelerator.register_save_state_pre_hook(save_hook)"),
    "a hook of another function": script(imports=HOOK, behind="def ready():\n    accelerator.register_save_state_pre_hook(save_hook)\nready()\naccelerator.save_state('out')"),
    "names of its own, in a variable": script("project_config=config", imports="config = ProjectConfiguration('out', automatic_checkpoint_naming=True)\n"),
    "no folder in a variable": script("log_with='tensorboard', project_config=config", behind="accelerator.init_trackers('run')", imports="config = ProjectConfiguration()\n"),
    "half precision that is switched off": script("mixed_precision='bf16'", behind="accelerator.native_amp = False"),
    "a tracker that nothing starts": script(behind="accelerator.get_tracker('tensorboard').writer.add_text('a', 'b')"),
    "the state of an engine": script(behind="n = accelerator.state.num_processes"),
    "prepared under a call": in_branches("ready()", "accelerator.save_state('out')"),
    "prepared before what is always there": in_branches("args.both", "accelerator.save_state('out')", OTHER.replace("model, other,", "other, model,")),
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_left_whole_with_a_reason(text: str) -> None:
    result = convert_text(text)
    assert not result.changed and not result.error
    assert result.reported and all(isinstance(finding, Refusal) for finding in result.reported)


def test_a_device_of_torch_is_no_accelerator() -> None:
    text = "kind = torch.accelerator.current_accelerator().type if hasattr(torch, 'accelerator') else 'cuda'"
    after = converted(script(behind=text))
    assert text in after and "accelerate" not in after


CONFIGS = {
    "in the call": ("project_config=ProjectConfiguration(project_dir='out', logging_dir='logs')", "", "'logs'"),
    "in a variable": ("project_config=config", "config = ProjectConfiguration('out', total_limit=2)\n", "'out'"),
    "by position": ("project_config=config", "config = ProjectConfiguration('out', 'logs')\n", "'logs'"),
    "beside it": ("project_dir='out'", "", "'out'"),
}


@pytest.mark.parametrize(("options", "before", "folder"), CONFIGS.values(), ids=CONFIGS.keys())
def test_logs_go_where_the_configuration_says(options: str, before: str, folder: str) -> None:
    imports = "from accelerate.utils import ProjectConfiguration\n" + before
    text = script(f"log_with='tensorboard', {options}", imports)
    after = converted(text.replace("for step", "accelerator.init_trackers('run')\nfor step"))
    assert f"tracker = bmt.on_rank_0(SummaryWriter)(os.path.join({folder}, 'run'))\n" in after


def test_folders_are_asked_for() -> None:
    options = "project_config=ProjectConfiguration('out', logging_dir='logs')"
    after = converted(script(options, behind="a, b = accelerator.project_dir, accelerator.logging_dir"))
    assert "\na, b = 'out', 'logs'\n" in after


def test_half_precision_is_switched_off_on_a_mac() -> None:
    after = converted(script(behind="if torch.backends.mps.is_available():\n    accelerator.native_amp = False"))
    assert "\nif torch.backends.mps.is_available():\n    pass\n" in after


@pytest.mark.parametrize("told", ["'INFO'", "log_level='INFO'"])
def test_a_logger_with_a_level(told: str) -> None:
    after = converted(script(imports=LEVEL.format(told), behind="logger.info('x')"))
    assert "logger = logging.getLogger(__name__)\nlogger.setLevel('INFO'.upper()" in after
    assert "\nlogger.root.setLevel('INFO'.upper()" in after


PLUGINS = {
    "asked": ("a = getattr(accelerator.state, 'fsdp_plugin', None) is not None", "a = None is not None\n"),
    "read": ("a = accelerator.state.deepspeed_plugin", "a = None\n"),
    "of the state": ("a = AcceleratorState().deepspeed_plugin if accelerate.state.is_initialized() else None", "a = None if False else None\n"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), PLUGINS.values(), ids=PLUGINS.keys())
def test_there_is_no_plugin(text: str, wanted: str) -> None:
    imports = "import accelerate\nfrom accelerate.state import AcceleratorState\n"
    assert wanted in converted(script(imports=imports, behind=text))


def test_hooks_come_before_the_rest_of_a_state() -> None:
    behind = REGISTERED.format("save_hook") + REGISTERED.format("load_hook").replace("save", "load", 1)
    after = converted(
        script(imports=HOOK, behind=behind + "accelerator.save_state('out')\naccelerator.load_state('out')")
    )
    assert (
        """unsaved = [None] * len([model])  # from which a hook takes what it has saved
save_hook([model], unsaved, 'out')
if bmt.agree(len(unsaved) > 0):
    bmt.save(model, os.path.join('out', "pytorch_model.bin"))
"""
        in after
    )
    assert (
        "unread = [*[model]]  # from which a hook takes what it has read\nload_hook(unread, 'out')\nif len(unread) > 0:\n    state_file = "
        in after
    )
    assert (
        "    for number, model in enumerate(models):\n        bmt.save_pretrained(model, folder)\n        if bmt.rank() == 0:\n            weights.pop()\n"
        in after
    )
    assert "register" not in after


def test_parts_that_are_prepared_in_one_branch() -> None:
    after = converted(in_branches("args.both", "accelerator.save_state('out')"))
    saved = "    bmt.save(other, os.path.join('out', \"pytorch_model_1.bin\"))\n"
    assert f"\nif args.both:\n{saved}bmt.save_checkpoint(optimizer" in after
    assert after.count("optimizer.bin") == 1 and after.count("pytorch_model.bin") == 1
    behind = REGISTERED.format("save_hook") + "accelerator.save_state('out')"
    after = converted(HOOK + in_branches("args.both", behind))
    assert (
        "prepared = []\nprepared += [model]\nif args.both:\n    prepared += [other]\nunsaved = [None] * len(prepared)"
        in after
    )
    assert "if args.both and bmt.agree(len(unsaved) > 1):\n" in after


def test_trackers_are_a_list_of_its_own() -> None:
    start = "if accelerator.is_main_process:\n    name = os.path.basename(__file__)\n    accelerator.init_trackers(name)\nfor step"
    shown = "for t in accelerator.trackers:\n    if t.name == 'tensorboard':\n        t.writer.add_text('a', 'b')\n"
    shown += "accelerator.get_tracker('tensorboard', unwrap=True).add_text('a', 'c')"
    text = script("log_with=args.report, project_dir='out'", "import os\n", behind=shown)
    after = converted(text.replace("for step", start, 1))
    assert "accelerator = types.SimpleNamespace(trackers=[])\n" in after
    assert "os.path.join('out', os.path.basename(__file__)))" in after
    assert '.trackers.append(types.SimpleNamespace(name="tensorboard", tracker=tracker, writer=tracker))\n' in after
    assert "for t in accelerator.trackers:\n" in after
    assert "next(t for t in accelerator.trackers if t.name == 'tensorboard').tracker\n" in after
    wandb = converted(text.replace("args.report", "'wandb'").replace("for step", start, 1))
    assert 'types.SimpleNamespace(name="wandb", tracker=wandb.run, run=wandb.run, log=wandb.log)' in wandb


def test_what_a_tracker_cannot_show_is_not_shown() -> None:
    text = script("log_with='tensorboard', project_dir='x'", in_the_loop="accelerator.log(logs, step=step)")
    after = converted(text.replace("for step", "logs = {'decay': None}\naccelerator.init_trackers('run')\nfor step"))
    assert "elif isinstance(value, (int, float)):\n" in after and "        else:\n" not in after


NAMES = {
    "a tracker": ("log_with='tensorboard', project_dir='x'", "tracker = 3", "accelerator.log({'a': 1}, step=step)", "tracker_.add_scalar('a', 1, step)"),
    "what it shows": ("log_with='tensorboard', project_dir='x'", "name = value = 3", "accelerator.log(logs, step=step)", "for name_, value_ in logs.items():"),
    "a folder": ("", "state_folder = 3", "accelerator.save_state(f'{step}')", "state_folder_ = f'{step}'"),
    "a file": ("", "state_file = drawn = 3", "accelerator.load_state('x')", "drawn_ = torch.load("),
}  # fmt: skip


@pytest.mark.parametrize(("options", "own", "call", "wanted"), NAMES.values(), ids=NAMES.keys())
def test_names_of_the_script_stay_its_own(options: str, own: str, call: str, wanted: str) -> None:
    start = "accelerator.init_trackers('run')\n" if options else ""
    text = script(options, in_the_loop=call).replace("for step", f"logs = {{}}\n{own}\n{start}for step", 1)
    after = converted(text)
    assert wanted in after and f"\n{own}\n" in after


def test_a_count_of_the_script_stays_its_own() -> None:
    text = accumulating("2").replace("step, (x, y) in enumerate(train_loader)", "x, y in train_loader")
    after = converted(text.replace("    # in the loop", "    index += 1").replace("for x", "index = 0\nfor x", 1))
    assert "for (index_, (x, y)) in enumerate(train_loader):\n" in after and "    index += 1\n" in after
    assert "if (index_ + 1) % 2 == 0 or index_ + 1 == len(train_loader):\n" in after


def test_triggers_are_of_all_ranks() -> None:
    stop = "if loss.item() > 3:\n    accelerator.set_trigger()\nif accelerator.check_trigger():\n    break"
    after = converted(script(in_the_loop=stop))
    assert "accelerator = types.SimpleNamespace(trigger=False)\n" in after
    assert "bmt.sum_loss(loss).item() > 3" in after and "        accelerator.trigger = True\n" in after
    assert (
        "    if bmt.total(int(accelerator.trigger)) > 0:\n        accelerator.trigger = False\n        break\n" in after
    )


TRIGGERS = [
    "stop = accelerator.check_trigger()",
    "a = accelerator.set_trigger()",
    "if step or accelerator.check_trigger():\n    break",
]


@pytest.mark.parametrize("text", TRIGGERS)
def test_triggers_in_other_places_are_refused(text: str) -> None:
    assert not convert_text(script(in_the_loop=text)).changed


def test_batches_of_a_size_that_fits() -> None:
    """The name that an inner function says is another's goes on being one."""
    body = "\n".join(f"        {line}" for line in script().splitlines()[3:])
    text = f"""import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch.utils.data import DataLoader


def main():
    accelerator = Accelerator()

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size):
        nonlocal accelerator
        accelerator.free_memory()
{body.replace("accelerator = Accelerator()", "pass")}
    train()


main()
"""
    after = converted(text)
    assert "accelerator = None\n" in after and "nonlocal accelerator\n" in after
    assert "@find_executable_batch_size(starting_batch_size=8)\n    def train(batch_size):" in after


MOCKED = """def loaders(accelerator, size):
    accelerator.print(size)
if os.environ.get("MOCKED"):
    from accelerate.test_utils.training import mocked_dataloaders
    loaders = {}
"""


def test_data_of_its_own_tests_take_another_way() -> None:
    text = script(imports="import os\n" + MOCKED.format("mocked_dataloaders"), behind="loaders(accelerator, 8)")
    after = converted(text)
    assert "\nloaders(accelerator, 8)" in after and "bmt.print_rank(size)" in after
    other = script(imports="import os\n" + MOCKED.format("library.loaders"), behind="loaders(accelerator, 8)")
    assert not convert_text(other).changed
