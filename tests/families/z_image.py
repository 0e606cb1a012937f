"""Z-Image, small: captions of their own length, time and velocity the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Model

from diffusionopd.models.backbone import CLASSIFIER_FREE

from .common import FLUX_VAE, Case, autoencoder, qwen3, qwen_tokenizer, randomised


def build(folder: Path) -> None:
    """Write the pipeline's folder."""
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 12, 12], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=False),
        vae=autoencoder(AutoencoderKL, **FLUX_VAE),
        text_encoder=qwen3(Qwen3Model, tokenizer, layers=3),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
    ).save_pretrained(folder)


def stock(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`; it writes to the list of prompts."""
    common = {**common, "prompt": list(common["prompt"])}
    return pipe(latents=x, guidance_scale=guidance - 1, **common).images


CASE = Case(
    "z_image", build, stock, length=128,
    refused=(("transformer", {"siglip_feat_dim": 8}),),
    variants=(
        ("scheduler", {"shift": 6.0}, (CLASSIFIER_FREE, 50, 6.0)),
        ("scheduler", {"shift": 3.0}, (CLASSIFIER_FREE, 8, 1.0)),  # Turbo
    ),
)  # fmt: skip
