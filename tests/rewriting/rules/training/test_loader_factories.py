"""One function makes the loaders of training and of evaluation: the evaluation's stays whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.convert import convert_paths, convert_text
from rewriter.plan import Options

from ...helpers import converted

HEAD = "import torch\nfrom torch.utils.data import DataLoader\n\n\n"
LOOP = """

net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in make({train}):
    net(x).mean().backward()
    opt.step()
with torch.no_grad():
    print(sum(net(x).mean() for x in make({val})))
"""

CASES = {
    "if and else": (
        'def make(part):\n    if part == "val":\n        mix = False\n    else:\n        mix = True\n'
        "    return DataLoader(data, shuffle=mix)\n",
        ('"train"', '"val"'),
        "if part == 'train' else",
    ),
    "a dataset by word": (
        "def make(split):\n    data = load(split)\n    return DataLoader(data)\n",
        ('"train"', '"test"'),
        "if split == 'train' else",
    ),
    "only one is named": (
        'def make(split):\n    n = 1\n    if split != "valid":\n        n = 2\n    return DataLoader(data, n)\n',
        ("name", "other"),
        "if split not in ('dev', 'eval', 'test', 'val', 'valid', 'validation') else",
    ),
    "training is named": (
        'def make(split):\n    mix = split == "train"\n    return DataLoader(data, shuffle=mix)\n',
        ("name", "other"),
        "if split == 'train' else",
    ),
    "a flag": (
        "def make(train):\n    if train:\n        mix = True\n    else:\n        mix = False\n"
        "    return DataLoader(data, shuffle=mix)\n",
        ("True", "False"),
        "if train else",
    ),
    "a flag for training by name": (
        "def make(is_train=True):\n    data = a if is_train else b\n    return DataLoader(data)\n",
        ("is_train=True", "is_train=False"),
        "if is_train else",
    ),
    "a flag for evaluation": (
        "def make(evaluate=False):\n    data = b if evaluate else a\n    return DataLoader(data)\n",
        ("", "evaluate=True"),
        "if not evaluate else",
    ),
    "two for training": (
        "def make(split):\n    return DataLoader(load(split))\n\n\nmore = make('extra')\n",
        ('"train"', '"dev"'),
        "if split in ('extra', 'train') else",
    ),
    "an option that is tested": (
        "def make(mix):\n    data = a if mix else b\n    return DataLoader(data)\n",
        ("True", "False"),
        "if mix else",
    ),
    "the order": (
        "def make(data, shuffle=False):\n    return DataLoader(data, 8, shuffle)\n",
        ("a, True", "b"),
        "if shuffle else",
    ),
    "kept in order": (
        "def make(data, fixed=True):\n    return DataLoader(data)\n",
        ("a, fixed=False", "b"),
        "if not fixed else",
    ),
    "a keyword": (
        "def make(size, *, mode):\n    return DataLoader(load(mode), size)\n",
        ('4, mode="train"', '4, mode="eval"'),
        "if mode == 'train' else",
    ),
}


@pytest.mark.parametrize(("factory", "given", "case"), CASES.values(), ids=CASES.keys())
def test_the_loader_of_evaluation_stays_whole(factory: str, given: tuple[str, str], case: str) -> None:
    after = converted(HEAD + factory + LOOP.format(train=given[0], val=given[1]))
    assert "return bmt.shard_loader(DataLoader(" in after and f") {case} DataLoader(" in after


SHARED = {
    "a size": ("def make(size):\n    return DataLoader(data, size)\n", ("8", "8")),
    "a name that holds a word": (
        "def make(retrieval):\n    data = a if retrieval else b\n    return DataLoader(data)\n",
        ("1", "2"),
    ),
    "words of data sets": ("def make(name):\n    return DataLoader(load(name))\n", ('"wiki"', '"books"')),
    "an option that is tested": (
        "def make(mix):\n    data = a if mix else b\n    return DataLoader(data)\n",
        ("True", "True"),
    ),
}


@pytest.mark.parametrize(("factory", "given"), SHARED.values(), ids=SHARED.keys())
def test_an_argument_that_does_not_tell_them_apart(factory: str, given: tuple[str, str]) -> None:
    after = converted(HEAD + factory + LOOP.format(train=given[0], val=given[1]))
    assert "return bmt.shard_loader(DataLoader(" in after and " else DataLoader(" not in after


HANDED_ON = """import torch
from torch.utils.data import DataLoader


def provide(args, flag):
    if flag == "test":
        mix = False
    elif flag == "pred":
        mix = False
    else:
        mix = True
    data = args[flag]
    return DataLoader(data, 8, shuffle=mix)


{between}
net = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in {train}:
    net(x).mean().backward()
    opt.step()
with torch.no_grad():
    print(sum(net(x).mean() for x in {val}), sum(net(x).mean() for x in {test}))
"""
THROUGH = "def get(flag):\n    return provide(args, flag)\n\n\n"
WAYS = {
    "a function": (THROUGH, "get({word})"),
    "two functions": (f"{THROUGH}def more(part):\n    return get(flag=part)\n\n\n", "more({word})"),
    "a method": (
        "class Data:\n    def get(self, flag):\n        return provide(args, flag=flag)\n\n\ndata = Data()\n",
        "data.get({word})",
    ),
    "a loop": ('parts = {}\nfor k in ("train", "val", "test"):\n    parts[k] = provide(args, k)\n', "parts[{word}]"),
    "a comprehension": ('parts = {k: provide(args, k) for k in ["train", "val", "test"]}\n', "parts[{word}]"),
}


@pytest.mark.parametrize(("between", "call"), WAYS.values(), ids=WAYS.keys())
def test_words_that_are_handed_on(between: str, call: str) -> None:
    """Only two words of evaluation stand in the function itself; the third is validation's."""
    calls = {part: call.format(word=f'"{part}"') for part in ("train", "val", "test")}
    assert "if flag == 'train' else" in converted(HANDED_ON.format(between=between, **calls))


CONSTANTS = 'TRAIN, VAL = "train", "val"\nTEST = "test"\n'
BY_NAME = {
    "a lambda": ("get = lambda word: provide(args, word)\n", "get({word})"),
    "a lambda, by keyword": ("get = lambda part, n=8: provide(args, flag=part)\n", "get(part={word})"),
    "a partial": ("import functools\n\nget = functools.partial(provide, args)\n", "get({word})"),
    "a partial of keywords": (
        "from functools import partial\n\nget = partial(provide, args=args)\n",
        "get(flag={word})",
    ),
    "a partial of each": (
        "from functools import partial\n\ntrain = partial(provide, args, 'train')\n"
        "val = partial(provide, args, 'val')\n"
        "test = partial(provide, args, flag='test')\n",
        "{name}()",
    ),
    "constants": (CONSTANTS, "provide(args, {constant})"),
    "constants of a class": (
        'class Part:\n    TRAIN = "train"\n    VAL = "val"\n    TEST = "test"\n',
        "provide(args, Part.{constant})",
    ),
    "a loop over a constant": (
        'PARTS = ("train", "val", "test")\nparts = {{}}\nfor k in PARTS:\n    parts[k] = provide(args, k)\n',
        "parts[{word}]",
    ),
    "another name": ("get = provide\n", "get(args, {word})"),
}


@pytest.mark.parametrize(("between", "call"), BY_NAME.values(), ids=BY_NAME.keys())
def test_words_that_come_by_another_name(between: str, call: str) -> None:
    calls = {p: call.format(word=f'"{p}"', name=p, constant=p.upper()) for p in ("train", "val", "test")}
    assert "if flag == 'train' else" in converted(HANDED_ON.format(between=between.format(), **calls))


def test_words_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(CONSTANTS)
    calls = {part: f"provide(args, {part.upper()})" for part in ("train", "val", "test")}
    text = HANDED_ON.format(between="from words import TEST, TRAIN, VAL\n", **calls)
    (tmp_path / "train.py").write_text(text)
    results = convert_paths(sorted(tmp_path.glob("*.py")), Options(), [tmp_path])
    after = next(result.after.decode() for result in results if result.path.name == "train.py")
    assert "if flag == 'train' else" in after


def test_what_is_not_seen_may_be_a_usual_word_of_evaluation() -> None:
    between = 'words = {{"flag": "val"}}\nval = provide(args, **words)\n'.format()
    text = HANDED_ON.format(between=between, train='provide(args, "train")', val="val", test='provide(args, "test")')
    after = converted(text)
    assert "if flag == 'train' else" in after or "'val', 'valid'" in after


def test_a_word_that_is_given_by_default() -> None:
    between = THROUGH.replace("get(flag)", 'get(flag="train")')
    text = HANDED_ON.format(between=between, train="get()", val='get("val")', test='get("test")')
    assert "if flag == 'train' else" in converted(text)


def test_a_long_chain_of_calls_is_followed_no_further_than_python_goes() -> None:
    links = "".join(f"    def f{n}(self, x):\n        x.f{n + 1}(x)\n\n" for n in range(400))
    text = f"import torch\nfrom torch.utils.data import DataLoader\n\n\nclass Links:\n{links}\n" + (
        "model = torch.nn.Linear(1, 1)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "loader = DataLoader(data, batch_size=8)\nfor x in loader:\n    thing.f0(x)\n"
        "    model(x).mean().backward()\n    optimizer.step()\n"
    )
    assert "bmt.shard_loader(" in converted(text)


def test_what_a_partial_makes_is_a_loader() -> None:
    make = "from functools import partial\nmake = partial(DataLoader, batch_size=8)\n"
    after = converted(HEAD + make + LOOP.format(train="a, shuffle=True", val="b"))
    assert "bmt.shard_loader(make(a, shuffle=True))" in after and after.count("shard_loader") == 1


@pytest.mark.parametrize(
    "made",
    [
        "make = lambda d: DataLoader(d, 8)\ntrain, val = make(a), make(b)\n",
        "train, val = [DataLoader(d, 8) for d in (a, b)]\n",
        "train, val = map(lambda d: DataLoader(d, 8), (a, b))\n",
    ],
)
def test_loaders_of_training_and_evaluation_that_are_made_alike_are_said(made: str) -> None:
    loop = LOOP.format(train="", val="").replace("for x in make()):", "for x in train:")
    loop = loop.replace("for x in make():", "for x in train:").replace("for x in make()))", "for x in val))")
    result = convert_text(HEAD + made + loop)
    assert b"bmt.shard_loader(DataLoader(" in result.after
    assert any("without training as well" in finding.message for finding in result.reported), result.reported


def test_loaders_of_the_project_are_loaders(tmp_path: Path) -> None:
    own = "from torch.utils.data import DataLoader\n\n\nclass Feeder(DataLoader):\n"
    own += "    def __init__(self, data, mix=False):\n        super().__init__(data, 8, mix)\n"
    loop = LOOP.replace("make(", "Feeder(").format(train="a, True", val="b")
    (tmp_path / "loaders.py").write_text(own)
    (tmp_path / "train.py").write_text(f"import torch\nfrom loaders import Feeder\n{loop}")
    results = convert_paths([tmp_path / "loaders.py", tmp_path / "train.py"], Options(), [tmp_path])
    after = results[1].after.decode()
    assert "for x in bmt.shard_loader(Feeder(a, True)):" in after and after.count("shard_loader") == 1
