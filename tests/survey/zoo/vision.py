"""timm, vit-pytorch and other models of pictures, in tiny configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.survey.zoo.common import B, Made
from tests.survey.zoo.stand_in import stand_in

stand_in("torchvision")


def _timm(name: str, size: int = 32, **options: Any) -> Made:
    import timm

    return timm.create_model(name, num_classes=5, **options), (torch.randn(B, 3, size, size),)


TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


def timm__vit() -> Made:
    return _timm("vit_tiny_patch16_224", **TINY, drop_path_rate=0.1, proj_drop_rate=0.1)


def timm__deit() -> Made:
    return _timm("deit_tiny_distilled_patch16_224", **TINY)


def timm__beit() -> Made:
    return _timm("beit_base_patch16_224", **TINY)


def timm__eva() -> Made:
    return _timm("eva02_tiny_patch14_224", **TINY)


def timm__swin() -> Made:
    return _timm(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
    )


def timm__convnext() -> Made:
    return _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), drop_path_rate=0.2)


def timm__mixer() -> Made:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=3, embed_dim=32, drop_path_rate=0.2)
    return model, (torch.randn(B, 3, 32, 32),)


def timm__maxvit() -> Made:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg

    config = MaxxVitCfg(embed_dim=(32, 64), depths=(1, 2), block_type=("M", "M"), stem_width=8)
    return MaxxVit(config, img_size=224, num_classes=5), (torch.randn(2, 3, 224, 224),)


def timm__coat() -> Made:
    return _timm("coat_tiny", 64, img_size=64, embed_dims=(16, 16, 16, 16), num_heads=8, serial_depths=(1, 1, 1, 1))


def timm__cait() -> Made:
    return _timm("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)


def timm__crossvit() -> Made:
    return _timm("crossvit_tiny_240", 240, embed_dim=(12, 24), depth=((1, 2, 0), (1, 2, 0)))


def timm__xcit() -> Made:
    return _timm("xcit_nano_12_p16_224", img_size=32, patch_size=16, embed_dim=32, depth=3, num_heads=4)


def timm__resnet() -> Made:
    return _timm("resnet10t", channels=(8, 16, 24, 32), stem_width=8)


def timm__mvitv2() -> Made:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg(depths=(1, 2), embed_dim=16, num_heads=1)
    return MultiScaleVit(config, img_size=(32, 32), num_classes=5), (torch.randn(B, 3, 32, 32),)


def timm__pvt() -> Made:
    return _timm("pvt_v2_b0", 64, depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2))


def segment_anything__encoder() -> Made:
    from segment_anything.modeling.image_encoder import ImageEncoderViT

    model = ImageEncoderViT(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, out_chans=16, window_size=2, use_rel_pos=True,
        rel_pos_zero_init=False, global_attn_indexes=(1,),
    )  # fmt: skip
    return model, (torch.randn(B, 3, 32, 32),)


def segment_anything__two_way() -> Made:
    from segment_anything.modeling.transformer import TwoWayTransformer

    model = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=4, mlp_dim=48)
    return model, (torch.randn(B, 32, 4, 4), torch.randn(B, 32, 4, 4), torch.randn(B, 5, 32))


def open_clip__clip() -> Made:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=12, vocab_size=65, width=32, heads=4, layers=3)
    model = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    return model, (torch.randn(B, 3, 32, 32), torch.randint(1, 65, (B, 12)))


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

    model = T2TViT(dim=32, image_size=32, depth=2, heads=4, mlp_dim=48, num_classes=5, t2t_layers=((7, 4), (3, 2)))
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
