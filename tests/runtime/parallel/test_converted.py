"""Models whose layers ``bmt-convert --tensor-parallel`` splits, against the same models in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from trains_alike import assert_trains_alike

import bmtrain as bmt
from bmtrain.errors import ConfigurationError
from tests.rewriting.split_models import STYLES, source

NOISE = ("key.bias", "k_proj.bias")
"""Every query's scores shift alike by it, so that its gradient is rounding error."""


def built(text: str, **config: int) -> Any:
    space: dict[str, Any] = {"__name__": "model"}
    exec(compile(text, "model.py", "exec", dont_inherit=True), space)
    torch.manual_seed(5)
    return space["Model"](space["Config"](**config))


def without_dropout(style: str) -> str:
    return source(STYLES[style]).replace("0.1", "0.0")


def converted(text: str) -> str:
    """Before ranks are asked, which so need not load the converter."""
    from rewriter.convert import convert_text
    from rewriter.plan import Options

    return convert_text(text, Options(tensor_parallel=True)).after.decode()


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[str, str]]:
    """Of each style the text of its model, and the same converted."""
    return {style: (text, converted(text)) for style in STYLES for text in [without_dropout(style)]}


@on_ranks(4, long=(2,), init={"tp_size": 2})
def test_converted_models_are_the_plain_ones(models: dict[str, tuple[str, str]]) -> None:
    for style, (text, changed) in models.items():
        plain, model = built(text), built(changed)
        named = [(name, p) for name, p in model.named_parameters() if name.endswith("weight")]
        split = [name for name, p in named if getattr(p, "_tp_mode", False)]
        assert len(split) >= 8, (style, split)  # two blocks, attention and feed-forward, both ways
        state = model.state_dict()
        for name, value in plain.state_dict().items():
            assert torch.equal(state[name], value), (style, name)
        assert_trains_alike(model, plain, noise=NOISE)


@on_ranks(2, init={"tp_size": 2})
def test_heads_that_cannot_be_divided_are_named(models: dict[str, tuple[str, str]]) -> None:
    for style, config, message in (
        ("nanogpt", {"width": 24, "heads": 3}, "Attention.n_head is 3: so many heads cannot be divided over 2"),
        ("llama", {"heads": 4, "kv_heads": 1}, "Attention.num_key_value_heads is 1"),
        ("qwen3", {"heads": 4, "kv_heads": 1}, "self_attn.k_proj has 1 heads of 4 features"),
        ("vit", {"width": 24, "heads": 3}, "Attention.num_heads is 3"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            built(models[style][1], **config)


@on_ranks(2, init={"tp_size": 2})
def test_what_is_split_is_linear_to_code_that_asks() -> None:
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(6, 4), "down": torch.nn.Linear(4, 6, bias=False)})
    bmt.parallelize_module(model, {"up": "colwise", "down": "rowwise"})
    assert all(isinstance(layer, torch.nn.Linear) for layer in model.values())
    found = [(layer.in_features, layer.out_features, layer.bias is None) for layer in model.values()]
    assert found == [(6, 4, False), (4, 6, True)] and repr(model["up"]).startswith("_Columns(in_features=6")
    assert not any(callable(layer.reset_parameters) for layer in model.values())


@on_ranks(2, init={"tp_size": 2})
def test_heads_of_an_attribute() -> None:
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(6, 6), "down": torch.nn.Linear(6, 6)})
    model.config = torch.nn.Module()  # whatever has attributes
    model.config.n_head = 3  # type: ignore[assignment]
    plan = {"up": "colwise", "down": "rowwise"}
    with pytest.raises(ConfigurationError, match="config\\.n_head is 3"):
        bmt.parallelize_module(model, plan, heads=["config.n_head"])
    with pytest.raises(ConfigurationError, match="forward cuts features into 3 heads"):
        bmt.parallelize_module(model, plan, heads=[3])
    model.config.n_head = 2  # type: ignore[assignment]
    bmt.parallelize_module(model, plan, heads=["config.n_head", "none.of.these", 2])
    assert model.config.n_head == 2
