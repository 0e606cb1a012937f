"""Qwen-Image, small: prompts of their own length, a VAE of videos, guidance that keeps lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffusionopd.models.latents import pack, unpack

from .common import LATENTS, Case, dynamic_scheduler, qwen_tokenizer, randomised, vision_language


def components(tokenizer: Qwen2Tokenizer, **options: Any) -> dict[str, Any]:
    """What the pipeline is made of; ``options`` are the transformer's."""
    torch.manual_seed(1)
    encoder = vision_language(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, tokenizer,
        {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, {"fullatt_block_indexes": [0]},
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **options,
    )  # fmt: skip
    torch.manual_seed(2)
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **LATENTS)
    return {
        "scheduler": dynamic_scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        "vae": vae.eval(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": randomised(transformer),
    }


def build(folder: Path) -> None:
    """Write the pipeline's folder."""
    QwenImagePipeline(**components(qwen_tokenizer())).save_pretrained(folder)


def stock(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`; the negative prompt is that of the model's card."""
    more = {"negative_prompt": [" "] * len(x)} if guidance > 1 else {}
    return unpack(pipe(latents=pack(x), true_cfg_scale=guidance, **more, **common).images, *x.shape[-2:])


CASE = Case(
    "qwen_image", build, stock, length=400,
    refused=tuple(
        ("transformer", {name: True}) for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    ),
)  # fmt: skip
