"""Models of language from transformers, in tiny configurations."""

from __future__ import annotations

from typing import Any

import torch

from tests.survey.zoo.common import Made, V, ids

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


def transformers__nemotron_h() -> Made:
    sizes = {**GROUPED, "num_hidden_layers": 4}
    return _causal(
        "NemotronH", **sizes, hybrid_override_pattern="M*-M", ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=8,
        n_groups=2, chunk_size=8, head_dim=8,
    )  # fmt: skip


def transformers__gemma3n() -> Made:
    sizes = {**GROUPED, "num_hidden_layers": 4}
    return _causal(
        "Gemma3n", "Gemma3nTextConfig", **sizes, head_dim=8, vocab_size_per_layer_input=V, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=4, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    )  # fmt: skip


def transformers__deepseek_v3() -> Made:
    return _causal(
        "DeepseekV3", **GROUPED, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        moe_intermediate_size=16,
    )  # fmt: skip


def transformers__gpt_oss() -> Made:
    return _causal("GptOss", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6)


def transformers__qwen3_next() -> Made:
    sizes = {**GROUPED, "num_hidden_layers": 4}
    return _causal(
        "Qwen3Next", **sizes, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip


def transformers__lfm2() -> Made:
    return _causal("Lfm2", **GROUPED, layer_types=["conv", "full_attention", "conv"], block_ff_dim=48)


def transformers__rwkv() -> Made:
    return _causal("Rwkv", vocab_size=V, hidden_size=32, num_hidden_layers=3, intermediate_size=48, context_length=32)


def transformers__xlnet() -> Made:
    import transformers

    config = transformers.XLNetConfig(vocab_size=V, d_model=32, n_layer=3, n_head=4, d_inner=48)
    tokens = ids()
    return transformers.XLNetLMHeadModel(config), {"input_ids": tokens, "labels": tokens.clone()}


def transformers__funnel() -> Made:
    import transformers

    config = transformers.FunnelConfig(
        vocab_size=V, block_sizes=[2, 1], d_model=32, n_head=4, d_head=8, d_inner=48, pad_token_id=0
    )
    tokens = ids()
    return transformers.FunnelForMaskedLM(config), {"input_ids": tokens, "labels": tokens.clone()}
