"""What is uploaded to a hub: one rank does it; a model, whose values all ranks give, is pointed out."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import converted

SCRIPT = """import torch
from huggingface_hub import HfApi, Repository, create_repo, upload_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("x")
tokenizer = AutoTokenizer.from_pretrained("x")
opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
api = HfApi()
repo = Repository("out", clone_from="a/b")
for x in batches:
    loss = model(**x).loss
    loss.backward()
    opt.step()
    opt.zero_grad()
"""
ONE = {
    "a tokenizer": 'tokenizer.push_to_hub("a/b")',
    "a clone": 'repo.push_to_hub(commit_message="the end", blocking=False)',
    "a clone's commits": "repo.git_push()",
    "a folder": 'api.upload_folder(folder_path="out", repo_id="a/b")',
    "a file": 'api.upload_file(path_or_fileobj="a", path_in_repo="a", repo_id="a/b")',
    "a function": 'upload_folder(folder_path="out", repo_id="a/b")',
    "a place": 'create_repo("a/b", exist_ok=True)',
    "the hub's place": 'api.create_repo("a/b", exist_ok=True)',
    "data": 'dataset.push_to_hub("a/b")',
}


@pytest.mark.parametrize("call", ONE.values(), ids=ONE.keys())
def test_one_rank_uploads(call: str) -> None:
    assert converted(SCRIPT + call + "\n").endswith(f"if bmt.rank() == 0:\n    {call}\n")


def test_under_a_test_of_options() -> None:
    after = converted(f"{SCRIPT}if args.push:\n    {ONE['a folder']}\n")
    assert after.endswith(f"if args.push:\n    if bmt.rank() == 0:\n        {ONE['a folder']}\n")


def test_one_rank_alone_stays() -> None:
    text = f"if rank == 0:\n    {ONE['a folder']}\n"
    assert converted(SCRIPT + text).endswith(text)


@pytest.mark.parametrize("call", ['model.push_to_hub("a/b")', 'model.push_to_hub("a/b", private=True)'])
@pytest.mark.parametrize("guard", ["", "if rank == 0:\n    "])
def test_a_model_is_pointed_out(call: str, guard: str) -> None:
    result = convert_text(SCRIPT + guard + call + "\n")
    told = [finding for finding in result.reported if finding.code == "BMT033"]
    assert len(told) == 1 and "every rank writes" in told[0].message


@pytest.mark.parametrize(
    "text",
    [
        'model.encoder.push_to_hub("a/b")\n',
        'model.merge_and_unload().push_to_hub("a/b")\n',
        'url = model.push_to_hub("a/b")\n',
        'def finish(net):\n    net.push_to_hub("a/b")\n\n\nfinish(model)\n',
        'def finish(net):\n    return net.push_to_hub("a/b")\n\n\nif rank == 0:\n    finish(model)\n',
    ],
)
def test_what_holds_a_models_values_is_pointed_out(text: str) -> None:
    result = convert_text(SCRIPT + text)
    told = [finding for finding in result.reported if finding.code == "BMT033"]
    assert len(told) == 1 and "bmt.save_pretrained(model, folder, push_to_hub=True" in told[0].message
    assert "if bmt.rank() == 0:\n" not in result.after.decode()


GIVEN = {
    "a commit": ('info = tokenizer.push_to_hub("a/b")', 'info = bmt.on_rank_0(tokenizer.push_to_hub)("a/b")'),
    "a folder": ('info = api.upload_folder(folder_path="a")', "info = bmt.on_rank_0(api.upload_folder)(folder_path="),
    "a place": ('url = create_repo("a/b")', 'url = bmt.on_rank_0(create_repo)("a/b")'),
    "shown": ('print(api.create_repo("a/b"))', 'bmt.print_rank(bmt.on_rank_0(api.create_repo)("a/b"))'),
}


@pytest.mark.parametrize(("text", "wanted"), GIVEN.values(), ids=GIVEN.keys())
def test_an_upload_whose_result_is_used_is_one_ranks(text: str, wanted: str) -> None:
    assert wanted in converted(f"{SCRIPT}{text}\n")


def test_a_save_that_uploads_is_of_all_ranks() -> None:
    after = converted(SCRIPT + 'model.save_pretrained("out", push_to_hub=True, repo_id="a/b")\n')
    assert after.endswith('bmt.save_pretrained(model, "out", push_to_hub=True, repo_id="a/b")\n')
