"""Models of sound, proteins and time series from packages other than transformers, in tiny configurations."""

from __future__ import annotations

import torch

from tests.survey.zoo.common import B, Made, V, ids
from tests.survey.zoo.stand_in import stand_in

stand_in("torchaudio", "pytorch_lightning", "pandas", "boto3", "botocore", "sklearn", "datasets")


def whisper__whisper() -> Made:
    from whisper.model import ModelDimensions, Whisper

    sizes = ModelDimensions(
        n_mels=8, n_audio_ctx=16, n_audio_state=32, n_audio_head=4, n_audio_layer=3, n_vocab=V, n_text_ctx=16,
        n_text_state=32, n_text_head=4, n_text_layer=3,
    )  # fmt: skip
    model = Whisper(sizes)
    state = model.state_dict()  # the package leaves this one uninitialised
    model.load_state_dict({**state, "decoder.positional_embedding": torch.randn(16, 32)})
    return model, (torch.randn(B, 8, 32), ids())


def encodec__seanet() -> Made:
    from encodec.modules.seanet import SEANetEncoder

    return SEANetEncoder(dimension=16, n_filters=4, ratios=[4, 2], lstm=1), (torch.randn(B, 1, 320),)


def encodec__model() -> Made:
    from encodec.model import EncodecModel
    from encodec.modules.seanet import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    sizes = {"dimension": 16, "n_filters": 4, "ratios": [4, 2], "lstm": 1}
    quantizer = ResidualVectorQuantizer(dimension=16, n_q=3, bins=8, kmeans_init=False)
    model = EncodecModel(SEANetEncoder(**sizes), SEANetDecoder(**sizes), quantizer, [1.5], 8000, 1)
    return model, (torch.randn(B, 1, 320),)


def esm__esm2() -> Made:
    from esm.model.esm2 import ESM2

    model = ESM2(num_layers=3, embed_dim=32, attention_heads=4)
    return model, (torch.randint(4, 24, (B, 12)),), {"repr_layers": [1, 3], "return_contacts": True}


def esm__msa() -> Made:
    import argparse

    from esm.data import Alphabet
    from esm.model.msa_transformer import MSATransformer

    options = argparse.Namespace(
        layers=2, embed_dim=32, ffn_embed_dim=48, attention_heads=4, dropout=0.1, attention_dropout=0.1,
        activation_dropout=0.1, max_tokens_per_msa=4096, max_tokens=4096, logit_bias=True, embed_positions_msa=True,
        max_positions=64, max_positions_msa=64, arch="msa_transformer", emb_layer_norm_before=True,
    )  # fmt: skip
    model = MSATransformer(options, Alphabet.from_architecture("msa_transformer"))
    return model, (torch.randint(4, 24, (B, 3, 10)),), {"repr_layers": [2]}


def perceiver__perceiver() -> Made:
    from perceiver_pytorch import Perceiver

    model = Perceiver(
        input_channels=3, input_axis=2, num_freq_bands=4, max_freq=10.0, depth=3, num_latents=8, latent_dim=32,
        cross_heads=1, latent_heads=4, cross_dim_head=8, latent_dim_head=8, num_classes=5, attn_dropout=0.1,
        ff_dropout=0.1, weight_tie_layers=True, self_per_cross_attn=2,
    )  # fmt: skip
    return model, (torch.randn(B, 8, 8, 3),)


def perceiver__io() -> Made:
    from perceiver_pytorch import PerceiverIO

    model = PerceiverIO(
        dim=32, queries_dim=32, logits_dim=5, depth=3, num_latents=8, latent_dim=32, latent_heads=4, latent_dim_head=8,
        seq_dropout_prob=0.2,
    )  # fmt: skip
    return model, (torch.randn(B, 12, 32),), {"queries": torch.randn(B, 6, 32)}


def demucs__demucs() -> Made:
    from demucs.demucs import Demucs

    model = Demucs(["a", "b"], channels=4, depth=3, lstm_layers=1, resample=False, dconv_mode=1, dconv_attn=9)
    return model, (torch.randn(2, 2, 1024),)


def demucs__transformer() -> Made:
    from demucs.transformer import CrossTransformerEncoder

    model = CrossTransformerEncoder(dim=16, num_layers=3, num_heads=4, dropout=0.1)
    return model, (torch.randn(B, 16, 4, 8), torch.randn(B, 16, 20))


def boltz__pairformer() -> Made:
    from boltz.model.layers.pairformer import PairformerModule

    model = PairformerModule(
        token_s=32, token_z=16, num_blocks=3, num_heads=4, dropout=0.1, pairwise_head_width=8, pairwise_num_heads=2,
        v2=True,
    )  # fmt: skip
    mask = torch.ones(B, 6)
    mask[0, -2:] = 0
    return model, (torch.randn(B, 6, 32), torch.randn(B, 6, 6, 16), mask, mask[:, :, None] * mask[:, None])


def chronos__bolt() -> Made:
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    config = T5Config(
        vocab_size=2, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        relative_attention_num_buckets=8, use_cache=False,
    )  # fmt: skip
    config.chronos_config = {
        "context_length": 32, "prediction_length": 8, "input_patch_size": 4, "input_patch_stride": 4,
        "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True,
    }  # fmt: skip
    inputs = {"context": torch.randn(B, 32), "target": torch.randn(B, 8)}
    return ChronosBoltModelForForecasting(config), inputs


def chronos__two() -> Made:
    from chronos.chronos2 import Chronos2Model
    from chronos.chronos2.config import Chronos2CoreConfig

    config = Chronos2CoreConfig(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    config.chronos_config = {
        "context_length": 32, "output_patch_size": 4, "input_patch_size": 4, "input_patch_stride": 4,
        "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True, "max_output_patches": 4,
    }  # fmt: skip
    inputs = {"context": torch.randn(B, 32), "future_target": torch.randn(B, 8), "num_output_patches": 2}
    return Chronos2Model(config), inputs
