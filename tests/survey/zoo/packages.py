"""The packages whose models are verified, and what their sources need to be imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """``needs``: installed with it, ``alone``: without what they need in turn, such as another build of torch.

    ``beside``: other packages of this list that it imports, as they ship. ``without``: files that are not converted.
    """

    name: str
    version: str
    needs: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


_HF = ("huggingface_hub", "safetensors", "tokenizers", "regex", "pyyaml", "requests", "tqdm", "packaging")

PACKAGES = {
    "transformers": Package("transformers", "5.23.0", _HF),
    "x_transformers": Package("x-transformers", "2.31.10", ("einops", "einx", "loguru", "torch-einops-utils")),
    "vit_pytorch": Package("vit-pytorch", "1.26.11", ("einops", "torch-einops-utils")),
    "timm": Package("timm", "1.0.31", _HF),
    "mambapy": Package("mambapy", "1.2.0", ("einops",)),
    "whisper": Package("openai-whisper", "20250625", ("tiktoken", "more-itertools", "numba")),
    "encodec": Package("encodec", "0.1.1", ("einops",)),
    "segment_anything": Package("segment-anything", "1.0"),
    "open_clip": Package("open-clip-torch", "3.3.0", ("ftfy", "regex", *_HF)),
    "esm": Package("fair-esm", "2.0.0"),
    "perceiver": Package("perceiver-pytorch", "0.11.0", ("einops",)),
    "performer": Package("performer-pytorch", "1.1.4", ("einops", "local-attention", "axial-positional-embedding")),
    "diffusion": Package(
        "denoising-diffusion-pytorch", "2.3.4", ("einops", "ema-pytorch", "pillow", "scipy", "accelerate")
    ),
    "demucs": Package("demucs", "4.1.0", ("einops", "julius"), alone=("openunmix",)),
    "torchscale": Package("torchscale", "0.3.0", ("fairscale",), beside=("timm",)),
    "diffusers": Package("diffusers", "0.42.1", _HF),
    "torchtune": Package("torchtune", "0.6.1", ("numpy", "pillow", "sentencepiece", "tiktoken", *_HF)),
    "litgpt": Package("litgpt", "0.5.13", _HF, alone=("lightning-utilities",)),
    "boltz": Package(  # without its training program, which is written for Lightning
        "boltz", "2.2.1", ("einops", "scipy"), without=("boltz/main.py", "boltz/data/*", "boltz/model/models/*")
    ),
    "chronos": Package("chronos-forecasting", "2.3.2", ("einops", *_HF), beside=("transformers",)),
    "megabyte": Package("megabyte-pytorch", "0.3.6", ("einops", "beartype")),
}
"""By the first part of a factory's name."""

SUBSET = (
    "transformers__llama", "transformers__mixtral", "transformers__bert", "transformers__t5", "timm__swin",
    "vit_pytorch__vit", "vit_pytorch__recurrent", "x_transformers__decoder", "mambapy__jamba",
)  # fmt: skip
"""What every change is tested with: few packages, most kinds of model and of loop."""
