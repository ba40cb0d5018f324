"""Diffusion models, in tiny configurations."""

from __future__ import annotations

import torch

from tests.survey.zoo.common import B, Made
from tests.survey.zoo.stand_in import stand_in

stand_in("torchvision")


def diffusion__unet() -> Made:
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet

    model = Unet(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, flash_attn=False)
    return model, (torch.randn(B, 3, 16, 16), torch.randint(100, (B,)))


def diffusion__unet_1d() -> Made:
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d import Unet1D

    model = Unet1D(dim=8, dim_mults=(1, 2), channels=3, attn_heads=2, attn_dim_head=8)
    return model, (torch.randn(B, 3, 16), torch.randint(100, (B,)))


def diffusion__karras() -> Made:
    from denoising_diffusion_pytorch.karras_unet import KarrasUnet

    model = KarrasUnet(
        image_size=16, dim=8, dim_max=16, num_downsamples=2, num_blocks_per_stage=1, attn_res=(4,), attn_dim_head=8,
        attn_flash=False, fourier_dim=8, channels=3,
    )  # fmt: skip
    return model, (torch.randn(B, 3, 16, 16), torch.rand(B))


def diffusion__uvit() -> Made:
    from denoising_diffusion_pytorch.simple_diffusion import UViT

    model = UViT(dim=8, dim_mults=(1, 2), vit_depth=2, attn_dim_head=8, attn_heads=2, channels=3, patch_size=2)
    return model, (torch.randn(B, 3, 16, 16), torch.rand(B))


def diffusers__unet() -> Made:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(16, 16),
        norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (torch.randn(B, 3, 16, 16), torch.randint(100, (B,)))


def diffusers__unet_condition() -> Made:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, (torch.randn(B, 4, 16, 16), torch.randint(100, (B,)), torch.randn(B, 6, 32))


def diffusers__dit() -> Made:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, dropout=0.1, norm_num_groups=4,
    )  # fmt: skip
    inputs = {"timestep": torch.randint(10, (B,)), "class_labels": torch.randint(10, (B,))}
    return model, (torch.randn(B, 4, 8, 8),), inputs


def diffusers__vae() -> Made:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    return model, (torch.randn(B, 3, 16, 16),)
