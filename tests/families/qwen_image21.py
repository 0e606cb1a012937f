"""Qwen-Image 2.1, small: a processor in the place of a tokenizer, one stream, a VAE with transparency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from diffusionopd.models.backbone import CLASSIFIER_FREE

from .common import LATENTS, Case, bare_processor, dynamic_scheduler, qwen_tokenizer, randomised, vision_language

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
SIGMAS = [1.0, 0.8, 0.65, 0.4, 0.1]
"""As many as the tests' steps."""


def build(folder: Path) -> None:
    """Write the pipeline's folder, its processor's tokenizer as the processor itself saves it."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = CHAT
    torch.manual_seed(1)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, **LATENTS
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text_encoder = vision_language(
        Qwen3VLForConditionalGeneration, Qwen3VLConfig, tokenizer, {"head_dim": 16, "rope_parameters": rope},
        {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    )  # fmt: skip
    pipe = QwenImage21Pipeline(
        scheduler=dynamic_scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=vae.eval(),
        text_encoder=text_encoder,
        processor=bare_processor(Qwen3VLProcessor, tokenizer),
        transformer=randomised(transformer),
        sample_sigmas=SIGMAS,
    )
    pipe.processor.save_pretrained = tokenizer.save_pretrained
    pipe.save_pretrained(folder)


def parts(folder: Path) -> dict[str, Any]:
    """See :class:`Case`."""
    return {"processor": bare_processor(Qwen3VLProcessor, Qwen2Tokenizer.from_pretrained(folder / "processor"))}


def stock(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`; one by one, because prompts of different lengths move each other's images there."""
    options = {name: value for name, value in common.items() if name not in ("prompt", "max_sequence_length")}
    options |= {"negative_prompt": " "} if guidance > 1 else {}
    found = [
        pipe(prompt, latents=own.flatten(2).transpose(1, 2), true_cfg_scale=guidance, **options).images
        for prompt, own in zip(common["prompt"], x.split(1), strict=True)
    ]
    return torch.cat(found).transpose(1, 2).reshape(x.shape)


CASE = Case(
    "qwen_image21", build, stock, resolution=64, length=400, parts=parts,
    variants=(
        ("index", {"sample_sigmas": None}, (CLASSIFIER_FREE, 40, 1.0)),
        ("index", {"sample_sigmas": [1.0, 0.5]}, (CLASSIFIER_FREE, 2, 1.0)),
    ),
)  # fmt: skip
