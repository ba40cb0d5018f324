"""Models of pictures, sound and proteins from transformers, in tiny configurations."""

from __future__ import annotations

from typing import Any

import torch

from tests.survey.zoo.common import B, Made, V, ids
from tests.survey.zoo.hub import SMALL, SPECIAL

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


def transformers__segformer() -> Made:
    import transformers

    config = transformers.SegformerConfig(
        depths=[1, 2], num_encoder_blocks=2, sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(B, 3, 16, 16), "labels": torch.randint(5, (B, 16, 16))}
    return transformers.SegformerForSemanticSegmentation(config), inputs
