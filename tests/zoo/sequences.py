"""Models of sound, proteins and text from packages other than transformers, in tiny configurations."""

from __future__ import annotations

import torch

from tests.zoo.families import B, Made, V, ids


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


def performer__lm() -> Made:
    from performer_pytorch import PerformerLM

    model = PerformerLM(num_tokens=V, max_seq_len=16, dim=32, depth=3, heads=4, dim_head=8, causal=False)
    return model, (ids(length=16),)


def megabyte__megabyte() -> Made:
    from MEGABYTE_pytorch import MEGABYTE

    model = MEGABYTE(
        num_tokens=V, dim=(32, 16), depth=(2, 2), max_seq_len=(8, 4), heads=4, dim_head=8, flash_attn=False
    )
    return model, (ids(length=32),), {"return_loss": True}


def demucs__demucs() -> Made:
    from demucs.demucs import Demucs

    model = Demucs(["a", "b"], channels=4, depth=3, lstm_layers=1, resample=False, dconv_mode=1, dconv_attn=9)
    return model, (torch.randn(2, 2, 1024),)


def demucs__transformer() -> Made:
    from demucs.transformer import CrossTransformerEncoder

    model = CrossTransformerEncoder(dim=16, num_layers=3, num_heads=4, dropout=0.1)
    return model, (torch.randn(B, 16, 4, 8), torch.randn(B, 16, 20))


def torchscale__decoder() -> Made:
    from torchscale.architecture.config import DecoderConfig
    from torchscale.architecture.decoder import Decoder

    config = DecoderConfig(
        decoder_embed_dim=32, decoder_ffn_embed_dim=48, decoder_layers=3, decoder_attention_heads=4, vocab_size=V,
        dropout=0.1, drop_path_rate=0.2,
    )  # fmt: skip
    return Decoder(config, embed_tokens=torch.nn.Embedding(V, 32)), (ids(),)


def torchscale__retnet() -> Made:
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    config = RetNetConfig(
        decoder_embed_dim=32, decoder_value_embed_dim=64, decoder_ffn_embed_dim=48, decoder_layers=3,
        decoder_retention_heads=4, vocab_size=V, dropout=0.1,
    )  # fmt: skip
    return RetNetDecoder(config, embed_tokens=torch.nn.Embedding(V, 32)), (ids(),)
