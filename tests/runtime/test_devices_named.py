"""``torch.set_default_device``: what the library makes for itself lies where it is needed, whatever the user chose."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import models
import oracle
import pytest
import torch
from ranks import on_ranks
from torch import nn

import bmtrain as bmt

_FACTORIES = {
    *(
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
    ),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
_THE_USERS = {
    "parallel/embedding.py",
    "parallel/linear.py",
    "parallel/projection.py",
}  # parameters are made where the user wants them


def _without_device(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _FACTORIES:
            if ast.unparse(node.func.value) == "torch" and all(word.arg != "device" for word in node.keywords):
                yield node.lineno, ast.unparse(node)


def test_the_search_finds_a_factory_without_a_device() -> None:
    assert list(_without_device("x = torch.zeros(3)\ny = torch.zeros(3, device='cpu')")) == [(1, "torch.zeros(3)")]


def test_every_tensor_the_library_makes_names_its_device() -> None:
    package = Path(bmt.__file__).parent
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    found = [
        f"{name}:{line}: {call}"
        for name in sorted(files.keys() - _THE_USERS)
        for line, call in _without_device(files[name].read_text())
    ]
    assert found == []


@on_ranks(1, 2, init={"device": "cpu"})
@pytest.mark.parametrize("ours", [True, False])
def test_steps_under_another_default_device(tmp_path: Path, ours: bool) -> None:
    """The meta device stands for a GPU: what is made there by mistake has no values."""
    reference, model = oracle.pair(models.gpt)
    make = bmt.optim.AdamOptimizer if ours else torch.optim.SGD
    theirs = (torch.optim.Adam if ours else torch.optim.SGD)(reference.parameters(), lr=1e-3)
    manager = bmt.optim.OptimManager(loss_scale=None)
    alone, count = nn.Parameter(torch.ones(3)), torch.ones(())
    batches = [models.batch("gpt", step) for step in range(3)]
    with torch.device("meta"):
        manager.add_optimizer(make(model.parameters(), lr=1e-3))
        manager.add_optimizer(torch.optim.Rprop([alone]))
        for tokens, targets in batches:
            whole = reference(tokens, targets)
            whole.backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            with torch.device(next(reference.parameters()).device):  # torch 2.11's Adam counts steps on the default one
                theirs.step()
            theirs.zero_grad()
            loss = model(models.share(tokens, "cpu"), models.share(targets, "cpu"))
            manager.backward(loss + 0 * alone.sum())
            manager.clip_grad_norm(list(model.parameters()), 0.1)
            manager.step()
            manager.zero_grad()
            oracle.assert_close(bmt.sum_loss(loss.detach()), whole.detach(), "the loss")
            assert bmt.agree(bmt.sum_loss(loss.item(), count=6) > 0)
            assert bmt.mean(loss.detach(), count) > 0
        bmt.save(model, str(tmp_path / "model.pt"))
        bmt.load(model, str(tmp_path / "model.pt"))
        manager.optimizers[0].load_state_dict(manager.optimizers[0].state_dict())
    oracle.assert_same_weights(model, reference, limit=5e-3)  # keys have next to no bias gradients
