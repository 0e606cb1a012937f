"""Qwen-Image-Edit 2511, small: an image beside each prompt, which both models see.

2509 is the same without ``zero_cond_t``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffusionopd.models.conditions import Reference, split_reference
from diffusionopd.models.latents import pack, unpack

from . import qwen_image
from .common import PROMPTS, Case, bare_processor, qwen_tokenizer


def build(folder: Path) -> None:
    """Write the pipeline's folder."""
    # References are seen smaller than in the published pipeline, here and by diffusers.
    pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE, pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = 32**2, 64**2
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "processor")
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(folder / "processor")
    pipe = QwenImageEditPlusPipeline(**qwen_image.components(tokenizer, zero_cond_t=True), **parts(folder))
    pipe.processor.save_pretrained = lambda *args, **kwargs: None
    pipe.save_pretrained(folder)


def parts(folder: Path) -> dict[str, Any]:
    """See :class:`Case`."""
    readers = (kind.from_pretrained(folder / "processor") for kind in (Qwen2Tokenizer, Qwen2VLImageProcessorPil))
    return {"processor": bare_processor(Qwen2VLProcessor, *readers)}


def prompts(folder: Path) -> list[str]:
    """The texts, each beside an image."""
    made = []
    for i, text in enumerate(PROMPTS):
        pixels = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        file = folder / f"{i}.png"
        Image.fromarray(pixels).resize((80, 80)).save(file)
        made.append(Reference.to(file).beside(text))
    return made


def embedded(pipe: Any, text: str, image: Image.Image) -> Tensor:
    """The pipeline's embeddings with what transformers 5 asks for, and diffusers 0.42 does not tell it."""
    small = image.resize((32, 32), Image.Resampling.LANCZOS)
    text = pipe.prompt_template_encode.format(f"Picture 1: <|vision_start|><|image_pad|><|vision_end|>{text}")
    inputs = pipe.processor(text=[text], images=[small], return_tensors="pt")
    pixels = inputs.pop("pixel_values").to(pipe.text_encoder.dtype)
    hidden = pipe.text_encoder(**inputs, pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    return hidden[:, pipe.prompt_template_encode_start_idx :]


@torch.no_grad()
def stock(pipe: Any, x: Tensor, guidance: float, common: dict[str, Any]) -> Tensor:
    """See :class:`Case`; the pipeline takes one prompt at a time, and those without an image are not for it."""
    given, *images = zip(*map(split_reference, common["prompt"]), strict=True)
    if images == [(None,) * len(x)]:
        same = {name: part for name, part in pipe.components.items() if name != "processor"}
        return qwen_image.stock(QwenImagePipeline(**same), x, guidance, common)
    options = {name: value for name, value in common.items() if name != "prompt"}
    found = []
    for text, file, own in zip(given, *images, x.split(1), strict=True):
        image = Image.open(file).convert("RGB")
        texts = {"prompt_embeds": text} | ({"negative_prompt_embeds": " "} if guidance > 1 else {})
        more = {name: embedded(pipe, each, image) for name, each in texts.items()}
        found.append(pipe(image, latents=pack(own), true_cfg_scale=guidance, **more, **options).images)
    return unpack(torch.cat(found), *x.shape[-2:])


CASE = Case(
    "qwen_image_edit", build, stock, length=500, parts=parts, prompts=prompts,
    refused=tuple(("transformer", {name: True}) for name in ("use_additional_t_cond", "use_layer3d_rope")),
)  # fmt: skip
