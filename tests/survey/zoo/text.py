"""Models of text from packages other than transformers, in tiny configurations."""

from __future__ import annotations

import torch

from tests.survey.zoo.common import B, Made, V, ids
from tests.survey.zoo.stand_in import stand_in

stand_in("torchvision", "torchao", "datasets", "kagglehub", "omegaconf", "lightning", "torchmetrics")


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


def torchtune__llama3() -> Made:
    from torchtune.models.llama3 import llama3

    model = llama3(
        vocab_size=V, num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=32, intermediate_dim=48,
        attn_dropout=0.1,
    )  # fmt: skip
    return model, (ids(),)


def torchtune__clip() -> Made:
    from torchtune.models.clip import clip_vision_encoder

    model = clip_vision_encoder(
        tile_size=16, patch_size=4, embed_dim=32, num_layers=3, num_heads=4, out_indices=[0, 2], max_num_tiles=1
    )
    return model, (torch.randn(B, 1, 1, 3, 16, 16),)


def litgpt__gpt() -> Made:
    from litgpt.config import Config
    from litgpt.model import GPT

    return GPT(Config(block_size=32, padded_vocab_size=V, n_layer=3, n_head=4, n_embd=32)), (ids(),)


def litgpt__moe() -> Made:
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=32, padded_vocab_size=V, n_layer=3, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48,
        mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, norm_class_name="RMSNorm", parallel_residual=False,
        bias=False, rotary_percentage=1.0,
    )  # fmt: skip
    return GPT(config), (ids(),)
