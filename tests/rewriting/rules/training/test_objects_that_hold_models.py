"""Objects of packages that hold a model or its parameters: pipelines, averages, cards."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

SCRIPT = """import torch
import library
from transformers import AutoModel
{imports}

model = AutoModel.from_pretrained("m")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{made}
for step, batch in enumerate(torch.utils.data.DataLoader(data, batch_size=8)):
    loss = model(batch).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
{behind}
"""
AVERAGES = "ema = library.Averages(model.parameters())"


def script(behind: str, made: str = AVERAGES, imports: str = "") -> str:
    return SCRIPT.format(imports=imports, made=made, behind=behind)


GUARDED = "if local_rank == 0:\n    {}\n    print('done')"
STARTED = "import torch.distributed as dist\ndist.init_process_group('gloo')\nlocal_rank = dist.get_rank()"


@pytest.mark.parametrize(
    "call",
    [
        "ema.copy_to(model.parameters())",
        "ema.store(parameters=model.parameters())",
        "ema.update(model.named_parameters())",
        "library.averages.restore(model.parameters())",
    ],
)
def test_what_reads_or_writes_parameters_is_for_all_ranks(call: str) -> None:
    after = converted(script(GUARDED.format(call), imports=STARTED))
    wanted = f"\n{call}\n" if "update" not in call else f"    {call}\n"
    assert wanted in after
    assert "BMTrainModelWrapper(AutoModel" in after and "= library.Averages(model.parameters())\n" in after


@pytest.mark.parametrize("call", ["kept.append(model.parameters())", "kept.extend(list(model.parameters()))"])
def test_what_only_keeps_parameters_may_be_one_ranks(call: str) -> None:
    assert f"    {call}\n" in converted(script(GUARDED.format(call), imports=STARTED))


def test_averages_under_the_name_of_a_model_are_none() -> None:
    made = "net = AutoModel.from_pretrained('m')\nfrom transformers import Averages\nnet = Averages(net.parameters())"
    after = converted(script("net.step(model.parameters())", made))
    assert "\nnet = Averages(net.parameters())\n" in after


def test_a_pipeline_is_saved_by_all() -> None:
    made = "pipeline = library.Pipeline(unet=model, scheduler=None)"
    after = converted(script(GUARDED.format(f"{made}\n    pipeline.save_pretrained('out')"), imports=STARTED))
    assert f"\n{made}\nbmt.save_pretrained(pipeline, 'out')\n" in after


CARDS = {
    "annotated": "def card(base_model: str):",
    "optional": "def card(base_model: Optional[str] = None):",
    "a path": "def card(*, base_model: Path):",
    "a default": "def card(base_model='tiny'):",
    "a kind as default": "def card(base_model=str):",
}


@pytest.mark.parametrize("head", CARDS.values(), ids=CARDS.keys())
def test_the_name_of_a_model_is_none(head: str) -> None:
    function = f"{head}\n    made = library.Card(base_model=base_model)\n    made.save('README.md')"
    result = convert_text(script("card(base_model='m')", function))
    assert not [finding for finding in result.reported if "saves the model" in finding.message]


def test_a_model_that_is_handed_on_is_one() -> None:
    function = "def card(base_model):\n    made = library.Card(model=base_model)\n    made.save('README.md')"
    result = convert_text(script("card(base_model=model)", function))
    assert [finding for finding in result.reported if "saves the model" in finding.message]


VALIDATED = {
    "a pipeline of it": "pipe = library.Pipeline.from_pretrained('m', unet=net)\n    pipe('prompt')",
    "a function of a package": "library.show(net)",
    "the model itself": "net(torch.ones(1))",
}


@pytest.mark.parametrize("body", VALIDATED.values(), ids=VALIDATED.keys())
def test_who_is_given_the_model_may_run_it(body: str) -> None:
    function = f"def validate(net, step):\n    {body}\n"
    after = converted(script(GUARDED.format("validate(model, 3)"), function, STARTED))
    assert "\nvalidate(model, 3)\n" in after and "if local_rank == 0:\n    validate" not in after


@pytest.mark.parametrize("body", ["print(len(net))", "os.listdir(net)", "torch.load(net)"])
def test_who_only_names_the_model_may_be_one_ranks(body: str) -> None:
    function = f"import os\ndef validate(net, step):\n    {body}\n"
    after = converted(script(GUARDED.format("validate(model, 3)"), function, STARTED))
    assert "    validate(model, 3)\n" in after


LISTS = {
    "a loop asks": ("while left:", "left.pop()", True),
    "a length": ("while len(left) > 0:", "left.pop()", True),
    "a test": ("if left:", "left.clear()", True),
    "nobody asks": ("for part in parts:", "left.append(part)", False),
    "another list": ("while left:", "parts.append(left)", False),
}


@pytest.mark.parametrize(("head", "change", "everywhere"), LISTS.values(), ids=LISTS.keys())
def test_a_list_that_decides_is_changed_by_all(head: str, change: str, everywhere: bool) -> None:
    behind = f"if local_rank == 0:\n    {head}\n        {change}\n        torch.save(model.state_dict(), 'm.pt')"
    after = converted(script(behind, f"{AVERAGES}\nleft, parts = [1], [2]", STARTED))
    assert "bmt.save(model, 'm.pt')" in after
    assert (f"bmt.rank() == 0:\n        {change}\n" not in after) == everywhere


CALLED = {
    "in a guard": ("if local_rank == 0:\n    write(1)", True),
    "in a guard that opens": ("if local_rank == 0:\n    write(1)\n    torch.save(model.state_dict(), 'm')", True),
    "on all ranks": ("write(1)", False),
    "on the others": ("if local_rank == 0:\n    pass\nelse:\n    write(1)", False),
    "for its value": ("if local_rank == 0:\n    name = write(1)\n    torch.save(model.state_dict(), name)", False),
    "on all ranks, too": ("if local_rank == 0:\n    write(1)\nwrite(2)", False),
    "by nobody": ("pass", False),
}


@pytest.mark.parametrize(("behind", "is_quiet"), CALLED.values(), ids=CALLED.keys())
def test_a_function_that_one_rank_calls_writes_once(behind: str, is_quiet: bool) -> None:
    function = "def write(images):\n    for image in [images]:\n        image.save(f'{image}.png')\n    card = images\n"
    result = convert_text(script(behind, function, STARTED))
    told = [finding for finding in result.reported if "every rank writes this file" in finding.message]
    assert (not told) == is_quiet, result.reported


HELD = """import torch
from diffusers import DDPMPipeline, {kind}

{made}
{optimizer}
for batch in torch.utils.data.DataLoader(data, batch_size=8):
    loss = pipe.unet(batch).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
PIPE = "pipe = DDPMPipeline.from_pretrained('m')"
OPTIMIZER = "optimizer = torch.optim.SGD({}.parameters(), lr=0.1)"
HOLDERS = {
    "a part": (PIPE, OPTIMIZER.format("pipe.unet"), "pipe.unet"),
    "a part by name": (f"{PIPE}\nunet = pipe.unet", OPTIMIZER.format("unet"), "unet"),
    "moved before": (f"{PIPE}\npipe.to('cpu')", OPTIMIZER.format("pipe.unet"), "pipe.unet"),
    "parts of it": (PIPE, "optimizer = torch.optim.SGD([p for p in pipe.unet.parameters()], lr=0.1)", "pipe.unet"),
    "no pipeline": ("pipe = Holder('m')", OPTIMIZER.format("pipe.unet"), ""),
    "somebody's own": ("from pipes import Pipeline\npipe = Pipeline('m')", OPTIMIZER.format("pipe.unet"), ""),
    "one of two": (f"{PIPE}\nif small:\n    pipe = small", OPTIMIZER.format("pipe.unet"), ""),
    "a model itself": ("pipe = UNet2DModel.from_pretrained('m')", OPTIMIZER.format("pipe"), ""),
}


@pytest.mark.parametrize(("made", "optimizer", "model"), HOLDERS.values(), ids=HOLDERS.keys())
def test_a_model_in_a_pipeline_is_wrapped_before_its_optimizer(made: str, optimizer: str, model: str) -> None:
    after = converted(HELD.format(kind="Holder, UNet2DModel", made=made, optimizer=optimizer))
    wrapped = f"{model} = bmt.BMTrainModelWrapper({model})\noptimizer = torch.optim.SGD("
    assert (wrapped in after) if model else ("= bmt.BMTrainModelWrapper(pipe" not in after)


REPEATED = {
    "a loss": ("loss.detach().repeat(8)", False),
    "itself": ("loss.repeat(size)", False),
    "ones": ("one.repeat(size)", True),
}


@pytest.mark.parametrize(("value", "told"), REPEATED.values(), ids=REPEATED.keys())
def test_a_loss_that_is_repeated_is_no_batch(value: str, told: bool) -> None:
    text = script("", f"size, one = 8, torch.ones(1)\n{AVERAGES}").replace("batch_size=8", "batch_size=size")
    text = text.replace("    loss.backward()", f"    seen = bmt.gather_result({value}).mean()\n    loss.backward()")
    found = convert_text("import bmtrain as bmt\n" + text).reported
    assert any("has fewer than size items" in finding.message for finding in found) == told


ADDED = {
    "noise of its shape": ("noise += 0.1 * torch.randn((batch.shape[0], 1))", False),
    "by its length": ("noise += torch.rand(len(batch), 1)", False),
    "a count": ("noise += batch.shape[0]", True),
    "a count of what is drawn": ("noise += len(torch.randn(3)) * len(batch)", True),
}


@pytest.mark.parametrize(("added", "told"), ADDED.values(), ids=ADDED.keys())
def test_the_shape_of_what_is_added_is_no_count(added: str, told: bool) -> None:
    noisy = f"    noise = torch.zeros_like(batch)\n    {added}\n    loss = model(batch + noise).mean()\n"
    text = script("print(noise)").replace("    loss = model(batch).mean()\n", noisy)
    found = [finding for finding in convert_text(text).reported if "adds up this rank's share" in finding.message]
    assert bool(found) == told


STATES = {
    "its own": ("inner = model", "inner.save_pretrained('out', state_dict=model.state_dict())", True),
    "of another model": ("inner = ema", "inner.save_pretrained('out', state_dict=model.state_dict())", False),
    "made anew since": (
        "inner = model\nmodel = library.other(model)",
        "inner.save_pretrained('out', state_dict=model.state_dict())",
        False,
    ),
    "one of two": (
        "inner = model\nif best:\n    inner = best",
        "inner.save_pretrained('out', state_dict=model.state_dict())",
        False,
    ),
}


@pytest.mark.parametrize(("made", "call", "is_own"), STATES.values(), ids=STATES.keys())
def test_the_state_of_a_model_under_another_name_is_its_own(made: str, call: str, is_own: bool) -> None:
    after = converted(script(f"{made}\n{call}"))
    assert ("bmt.save_pretrained(inner, 'out')" in after) == is_own
