"""Models of transformers and peft, where these are installed: in, trained, and out again."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksFailed, on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ShardedAccessError

transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 43).view(4, 10)
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "vocab_size": 50}


def build(name: str) -> Any:
    torch.manual_seed(5)
    if name == "gpt2":  # tied weights, which are transposed
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=24, resid_pdrop=0.0, embd_pdrop=0.0,
                                    attn_pdrop=0.0, **SPECIAL))  # fmt: skip
    if name == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                     num_key_value_heads=1, max_position_embeddings=24, **SPECIAL))  # fmt: skip
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
                              decoder_start_token_id=0, **SPECIAL))  # fmt: skip


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def steps(model: Any, sharded: bool) -> torch.Tensor:
    """Three steps of SGD on the rows of this rank, or of all."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    own = bmt.shard_batch(IDS) if sharded else IDS
    losses = []
    for _ in range(3):
        loss = loss_of(model, own)
        if sharded:
            manager = bmt.optim.OptimManager(loss_scale=None)
            manager.add_optimizer(optimizer)
            manager.backward(loss)
            manager.step()
            manager.zero_grad()
            loss = bmt.sum_loss(loss)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same_folders(one: Path, other: Path) -> None:
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    for name in os.listdir(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@on_ranks(1, 2)
def test_folders_are_those_of_one_process(tmp_path: Path) -> None:
    for name, dtype in (("gpt2", torch.float32), ("llama", torch.bfloat16), ("t5", torch.float32)):
        for kind, options in (("one", {}), ("many", {"max_shard_size": "5KB"})):
            plain = build(name).to(dtype)
            if bmt.rank() == 0:
                plain.save_pretrained(tmp_path / f"{name} {kind} plain", **options)
            bmt.BMTrainModelWrapper(plain).save_pretrained(tmp_path / f"{name} {kind}", **options)
            if bmt.rank() == 0:
                assert_same_folders(tmp_path / f"{name} {kind}", tmp_path / f"{name} {kind} plain")
            bmt.synchronize()
            again = type(plain).from_pretrained(tmp_path / f"{name} {kind}")
            assert next(again.parameters()).dtype == dtype


@on_ranks(1, 2)
def test_fine_tuned_and_resumed(tmp_path: Path) -> None:
    for name in ("gpt2", "t5"):
        if bmt.rank() == 0:
            build(name).save_pretrained(tmp_path / name)
        bmt.synchronize()
        plain = type(build(name)).from_pretrained(tmp_path / name)
        model = bmt.BMTrainModelWrapper(type(plain).from_pretrained(tmp_path / name, low_cpu_mem_usage=True))
        for one in (plain, model):
            one.train()
            one.gradient_checkpointing_enable()
        torch.testing.assert_close(steps(model, True), steps(plain, False))
        model.save_pretrained(tmp_path / f"{name} trained")
        model = bmt.BMTrainModelWrapper(type(plain).from_pretrained(tmp_path / f"{name} trained"))
        torch.testing.assert_close(steps(model, True), steps(plain, False))


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
@on_ranks(1, 2)
def test_adapters(tmp_path: Path) -> None:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    torch.manual_seed(1)
    plain = peft.get_peft_model(build("llama"), config)
    torch.manual_seed(1)
    model = bmt.BMTrainModelWrapper(peft.get_peft_model(build("llama"), config))
    torch.testing.assert_close(steps(model, True), steps(plain, False))
    bmt.save_pretrained(model, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter"))[1:] == ["adapter_config.json", "adapter_model.safetensors"]
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    torch.testing.assert_close(loss_of(again, IDS), loss_of(plain, IDS))
    merged = model.merge_and_unload()
    bmt.save_pretrained(merged, tmp_path / "merged")
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loss_of(whole, IDS), loss_of(plain, IDS))


class Classifier(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = bmt.BMTrainModelWrapper(build("llama").model)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=ids).last_hidden_state
        out: torch.Tensor = self.head(hidden[:, 0])
        return out


@on_ranks(1, 2)
def test_a_part_of_a_module_of_the_users(tmp_path: Path) -> None:
    model = Classifier()
    assert sum(isinstance(inner, bmt.Block) for inner in model.modules()) == 2
    plain = build("llama").model
    expected = plain(input_ids=IDS).last_hidden_state[:, 0]
    torch.testing.assert_close(model(IDS), nn.functional.linear(expected, *map(gathered, model.head.parameters())))
    model.encoder.save_pretrained(tmp_path / "encoder")
    if bmt.rank() == 0:
        plain.save_pretrained(tmp_path / "plain")
        assert_same_folders(tmp_path / "encoder", tmp_path / "plain")


def gathered(parameter: Any) -> torch.Tensor:
    whole: torch.Tensor = parameter.gather().detach()
    return whole


def tagger(base: type) -> type:
    """A model with a head of the user's, as ``bmt-convert`` leaves it where ``base`` is a DistributedModule."""

    class Tagger(transformers.BertPreTrainedModel, base):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any, labels: int) -> None:
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.head = nn.Linear(config.hidden_size, labels)
            self.post_init()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.bert(input_ids=ids).last_hidden_state)
            return out

    return Tagger


@on_ranks(1, 2)
def test_a_head_of_the_users(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                                     max_position_embeddings=24, **SPECIAL)  # fmt: skip
    folder = tmp_path / f"bert {bmt.rank()}"
    torch.manual_seed(5)
    transformers.BertModel(config).save_pretrained(folder)
    torch.manual_seed(6)
    plain = tagger(nn.Module).from_pretrained(folder, labels=3).eval()  # type: ignore[attr-defined]
    torch.manual_seed(6)
    model = tagger(bmt.DistributedModule).from_pretrained(folder, labels=3).eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(model(IDS), plain(IDS))
    assert plain.state_dict().keys() == model.state_dict().keys()
    bmt.save_pretrained(model, tmp_path / "saved")
    again = tagger(bmt.DistributedModule).from_pretrained(tmp_path / "saved", labels=3)  # type: ignore[attr-defined]
    torch.testing.assert_close(again.eval()(IDS), plain(IDS))


@on_ranks(1, 2)
def test_embeddings_keep_their_size(tmp_path: Path) -> None:
    model = bmt.BMTrainModelWrapper(build("gpt2"))
    if bmt.world_size() > 1:
        with pytest.raises(ShardedAccessError, match="resize_token_embeddings"):
            model.resize_token_embeddings(60, mean_resizing=False)
    larger = build("gpt2")
    larger.resize_token_embeddings(60, mean_resizing=False)
    model = bmt.BMTrainModelWrapper(larger)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path).config.vocab_size == 60


@on_ranks(1, 2)
def test_built_on_the_meta_device() -> None:
    plain = build("llama")
    with torch.device("meta"):
        model = build("llama")
    model = bmt.BMTrainModelWrapper(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert abs(float(loss_of(model, IDS)) - float(loss_of(plain, IDS))) < 0.5


@on_ranks(1, 2)
def test_generate() -> None:
    plain, model = build("gpt2").eval(), bmt.BMTrainModelWrapper(build("gpt2")).eval()
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        given = {"input_ids": IDS[:2, :4], "max_new_tokens": 5, "do_sample": False, **options}
        assert torch.equal(model.generate(**given), plain.generate(**given))
    with bmt.gathered(model):  # each rank its own, of any length
        own = IDS[:1, : 3 + bmt.rank()]
        assert torch.equal(
            model.generate(input_ids=own, max_new_tokens=4 + 2 * bmt.rank(), do_sample=False),
            plain.generate(input_ids=own, max_new_tokens=4 + 2 * bmt.rank(), do_sample=False),
        )
    assert next(model.half().parameters()).dtype == torch.float16


def apart() -> None:
    model = bmt.BMTrainModelWrapper(build("gpt2")).eval()
    model.generate(input_ids=IDS[:1, :4], max_new_tokens=2 + 3 * bmt.rank(), min_new_tokens=2 + 3 * bmt.rank())
    bmt.synchronize()


def test_ranks_that_generate_apart_end_the_job() -> None:
    with pytest.raises(RanksFailed, match=r"RankDivergenceError|exit code 70"):
        run_ranks(2, apart, fresh=True)
