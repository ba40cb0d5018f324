"""A model that is taken out of its wrapper is the model: what saves it needs all ranks."""

from __future__ import annotations

import pytest

from .helpers import converted

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
