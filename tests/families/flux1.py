"""FLUX.1-dev, small: guidance embedded, a pooled vector, T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from diffusionopd.models.backbone import EMBEDDED, NO_GUIDANCE
from diffusionopd.models.latents import pack, unpack
from diffusionopd.tiny.models import clip_tokenizer, t5_encoder, t5_tokenizer

from .common import FLUX_VAE, Case, autoencoder, dynamic_scheduler, randomised


def build(folder: Path, guidance_embeds: bool = True) -> None:
    """Write the pipeline's folder."""
    clip, t5 = clip_tokenizer("<|endoftext|>", 28), t5_tokenizer(28)
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=28, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=128, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    FluxPipeline(
        scheduler=dynamic_scheduler(shift=3.0),
        vae=autoencoder(AutoencoderKL, **FLUX_VAE),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5, 3),
        tokenizer_2=t5,
        transformer=randomised(transformer),
    ).save_pretrained(folder)


def stock(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`."""
    latents = pipe(latents=pack(x), guidance_scale=guidance, **common).images
    return unpack(latents, *x.shape[-2:])


CASE = Case(
    "flux1", build, stock,
    refused=(("transformer", {"in_channels": 32}),),  # Canny, Depth
    variants=(
        ("transformer", {"guidance_embeds": True}, (EMBEDDED, 28, 3.5)),
        ("transformer", {"guidance_embeds": False}, (NO_GUIDANCE, 4, 1.0)),  # schnell
    ),
)  # fmt: skip
