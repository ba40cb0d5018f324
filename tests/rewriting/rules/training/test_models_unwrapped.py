"""A model that is taken out of its wrapper is the model: what saves it needs all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

from ...helpers import converted

SCRIPT = """import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer


def unwrap_model(model):
    return model.module if hasattr(model, "module") else model


def main():
    model = GPT2LMHeadModel.from_pretrained("gpt2")
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in batches:
        loss = model(**batch)[0]
        loss.backward()
        optimizer.step()
    {unwrapped}
    {saved}.save_pretrained("out")
    tokenizer.save_pretrained("out")
    torch.save({saved}.state_dict(), "model.pt")


main()
"""


@pytest.mark.parametrize(
    "unwrapped",
    [
        "saved = model",
        'saved = model.module if hasattr(model, "module") else model',
        'saved = model if not hasattr(model, "module") else model.module',
        'saved = getattr(model, "module", model)',
        "saved = unwrap_model(model)",
    ],
)
def test_all_ranks_give_what_one_saves(unwrapped: str) -> None:
    after = converted(SCRIPT.format(unwrapped=unwrapped, saved="saved"))
    assert '    bmt.save_pretrained(saved, "out")\n' in after
    assert '    if bmt.rank() == 0:\n        tokenizer.save_pretrained("out")\n' in after
    assert '    bmt.save(saved, "model.pt")\n' in after


@pytest.mark.parametrize("saved", ["model", 'getattr(model, "module", model)', "unwrap_model(model)"])
def test_in_one_expression(saved: str) -> None:
    after = converted(SCRIPT.format(unwrapped="pass", saved=saved))
    assert f'    bmt.save_pretrained({saved}, "out")\n    if bmt.rank() == 0:\n        tokenizer' in after


NET = """import torch
from torch import nn
{imports}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)

    def forward(self, x):
        return self.a(x)

    def sizes(self):
        return [1]


{made}
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for x in xs:
    net(x).mean().backward()
    optimizer.step()
{rest}
"""
WRAPPED = {
    "over the devices": ("net = Net()\nnet = nn.DataParallel(net)", "print(net.module.sizes())"),
    "at once": ("net = nn.DataParallel(Net())", "print(net.module.sizes())"),
    "with several devices": (
        "net = Net()\nif n > 1:\n    net = nn.DataParallel(net)",
        "sizes = net.module.sizes() if n > 1 else net.sizes()\nif n > 1:\n    print(net.module.sizes())",
    ),
    "by a function": ("def make():\n    return nn.DataParallel(Net())\n\n\nnet = make()", "print(net.module.sizes())"),
    "by a function of another file": ("net = wrapped(Net())", "print(net.module.sizes())"),
    "in a dictionary": ("net = nn.DataParallel(Net())\nnets = {'a': net}", "print(nets['a'].module.sizes())"),
    "an argument": (
        "net = nn.DataParallel(Net())\n\n\ndef show(model):\n    print(model.module.sizes())\n",
        "show(net)",
    ),
    "its weights": ("net = nn.DataParallel(Net())", "torch.save(net.module.state_dict(), 'net.pt')"),
}


def of_two_files(tmp_path: Path, made: str, rest: str) -> str:
    imports = "from tools import wrapped" if "wrapped" in made else ""
    (tmp_path / "tools.py").write_text("from torch import nn\n\n\ndef wrapped(net):\n    return nn.DataParallel(net)\n")
    (tmp_path / "train.py").write_text(NET.format(imports=imports, made=made, rest=rest))
    results = convert_paths([tmp_path / "tools.py", tmp_path / "train.py"], Options(), [tmp_path])
    assert not any(result.error for result in results)
    return next(result.after.decode() for result in results if result.path.name == "train.py")


@pytest.mark.parametrize(("made", "rest"), WRAPPED.values(), ids=WRAPPED.keys())
def test_no_wrapper_is_asked_for_its_model(tmp_path: Path, made: str, rest: str) -> None:
    after = of_two_files(tmp_path, made, rest)
    assert ".module" not in after and "DataParallel" not in after


OTHERS = {
    "an average": "average = torch.optim.swa_utils.AveragedModel(net)\nprint(average.module.sizes())",
    "a class of its own": "class Shadow(nn.Module):\n    def __init__(self, net):\n        super().__init__()\n"
    "        self.module = net\n\n\nshadow = Shadow(net)\nprint(shadow.module.sizes())",
    "a file": "import tools\n\nprint(tools.module.name)",
}


@pytest.mark.parametrize("rest", OTHERS.values(), ids=OTHERS.keys())
def test_a_module_of_something_else_stays(tmp_path: Path, rest: str) -> None:
    assert ".module." in of_two_files(tmp_path, "net = nn.DataParallel(Net())", rest)


def test_without_a_wrapper_an_attribute_stays(tmp_path: Path) -> None:
    assert ".module.sizes" in of_two_files(tmp_path, "net = Net()", "print(net.module.sizes())")


PARTS = {
    "is set": "student.module.backbone.masked = False",
    "is read": "kept = student.module.backbone.weight.shape",
    "is called": "out = student.module.backbone(x)",
}


@pytest.mark.parametrize("line", PARTS.values(), ids=PARTS.keys())
def test_what_a_models_class_keeps_is_the_models(line: str) -> None:
    text = f"""import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Wrap(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


def epoch(student, opt, xs):
    for x in xs:
        {line}
        student(x).mean().backward()
        opt.step()
        opt.zero_grad()


def main(args):
    student = Wrap(nn.Linear(4, 4))
    student = DDP(student, broadcast_buffers=False) if args.swin else DDP(student)
    epoch(student, torch.optim.SGD(student.parameters(), lr=0.1), [torch.ones(2, 4)])


main(args)
"""
    assert line.replace(".module", "") in converted(text)
