"""Models of transformers, in tiny configurations."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.common import B, Made, V, ids

SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _causal(name: str, config: str = "", **options: Any) -> Made:
    import transformers

    made = getattr(transformers, config or f"{name}Config")(**{**SPECIAL, **options})
    model = getattr(transformers, f"{name}ForCausalLM" if not name.endswith("Model") else name)(made)
    tokens = ids()
    return model, {"input_ids": tokens, "labels": tokens.clone()}


def _masked(name: str, model: str, **options: Any) -> Made:
    import transformers

    made = getattr(transformers, f"{name}Config")(**{**SPECIAL, **SMALL, **options})
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()}
    return getattr(transformers, model)(made), inputs


def transformers__gpt2() -> Made:
    import transformers

    config = transformers.GPT2Config(vocab_size=V, n_positions=32, n_embd=32, n_layer=3, n_head=4, **SPECIAL)
    tokens = ids()
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens.clone()}


def transformers__llama() -> Made:
    return _causal("Llama", **GROUPED)


def transformers__qwen2() -> Made:
    return _causal("Qwen2", **GROUPED)


def transformers__qwen3() -> Made:
    return _causal("Qwen3", **GROUPED, head_dim=8)


def transformers__mistral() -> Made:
    return _causal("Mistral", **GROUPED, sliding_window=6)


def transformers__gemma() -> Made:
    return _causal("Gemma", **GROUPED, head_dim=8)


def transformers__gemma2() -> Made:
    return _causal("Gemma2", **GROUPED, head_dim=8, sliding_window=6)


def transformers__phi3() -> Made:
    return _causal("Phi3", **GROUPED)


def transformers__mixtral() -> Made:
    return _causal("Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)


def transformers__bloom() -> Made:
    return _causal("Bloom", vocab_size=V, hidden_size=32, n_layer=3, n_head=4)


def transformers__opt() -> Made:
    return _causal("OPT", **SMALL, ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.3)


def transformers__gpt_neox() -> Made:
    return _causal("GPTNeoX", **SMALL)


def transformers__falcon() -> Made:
    return _causal("Falcon", vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)


def transformers__mamba() -> Made:
    return _causal("Mamba", vocab_size=V, hidden_size=32, num_hidden_layers=3, state_size=8)


def transformers__zamba2() -> Made:
    return _causal(
        "Zamba2", **SMALL, mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4, num_mem_blocks=1, chunk_size=8,
        num_key_value_heads=4, layers_block_type=["mamba", "hybrid", "mamba"], use_mem_rope=False, adapter_rank=4,
    )  # fmt: skip


def transformers__bert() -> Made:
    return _masked("Bert", "BertForMaskedLM")


def transformers__roberta() -> Made:
    return _masked("Roberta", "RobertaForMaskedLM")


def transformers__albert() -> Made:
    return _masked("Albert", "AlbertForMaskedLM", embedding_size=16, num_hidden_groups=1, inner_group_num=1)


def transformers__deberta() -> Made:
    return _masked(
        "DebertaV2", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
        norm_rel_ebd="layer_norm", share_att_key=True, conv_kernel_size=3,
    )  # fmt: skip


def transformers__distilbert() -> Made:
    import transformers

    config = transformers.DistilBertConfig(vocab_size=V, dim=32, hidden_dim=48, n_layers=3, n_heads=4, pad_token_id=0)
    tokens = ids()
    return transformers.DistilBertForMaskedLM(config), {"input_ids": tokens, "labels": tokens.clone()}


def transformers__electra() -> Made:
    return _masked("Electra", "ElectraForMaskedLM", embedding_size=16)


def transformers__modernbert() -> Made:
    return _masked(
        "ModernBert", "ModernBertForMaskedLM", cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2,
        local_attention=4,
    )  # fmt: skip


def transformers__t5() -> Made:
    import transformers

    config = transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0,
        relative_attention_num_buckets=8,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids(), "labels": ids()}


def transformers__bart() -> Made:
    import transformers

    config = transformers.BartConfig(
        vocab_size=V, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
        encoder_layerdrop=0.3, decoder_layerdrop=0.3, decoder_start_token_id=2, forced_eos_token_id=2, **SPECIAL,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config), {"input_ids": ids(), "labels": ids()}


IMAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def transformers__vit() -> Made:
    import transformers

    model = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=5))
    return model, {"pixel_values": torch.randn(B, 3, 16, 16), "labels": torch.randint(5, (B,))}


def transformers__dinov2() -> Made:
    import transformers

    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**IMAGE, num_labels=5))
    return model, {"pixel_values": torch.randn(B, 3, 16, 16), "labels": torch.randint(5, (B,))}


def transformers__swin() -> Made:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    model = transformers.SwinForImageClassification(config)
    return model, {"pixel_values": torch.randn(B, 3, 32, 32), "labels": torch.randint(5, (B,))}


def transformers__convnext() -> Made:
    import transformers

    config = transformers.ConvNextConfig(depths=[1, 2], hidden_sizes=[16, 32], num_stages=2, num_labels=5)
    model = transformers.ConvNextForImageClassification(config)
    return model, {"pixel_values": torch.randn(B, 3, 32, 32), "labels": torch.randint(5, (B,))}


def transformers__clip() -> Made:
    import transformers

    text = {**SMALL, **SPECIAL}
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
    inputs = {"input_ids": ids(), "pixel_values": torch.randn(B, 3, 16, 16), "return_loss": True}
    return transformers.CLIPModel(config), inputs


def transformers__whisper() -> Made:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=V, num_mel_bins=8, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16,
        max_target_positions=32, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **SPECIAL,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(B, 8, 32),
        "labels": ids(),
    }


def transformers__wav2vec2() -> Made:
    import transformers

    config = transformers.Wav2Vec2Config(
        **{**SMALL, "vocab_size": 12}, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, layerdrop=0.3,
        mask_time_prob=0.0, ctc_zero_infinity=True,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config)
    return model, {"input_values": torch.randn(B, 800), "labels": torch.randint(1, 12, (B, 5))}


def transformers__esmfold() -> Made:
    import transformers

    structure = {
        "sequence_dim": 16, "pairwise_dim": 8, "ipa_dim": 4, "resnet_dim": 8, "num_heads_ipa": 2, "num_qk_points": 2,
        "num_v_points": 2, "num_blocks": 2,
    }  # fmt: skip
    trunk = {
        "num_blocks": 2, "sequence_state_dim": 32, "pairwise_state_dim": 16, "sequence_head_width": 8,
        "pairwise_head_width": 8, "position_bins": 8, "max_recycles": 1, "structure_module": structure,
    }  # fmt: skip
    config = transformers.EsmConfig(
        **{**SMALL, "vocab_size": 33, "num_hidden_layers": 2}, pad_token_id=1, mask_token_id=32, is_folding_model=True,
        position_embedding_type="rotary", esmfold_config={"trunk": trunk, "lddt_head_hid_dim": 16, "fp16_esm": False},
    )  # fmt: skip
    return transformers.EsmForProteinFolding(config), (torch.randint(20, (B, 6)),)
