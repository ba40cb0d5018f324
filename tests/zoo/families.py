"""Tiny configurations of real models, with random weights: each function returns a model and its inputs.

Named ``PACKAGE__FAMILY`` after the package (see ``packages.py``) whose source is converted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Made = tuple[Any, ...]
B, T, V = 4, 12, 65  # batch, length, vocabulary


def ids(batch: int = B, length: int = T, low: int = 3, high: int = V) -> Tensor:
    return torch.randint(low, high, (batch, length))


# -- transformers -----------------------------------------------------------------------------------------------------

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


# -- x-transformers ---------------------------------------------------------------------------------------------------


def x_transformers__decoder() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=3, heads=4, rotary_pos_emb=True, attn_dropout=0.1, ff_dropout=0.1)
    return TransformerWrapper(num_tokens=V, max_seq_len=32, attn_layers=layers), (ids(),)


def x_transformers__encoder() -> Made:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=32, depth=3, heads=4, ff_glu=True, use_rmsnorm=True, alibi_pos_bias=True)
    return TransformerWrapper(num_tokens=V, max_seq_len=32, attn_layers=layers), (ids(),)


def x_transformers__layer_drop() -> Made:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=4, heads=4, layer_dropout=0.3, macaron=True)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=V, max_seq_len=32, attn_layers=layers)), (ids(),)


# -- vit-pytorch ------------------------------------------------------------------------------------------------------

PATCHES: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 32, "depth": 3, "heads": 4, "mlp_dim": 48,
}  # fmt: skip


def _picture(size: int = 16) -> tuple[Tensor]:
    return (torch.randn(B, 3, size, size),)


def vit_pytorch__vit() -> Made:
    from vit_pytorch import ViT

    return ViT(**PATCHES, dropout=0.1, emb_dropout=0.1), _picture()


def vit_pytorch__simple_vit() -> Made:
    from vit_pytorch import SimpleViT

    return SimpleViT(**PATCHES), _picture()


def vit_pytorch__deepvit() -> Made:
    from vit_pytorch.deepvit import DeepViT

    return DeepViT(**PATCHES, dropout=0.1), _picture()


def vit_pytorch__cait() -> Made:
    from vit_pytorch.cait import CaiT

    return CaiT(**PATCHES, cls_depth=2, layer_dropout=0.2), _picture()


def vit_pytorch__cross_vit() -> Made:
    from vit_pytorch.cross_vit import CrossViT

    model = CrossViT(
        image_size=16, num_classes=5, depth=2, sm_dim=16, sm_patch_size=4, sm_enc_depth=1, sm_enc_heads=2,
        sm_enc_mlp_dim=32, lg_dim=32, lg_patch_size=8, lg_enc_depth=2, lg_enc_heads=2, lg_enc_mlp_dim=32,
        cross_attn_depth=1, cross_attn_heads=2,
    )  # fmt: skip
    return model, _picture()


def vit_pytorch__pit() -> Made:
    from vit_pytorch.pit import PiT

    model = PiT(image_size=16, patch_size=4, dim=32, num_classes=5, depth=(2, 1), heads=4, mlp_dim=48)
    return model, _picture()


def vit_pytorch__cct() -> Made:
    from vit_pytorch.cct import CCT

    model = CCT(
        img_size=16, embedding_dim=32, n_conv_layers=1, kernel_size=3, stride=2, padding=1, num_layers=3, num_heads=4,
        mlp_ratio=2.0, num_classes=5, positional_embedding="learnable",
    )  # fmt: skip
    return model, _picture()


def vit_pytorch__t2t() -> Made:
    from vit_pytorch.t2t import T2TViT

    model = T2TViT(
        dim=32, image_size=32, depth=2, heads=4, mlp_dim=48, num_classes=5, t2t_layers=((7, 4), (3, 2))
    )
    return model, _picture(32)


def vit_pytorch__parallel_vit() -> Made:
    from vit_pytorch.parallel_vit import ViT

    return ViT(**PATCHES, num_parallel_branches=2), _picture()


def vit_pytorch__levit() -> Made:
    from vit_pytorch.levit import LeViT

    model = LeViT(image_size=32, num_classes=5, stages=2, dim=(16, 32), depth=2, heads=(2, 4), mlp_mult=2, dropout=0.1)
    return model, _picture(32)


def vit_pytorch__na_vit() -> Made:
    from vit_pytorch.na_vit import NaViT

    model = NaViT(**PATCHES, dropout=0.1, emb_dropout=0.1)
    pictures = [torch.randn(3, 8, 16), torch.randn(3, 16, 8), torch.randn(3, 8, 8)]
    return model, (pictures,), {"group_images": True, "group_max_seq_len": 16}


def vit_pytorch__recurrent() -> Made:
    """One stack used many times."""
    from vit_pytorch.vit import Transformer

    class Recurrent(Transformer):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            for _ in range(3):
                x = super().forward(x)
            return x

    return Recurrent(dim=32, depth=2, heads=4, dim_head=8, mlp_dim=48, dropout=0.1), (torch.randn(B, 6, 32),)


# -- mambapy ----------------------------------------------------------------------------------------------------------


def mambapy__mamba() -> Made:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=16, n_layers=3)), (torch.randn(B, 8, 16),)


def mambapy__jamba() -> Made:
    from mambapy.jamba import JambaLM, JambaLMConfig

    config = JambaLMConfig(
        d_model=32, n_layers=4, mlp_size=48, vocab_size=V, num_attention_heads=4, num_key_value_heads=2,
        attn_layer_offset=1, attn_layer_period=2, num_experts=4, num_experts_per_tok=2, expert_layer_offset=1,
        expert_layer_period=2, d_state=8, pad_token_id=0,
    )  # fmt: skip
    return JambaLM(config), (ids(length=8),)
