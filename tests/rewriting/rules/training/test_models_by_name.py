"""Scripts that get a model whose class is not in their code, by a name or from a file: they start the ranks, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths
from rewriter.plan import Options

NETS = """from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 2)

    @classmethod
    def load(cls, path):
        return cls()


def small():
    return Net()


MODELS = {"net": Net}
MAKERS: dict[str, object] = {"small": small}
PAIRS = {"net": (dict, Net), "other": (dict, Net)}
PARTS = {"net": {"config": dict, "model": Net}}
"""
REGISTRIES = """TABLE = {}
PLAIN = dict()
STORED = {}
UPDATED = {}
NUMBERS = {}


def register(name):
    def keep(kind):
        TABLE[name] = kind
        return kind

    return keep


def plain(kind):
    PLAIN[kind.__name__] = kind
    return kind


def make(name, **given):
    return TABLE[name](**given)


def number(name):
    return NUMBERS[name](1)


NUMBERS["abs"] = abs


class Registry:
    def __init__(self):
        self.kinds = {}

    def register(self, name):
        def keep(kind):
            self.kinds[name] = kind
            return kind

        return keep

    def get(self, name):
        return self.kinds[name]

    def build(self, name, **given):
        return self.kinds[name](**given)


class Factory:
    kinds = {}

    @classmethod
    def register(cls, name):
        return lambda kind: cls.kinds.setdefault(name, kind)

    @classmethod
    def create(cls, name):
        return cls.kinds[name]()


OWN = Registry()
"""
REGISTERED = """from torch import nn
from fvcore.common.registry import Registry as Foreign
import registries
from registries import Factory, OWN, STORED, UPDATED, plain, register

FOREIGN = Foreign("models")


@register("net")
@plain
@OWN.register("net")
@FOREIGN.register()
@Factory.register("net")
class Registered(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 2)


@register("made")
def made():
    return Registered()


STORED["net"] = Registered
UPDATED.update(net=Registered)
"""
TRAIN = """import torch
from nets import Net

if __name__ == "__main__":
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.body(torch.ones(1, 4)).mean().backward()
    optimizer.step()
"""
EVALUATE = """import argparse
import json
import sys

import torch
{imports}


def main():
    name, path = sys.argv[1:]
    {made}
    model.load_state_dict(torch.load(path))
    model.eval()


if __name__ == "__main__":
    main()
"""
BY_NAME = {
    "names of a module": ("import nets", "model = nets.__dict__[name]()"),
    "attribute": ("import nets", "model = getattr(nets, name)()"),
    "kept": ("import nets", "Kind = getattr(nets, name)\n    model = Kind()"),
    "vars": ("import nets", "model = vars(nets)[name]()"),
    "globals": ("from nets import Net", "model = globals()[name]()"),
    "eval": ("from nets import *", "model = eval(name)()"),
    "table": ("from nets import MODELS", "model = MODELS[name]()"),
    "table of a module": ("import nets", "model = nets.MODELS[name]()"),
    "table of functions": ("from nets import MAKERS", "model = MAKERS[name]()"),
    "own table": ("from nets import Net", "kinds = {'net': Net}\n    model = kinds[name]()"),
    "table with get": ("from nets import MODELS", "model = MODELS.get(name)()"),
    "method": ("from nets import MODELS", "model = MODELS[name].load(path)"),
    "method of an attribute": ("import nets", "model = getattr(nets, name).load(path)"),
    "one of two": ("from nets import PAIRS", "model = PAIRS[name][1]()"),
    "method of one of two": ("from nets import PAIRS", "model = PAIRS[name][1].load(path)"),
    "one of its parts": ("import nets", "model = nets.PARTS[name]['model']()"),
    "unpacked": ("from nets import PAIRS", "config, kind = PAIRS[name]\n    model = kind.load(path)"),
    "package": ("import kinds", "model = kinds.__dict__[name]()"),
    "registered": ("import registries", "model = registries.make(name)"),
    "registered, from its table": ("from registries import TABLE", "model = TABLE[name]()"),
    "registered as it is": ("import registries", "model = registries.PLAIN[name]()"),
    "stored": ("from registries import STORED", "model = STORED[name]()"),
    "updated": ("from registries import UPDATED", "model = UPDATED.get(name)()"),
    "by an object": ("from registries import OWN", "model = OWN.get(name)()"),
    "built by an object": ("from registries import OWN", "model = OWN.build(name)"),
    "by an object of a package": ("from registered import FOREIGN", "model = FOREIGN.get(name)()"),
    "created by a class": ("from registries import Factory", "model = Factory.create(name)"),
    "kept from a table": ("from registries import TABLE", "kind = TABLE[name]\n    model = kind()"),
}
FROM_A_FILE = {
    "whole": "model = torch.load(path)",
    "of a checkpoint": "model = torch.load(path)['model'].float().eval()",
    "kept": "read = torch.load(path, weights_only=False)\n    model = read['model']",
}
NO_MODEL = {
    "another module": ("import json", "model = getattr(json, name)()"),
    "a table of numbers": ("sizes = {'a': abs}", "model = sizes[name]()"),
    "a table of pairs of numbers": ("sizes = {'a': (abs, 1)}", "model = sizes[name][0]()"),
    "of an object": ("import torch", "model = getattr(torch, name)()"),
    "a registered number": ("import registries", "model = registries.number(name)"),
    "registered numbers": ("from registries import NUMBERS", "model = NUMBERS[name]()"),
}


def evaluation(tmp_path: Path, imports: str, made: str) -> str:
    files = {"nets.py": NETS, "train.py": TRAIN, "kinds/__init__.py": "from nets import *\n"}
    files |= {"registries.py": REGISTRIES, "registered.py": REGISTERED}
    files["evaluate.py"] = EVALUATE.format(imports=imports, made=made)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    results = convert_paths([tmp_path / name for name in files], Options(), [tmp_path])
    assert not any(result.error for result in results)
    return next(r.after.decode() for r in results if r.path.name == "evaluate.py")


@pytest.mark.parametrize(("imports", "made"), BY_NAME.values(), ids=BY_NAME.keys())
def test_the_ranks_start_before_the_model(tmp_path: Path, imports: str, made: str) -> None:
    after = evaluation(tmp_path, imports, made)
    assert after.index("bmt.init_distributed()") < after.index("model = ")


@pytest.mark.parametrize("made", FROM_A_FILE.values(), ids=FROM_A_FILE.keys())
def test_the_ranks_start_before_a_model_is_read(tmp_path: Path, made: str) -> None:
    after = evaluation(tmp_path, "", made)
    assert after.index("bmt.init_distributed()") < after.index("model = ")


def test_values_that_are_read_start_nothing(tmp_path: Path) -> None:
    made = "model = json.load(open(path))\n    weights = torch.load(path)\n    weights = weights['model']"
    assert "bmt" not in evaluation(tmp_path, "", made)


@pytest.mark.parametrize(("imports", "made"), NO_MODEL.values(), ids=NO_MODEL.keys())
def test_what_makes_no_model_of_the_project_stays(tmp_path: Path, imports: str, made: str) -> None:
    assert "bmt" not in evaluation(tmp_path, imports, made)
