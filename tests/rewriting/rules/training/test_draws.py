"""What a training loop draws for its share of a batch is each rank's own; data, models and evaluation stay shared."""

from __future__ import annotations

import textwrap

import pytest

from rewriter.convert import convert_text

SCRIPT = """import torch
from torch import nn
from torch.utils.data import DataLoader

model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DataLoader(data, batch_size=8):
{body}
    loss = model(x).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def converted(text: str) -> str:
    result = convert_text(text)
    assert not result.error
    again = convert_text(result.after.decode())
    assert again.after == result.after, "a second run changes nothing"
    return result.after.decode()


def loop(body: str) -> str:
    return converted(SCRIPT.format(body=textwrap.indent(body, "    ")))


SHARED = {
    "weights": "w = torch.randn_like(model.weight)",
    "gradients": "for p in model.parameters():\n    p.grad = torch.randn_like(p)",
    "groups": 'for group in optimizer.param_groups:\n    for p in group["params"]:\n        torch.randn_like(p)',
    "a number": "p = torch.rand(1)",
    "a constant size": "z = torch.randn(64, 4)",
    "a generator": "z = torch.rand(len(x), generator=generator)",
    "no gradients": "with torch.no_grad():\n    z = torch.randn_like(x)",
    "no draw": "z = torch.zeros_like(x)",
    "a mask of a size": "m = torch.zeros(len(x))",
}


@pytest.mark.parametrize("body", SHARED.values(), ids=SHARED)
def test_left_alone(body: str) -> None:
    assert loop(body).count("own_random") == body.count("own_random")


EVALUATION = """
def evaluate(model, loader):
    for x, y in loader:
        noise = torch.randn_like(x)
        print(model(x + noise).mean().item())
"""
MODEL = """
class Masked(nn.Module):
    def forward(self, x):
        return x * torch.rand(x.shape[0], 1)
"""
BATCH = """
def get_batch(batch_size):
    starts = torch.randint(9, (batch_size,))
    return data[starts]
"""


@pytest.mark.parametrize("text", [EVALUATION, MODEL, BATCH], ids=["evaluation", "model", "batch"])
def test_left_alone_elsewhere(text: str) -> None:
    whole = SCRIPT.format(body="    pass").replace("\nmodel = ", f"{text}\n\nmodel = ", 1)
    assert "own_random" not in converted(whole)


OWN = {
    "len": "z = torch.rand(len(x))",
    "shape": "z = torch.randn(x.shape[0], 7, device=x.device)",
    "size": "z = torch.randn(x.size(0), 7)",
    "whole shape": "z = torch.randn(x.shape)",
    "starred": "z = torch.randn(*x.shape)",
    "tuple": "t = torch.randint(0, 1000, (x.shape[0],), device=x.device).long()",
    "named size": "n = x.size(0)\nt = torch.randint(0, 1000, (n,))",
    "like": "z = torch.randn_like(x)",
    "scaled": "z = 0.1 * torch.randn_like(x).to(x.device)",
    "permuted": "index = torch.randperm(x.size(0))",
    "mask": "m = torch.bernoulli(torch.full_like(x, 0.5))",
    "in place": "z = torch.empty_like(x).uniform_(-1, 1)",
    "new": "z = x.new(x.size(0), 3).normal_(0, 1)",
    "added": "x = x + torch.randn_like(x) * 0.1",
    "added in place": "x += torch.rand_like(x)",
    "annotated": "z: torch.Tensor = torch.randn_like(x)",
    "dropped": "x = nn.functional.dropout(x, 0.1)",
    "branch": "if noisy:\n    x = x + torch.randn_like(x)",
}


@pytest.mark.parametrize("body", OWN.values(), ids=OWN)
def test_drawn_apart(body: str) -> None:
    after = loop(body)
    last = body.split("\n")[-1]
    indent = " " * (4 + len(last) - len(last.lstrip()))
    assert f"{indent}with bmt.own_random():\n{indent}    {last.lstrip()}\n" in after


def test_neighbours_share_one_with() -> None:
    after = loop("t = torch.rand(len(x))\nz = torch.randn_like(x)\nq = 3\nu = torch.rand(len(x))")
    assert after.count("with bmt.own_random():") == 2
    assert "        t = torch.rand(len(x))\n        z = torch.randn_like(x)\n    q = 3\n" in after


def test_a_helper_of_the_loop() -> None:
    helper = "\ndef noisy(x):\n    z = torch.randn_like(x)\n    return x + z\n"
    text = SCRIPT.format(body="    x = noisy(x)").replace("\nmodel = ", f"{helper}\n\nmodel = ", 1)
    assert "    with bmt.own_random():\n        z = torch.randn_like(x)\n    return x + z\n" in converted(text)


MIXED = {
    "a model runs in it": "out = model(x + torch.randn_like(x))",
    "an expression": "show(torch.rand(len(x)))",
    "a condition": "if torch.rand(len(x)).sum() > 3:\n    pass",
}


@pytest.mark.parametrize("body", MIXED.values(), ids=MIXED)
def test_what_does_more_is_reported(body: str) -> None:
    result = convert_text(SCRIPT.format(body=textwrap.indent(body, "    ")))
    found = [finding for finding in result.reported if "draw the same numbers" in finding.message]
    assert [finding.line for finding in found] == [8] and b"own_random" not in result.after


NUMPY = {
    "noise": "z = torch.FloatTensor(np.random.normal(0, 1, (x.shape[0], 4)))",
    "a type of its own": "z = Variable(Tensor(np.random.normal(0, 1, (x.shape[0], 4))))",
    "labels": "z = torch.from_numpy(np.random.randint(0, 10, len(x)))",
    "a size of a name": "n = x.size(0)\nz = torch.as_tensor(np.random.rand(n, 4))",
    "a keyword": "z = torch.tensor(np.random.uniform(size=(x.shape[0], 4)))",
    "an order": "z = x[np.random.permutation(x.size(0))]",
}


@pytest.mark.parametrize("body", NUMPY.values(), ids=NUMPY)
def test_numpy_draws_for_a_share(body: str) -> None:
    head = "import numpy as np\nfrom torch.autograd import Variable\n"
    types = "Tensor = torch.cuda.FloatTensor if torch.cuda.is_available() else torch.FloatTensor\n"
    script = SCRIPT.format(body=textwrap.indent(body, "    ")).replace("model =", f"{types}model =", 1)
    assert f"    with bmt.own_random():\n        {body.splitlines()[-1]}\n" in converted(head + script)


@pytest.mark.parametrize(
    "body", ["lam = np.random.beta(1.0, 1.0)", "i = np.random.randint(10)", "r = generator.rand(len(x))"]
)
def test_numpy_draws_for_all(body: str) -> None:
    script = "import numpy as np\n" + SCRIPT.format(body=textwrap.indent(body, "    "))
    assert "own_random" not in converted(script)


DIFFUSION = """import torch
from torch import nn
from torch.utils.data import DataLoader


class Diffusion:
    def noise(self, x, t):
        noise = torch.randn_like(x)
        return x + t * noise, noise

    def steps(self, n):
        return torch.randint(low=1, high=10, size=(n,))

    def sample(self, model, n):
        with torch.no_grad():
            return model(torch.randn((n, 4)))


def train():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diffusion = Diffusion()
    for x, y in DataLoader(data, batch_size=8):
        t = diffusion.steps(x.shape[0])
        noised, noise = diffusion.noise(x, t)
        loss = (model(noised) - noise).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(diffusion.sample(model, n=x.shape[0]))


train()
"""


def test_methods_that_only_training_calls() -> None:
    after = converted(DIFFUSION)
    assert "        with bmt.own_random():\n            noise = torch.randn_like(x)\n" in after
    assert "        with bmt.own_random():\n            return torch.randint(low=1, high=10, size=(n,))\n" in after
    assert after.count("own_random") == 2


def test_methods_that_others_call_with_no_batch() -> None:
    after = converted(DIFFUSION.replace("print(diffusion.sample", "diffusion.steps(1)\n    print(diffusion.sample"))
    assert after.count("own_random") == 1


SAMPLING = """import torch
from torch.utils.data import DataLoader

net = torch.nn.Linear(2, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for epoch in range(3):
    for x in DataLoader(data, batch_size=8):
        loss = net(x).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    {draw}
"""
WHOLE = {
    "a step for each": "z = torch.randn(eval_batch_size, 2)\nfor t in steps:\n"
    "    t = torch.full((eval_batch_size,), t)\n    with torch.no_grad():\n        z = net(z + t)\n"
    "frames.append(z.numpy())",
    "inside": "with torch.no_grad():\n    z = torch.randn(batch_size, 2)\n"
    "    y = torch.zeros(batch_size, 1)\n    net(z + y)",
    "a repeat": "z = torch.randn(args.batch_size, 2)\nwith torch.inference_mode():\n"
    "    z = net(z + torch.arange(2).repeat(args.batch_size, 1))\nframes.append(z)",
}
SHARED = {
    "its size once": "z = torch.randn(batch_size, 2)\nwith torch.no_grad():\n    frames.append(net(z).numpy())",
    "it trains": "z = torch.randn(batch_size, 2)\nreal = torch.ones(batch_size, 1)\n"
    "with torch.no_grad():\n    y = net(z)\n"
    "net(z + real).mean().backward()\nopt.step()",
}  # fmt: skip


def sampled(draw: str) -> str:
    return converted(SAMPLING.format(draw=draw.replace("\n", "\n    ")))


@pytest.mark.parametrize("draw", WHOLE.values(), ids=WHOLE.keys())
def test_samples_of_which_more_takes_the_size_are_made_whole(draw: str) -> None:
    assert "shard_batch" not in sampled(draw)


@pytest.mark.parametrize("draw", SHARED.values(), ids=SHARED.keys())
def test_other_draws_are_shared_out(draw: str) -> None:
    assert "bmt.shard_batch(torch.randn(batch_size, 2))" in sampled(draw)


PICKING = """import numpy as np
import torch

data = torch.ones(40, 2)
net = torch.nn.Linear(2, 2)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(3):
    {pick}
    net(batch).mean().backward()
    opt.step()
"""
PICKED = {
    "the first of an order": "picked = np.random.permutation(len(data))[:8]\n    batch = data[picked]",
    "one by one": "picked = np.random.permutation(len(data))[:8]\n    batch = torch.stack([data[i] for i in picked])",
    "inside": "batch = torch.stack([data[i] for i in np.random.permutation(len(data))[:8]])",
    "torch's": "picked = torch.randperm(len(data))[:8]\n    batch = torch.stack([data[i] for i in picked])",
    "at random places": "picked = np.random.randint(0, len(data), 8)\n    batch = data[picked]",
}


@pytest.mark.parametrize("pick", PICKED.values(), ids=PICKED.keys())
def test_positions_that_are_shared_out_are_drawn_alike(pick: str) -> None:
    """Each rank would take its share of another batch."""
    after = converted(PICKING.format(pick=pick))
    assert "shard_batch(" in after and "own_random" not in after


WHOLE = """import numpy as np
import torch
from torch import nn

torch.manual_seed(3)
features = torch.randn(8, 4)
labels = torch.randn(8, 4)
model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{loop}
{body}
    loss = (model(x) - labels).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
LOOPS = ["for epoch in range(3):", "for x in batches_of(features):", "while True:"]
DRAWN = {
    "rows": "x = features[torch.randperm(features.size(0))]",
    "rows by numpy": "x = features[np.random.permutation(features.shape[0])]",
    "noise": "x = features + torch.randn_like(features)",
    "a mask": "x = features * (torch.rand(features.shape) > 0.5)",
    "a mask of rows": "n = len(features)\nx = features * torch.rand(n, 1)",
}


@pytest.mark.parametrize("head", LOOPS)
@pytest.mark.parametrize("body", DRAWN.values(), ids=DRAWN)
def test_ranks_that_train_on_the_same_draw_the_same(head: str, body: str) -> None:
    text = WHOLE.format(loop=head, body=textwrap.indent(body, "    "))
    result = convert_text(text)
    assert "own_random" not in converted(text)
    assert not any("draw the same numbers" in finding.message for finding in result.reported)
    assert any("all ranks train on the same batches" in finding.message for finding in result.reported)


@pytest.mark.parametrize("body", DRAWN.values(), ids=DRAWN)
def test_ranks_that_share_a_batch_draw_apart(body: str) -> None:
    head = "for features, labels in torch.utils.data.DataLoader(data, batch_size=8):"
    assert "own_random" in converted(WHOLE.format(loop=head, body=textwrap.indent(body, "    ")))


SAMPLED = {
    "of an encoder": "z = library.encode(x).latent_dist.sample()",
    "and scaled": "z = coder.encode(x.float()).latent_dist.sample() * coder.scale",
    "a posterior": "z = library.encode(x).posterior.rsample()",
    "under a name": "dist = library.encode(x)\nz = dist.sample()",
}


@pytest.mark.parametrize("body", SAMPLED.values(), ids=SAMPLED)
def test_samples_of_a_distribution_of_a_batch_are_drawn_apart(body: str) -> None:
    made = loop(body)
    last = body.rpartition("\n")[2]
    if "dist = " in body:
        assert "with bmt.own_random():" in made or "bmt.own_random() would do" in str(convert_text(text(body)).reported)
    else:
        assert f"    with bmt.own_random():\n        {last}\n" in made


NO_SAMPLES = {
    "a list": "z = library.tables(x).sample()",
    "no draw": "z = library.encode(x).latent_dist.mode()",
    "of no batch": "z = library.encode(prior).latent_dist.sample()",
    "names": "names = random.sample(words, 3)",
}


@pytest.mark.parametrize("body", NO_SAMPLES.values(), ids=NO_SAMPLES)
def test_other_samples_are_left_alone(body: str) -> None:
    assert "own_random" not in loop(body)


def test_samples_of_a_model_that_trains_are_reported() -> None:
    body = "z = [model(x)]\nz.append(model.encode(x).latent_dist.sample())"
    assert "bmt.own_random() would do" in str(convert_text(text(body)).reported)


def text(body: str) -> str:
    return SCRIPT.format(body=textwrap.indent(body, "    "))


# Item by item ------------------------------------------------------------------------------------------------------

ITEMS_HEAD = "import random\nimport numpy as np\nrng = np.random.RandomState(0)\ngen = random.Random(0)\n"
ITEMS_LEFT = {
    "one for the batch": "k = random.randrange(9)",
    "for each parameter": "for p in model.parameters():\n    k = random.random()",
    "a number of times": "ks = [random.random() for _ in range(8)]",
    "for each of others": "ks = [random.random() for name in names]",
    "no draw": "ks = [len(row) for row in x]",
}
ITEMS_OWN = {
    "python's": "ks = torch.tensor([random.randrange(9) for _ in x])",
    "by number": "ks = [random.choice(words) for _ in range(len(x))]",
    "by size": "ks = [random.random() for i in range(x.size(0))]",
    "numpy's": "ks = torch.tensor([np.random.randint(9) for row in y])",
    "torch's": "ks = torch.stack([torch.randperm(9) for row in y])",
    "a loop": "for i in range(len(x)):\n    if random.random() < 0.5:\n        x[i] = x[i].flip(0)",
    "until it fits": (
        "for row in x:\n    k = random.randrange(9)\n    while k in taken:\n        k = random.randrange(9)\n"
        "    ks.append(k)"
    ),
}
ITEMS_TOLD = {
    "a generator": "ks = [rng.randint(9) for _ in x]",
    "python's generator": "ks = [gen.random() for _ in range(len(x))]",
    "torch's generator": "ks = [torch.rand(3, generator=g) for _ in x]",
    "more is done": "for i in range(len(x)):\n    x[i] = augment(x[i], random.random())",
    "a loop by a generator": "for row in x:\n    k = rng.randint(9)\n    while k in taken:\n        k = rng.randint(9)",
}


def items(body: str) -> tuple[str, list[int]]:
    text = SCRIPT.format(body=textwrap.indent(body, "    ")).replace("model =", f"{ITEMS_HEAD}model =", 1)
    result = convert_text(text)
    told = [found.line for found in result.reported if found.code == "BMT041"]
    return result.after.decode(), told


@pytest.mark.parametrize("body", ITEMS_LEFT.values(), ids=ITEMS_LEFT)
def test_draws_that_are_not_item_by_item(body: str) -> None:
    after, told = items(body)
    assert after.count("own_random") == body.count("own_random") and not told


@pytest.mark.parametrize("body", ITEMS_OWN.values(), ids=ITEMS_OWN)
def test_draws_for_each_item_are_each_ranks_own(body: str) -> None:
    after, told = items(body)
    indented = textwrap.indent(body, " " * 8)
    assert f"    with bmt.own_random():\n{indented}\n" in after and not told


@pytest.mark.parametrize("body", ITEMS_TOLD.values(), ids=ITEMS_TOLD)
def test_draws_for_each_item_by_a_generator_are_reported(body: str) -> None:
    after, told = items(body)
    assert len(told) == 1 and "own_random" not in after


def test_draws_for_each_item_in_a_helper_of_the_loop() -> None:
    helper = "\nimport random\n\ndef negatives(users):\n    return [random.randrange(9) for _ in users]\n"
    text = SCRIPT.format(body="    z = negatives(x)").replace("\nmodel = ", f"{helper}\n\nmodel = ", 1)
    assert "    with bmt.own_random():\n        return [random.randrange(9) for _ in users]\n" in converted(text)
