"""``torch.save`` to a file that the script opens itself."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

HEAD = """import pickle
import torch

model = torch.nn.Linear(4, 1)
opt = torch.optim.Adam(model.parameters())
for x in batches:
    loss = model(x).mean()
    loss.backward()
    opt.step()
"""


@pytest.mark.parametrize("what", ["model", '{"model": model, "step": 1}', "opt.state_dict()"])
@pytest.mark.parametrize(
    ("block", "after"),
    [
        ("with open(p, 'wb') as f:\n    torch.save({}, f)\n", "bmt.save_checkpoint({}, p)\n"),
        (
            "with open(p, 'wb') as f:\n    print('Save model!')\n    torch.save({}, f)\n",
            "bmt.print_rank('Save model!')\nbmt.save_checkpoint({}, p)\n",
        ),
        (
            "with open(p, 'wb') as f:\n    torch.save({}, f)\n    log.info('saved %s', p)\n",
            "bmt.save_checkpoint({}, p)\nlog.info('saved %s', p)\n",
        ),
    ],
)
def test_a_block_that_only_saves_goes(block: str, after: str, what: str) -> None:
    assert converted(HEAD + block.format(what)).endswith(after.format(what))


def test_all_ranks_give_a_state_dict_beside_other_things() -> None:
    after = converted(HEAD + "with open(p, 'wb') as f:\n    print('Save')\n    torch.save(model.state_dict(), f)\n")
    assert after.endswith("bmt.print_rank('Save')\nbmt.save(model, p)\n")


@pytest.mark.parametrize(
    "block",
    [
        "with open(p, 'wb') as f:\n    f.write(b'head')\n    torch.save(model, f)\n",
        "with open(p, 'wb') as f:\n    pickle.dump(model, f)\n",
        "with open(p, 'wb') as f:\n    pickle.dump({'model': model}, f)\n",
        "with open(p, 'wb') as f:\n    if x:\n        torch.save([model], f)\n",
    ],
)
def test_a_model_in_a_file_of_its_own_kind_is_reported(block: str) -> None:
    result = convert_text(HEAD + block)
    assert any("bmt.save_checkpoint(model, path)" in finding.message for finding in result.reported)
    assert block.encode() in result.after
