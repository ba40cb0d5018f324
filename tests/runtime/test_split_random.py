"""Draws that the check of split activations sees, where another device than the CPU computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bmtrain.errors import ConfigurationError
from bmtrain.split_random import SplitRandom

Draw = Callable[[torch.Tensor], Any]


def elsewhere() -> SplitRandom:
    """Of a generator that is not the CPU's, which functions without a generator draw from here."""
    return SplitRandom(torch.Generator().manual_seed(0), 1)


ON_CPU: dict[str, Draw] = {
    "rand": lambda h: h * torch.rand(4, 1),
    "rand_like": lambda h: h * torch.rand_like(h.cpu()),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full((4, 2), 0.5)),
    "bernoulli of what is split": lambda h: torch.bernoulli(h / 2),
    "in place": lambda h: h * torch.empty(4, 2).bernoulli_(0.5),
    "dropout": lambda h: F.dropout(h, 0.5),
    "dropout of numbers": lambda h: h * F.dropout(torch.ones(4, 2), 0.5),
    "order": lambda h: h[torch.randperm(4)],
    "choice": lambda h: torch.multinomial(torch.ones(4), 2),
    "normal": lambda h: h + torch.normal(0.0, 1.0, (4, 2)),
    "a decision": lambda h: h if torch.rand(()).item() < 0.5 else h * 2,
}


@pytest.mark.parametrize("draw", ON_CPU.values(), ids=list(ON_CPU))
def test_a_draw_on_the_cpu_between_split_layers_is_refused(draw: Draw) -> None:
    random, h = elsewhere(), torch.ones(4, 2)
    with pytest.raises(ConfigurationError, match="on the CPU, the same on all"), random.forward(True, True):
        random.follow(h, True, False)
        draw(h)
    assert not random.is_own
    with random.forward(True, True):
        draw(h)


def test_a_draw_on_the_cpu_of_what_was_split_is_refused_when_something_else_was_joined() -> None:
    random, h, joined = elsewhere(), torch.ones(4, 2), torch.ones(4, 2)
    with random.forward(True, True):
        random.follow(h, True, False)
        random.follow(joined, False, True)
        F.dropout(joined, 0.5)
        with pytest.raises(ConfigurationError, match="dropout draws random numbers on the CPU"):
            F.dropout(h * 2, 0.5)


def test_other_draws_are_as_they_were() -> None:
    random, h, own = elsewhere(), torch.ones(4, 2), torch.Generator()
    with random.forward(True, True):
        noise = torch.rand(4, 1)
        random.follow(h, True, False)
        h * noise * torch.rand(4, 1, generator=own)
        torch.bernoulli(h / 2, generator=random._generator)
        F.dropout(h, 0.0)
        random.follow(joined := h + 1, False, True)
        F.dropout(joined, 0.5) + torch.rand(4, 2)
    with random.forward(False, False):
        random.follow(h, True, False)
        torch.rand(4)


def test_between_layers_that_are_called_by_themselves() -> None:
    random, h = elsewhere(), torch.ones(4, 2)
    random.follow(h, True, False)
    random.follow(h, False, True)
    random.follow(h, True, False)
    torch.rand(4)
    with pytest.raises(ConfigurationError, match="Call the whole model"):
        random.follow(h, False, True)
