"""Qwen-Image-Edit 2509 and 2511: an image is edited as its prompt says. Prompts without one are Qwen-Image's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from torch import nn
from transformers import ProcessorMixin, Qwen2VLProcessor

from diffusionopd.models.backbone import Configs
from diffusionopd.models.conditions import Conditions, Row, split_reference
from diffusionopd.models.qwen_image import LAYERED, QwenImage


class ImageTextProcessor(Qwen2VLProcessor):
    """The pipeline's processor without what reads videos, for which the whole needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = "<|image_pad|>"  # noqa: S105 (no secret)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class QwenImageEdit(QwenImage):
    """Conditions of a prompt with an image are also the image's latents, ``image``, and ``negative``: the tokens of the
    negative prompt beside that image, of one length, because all images are square."""

    TEXT = {**QwenImage.TEXT, "processor": ("Qwen2VLProcessor",)}
    READERS = {"processor": ImageTextProcessor}
    READS_IMAGES = True
    DEFAULTS = replace(QwenImage.DEFAULTS, max_sequence_length=1024)  # of which an image takes 200
    VARIANTS: ClassVar[Mapping[str, str]] = LAYERED  # zero_cond_t is 2511's: images are seen at time 0

    @classmethod
    def row_shapes(cls, max_sequence_length: int, configs: Configs) -> dict[str, tuple[int, ...]]:
        """See :meth:`Backbone.row_shapes`; of a prompt with an image."""
        shapes = super().row_shapes(max_sequence_length, configs)
        return {**shapes, "negative": shapes["tokens"], "image": cls.shape_of(_side(stock.VAE_IMAGE_SIZE), configs)}

    @classmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """See :meth:`Backbone.encode`."""
        given = [split_reference(prompt) for prompt in prompts]
        texts = [text for text, image in given if image is None]
        plain = QwenImagePipeline(None, None, pipeline.text_encoder, pipeline.tokenizer, pipeline.transformer)
        rows = iter(super().encode(plain, texts, device, max_sequence_length) if texts else [])
        hook = pipeline.text_encoder.register_forward_pre_hook(_mark_image, with_kwargs=True)
        try:
            more = pipeline, device, max_sequence_length
            return [next(rows) if image is None else cls._edit(text, image, *more) for text, image in given]
        finally:
            hook.remove()

    @classmethod
    def _edit(cls, text: str, file: Path, pipeline: Any, device: torch.device, max_sequence_length: int) -> Row:
        """The row of a prompt with an image, which the pipeline shows to both models in sizes of its own."""
        small, large = (_side(area) for area in (stock.CONDITION_IMAGE_SIZE, stock.VAE_IMAGE_SIZE))
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        seen = {"image": [pipeline.image_processor.resize(image, small, small)], "device": device}
        tokens, negative = (
            pipeline.encode_prompt(prompt=[each], max_sequence_length=max_sequence_length, **seen)[0][0]
            for each in (text, cls.NEGATIVE_PROMPT)
        )
        if len(negative) > max_sequence_length:
            what = f"is {max_sequence_length}, but {file} takes {len(negative)} tokens with an empty prompt"
            raise ValueError(f"max_sequence_length {what}: raise it by as many as prompts have, to 1024 if in doubt")
        tokens = tokens[:max_sequence_length]  # the pipeline itself cuts nothing
        pixels = pipeline.image_processor.preprocess(image, large, large).unsqueeze(2)
        latents = pipeline._encode_vae_image(pixels.to(device, pipeline.vae.dtype), generator=None)
        return {"tokens": tokens, "negative": negative, "image": latents[0, :, 0]}

    @classmethod
    def tokens_around(cls, pipeline: Any, row: Row) -> int:
        """See :meth:`Backbone.tokens_around`; an image is among them."""
        if "negative" not in row:
            return super().tokens_around(pipeline, row)
        return len(row["negative"]) - len(pipeline.tokenizer(cls.NEGATIVE_PROMPT).input_ids)

    def _negatives(self, conditions: Conditions) -> Conditions:
        """See :meth:`Backbone._negatives`."""
        if "negative" not in conditions.parts:
            return super()._negatives(conditions)
        return Conditions({**conditions.parts, "tokens": conditions["negative"]})


def _side(area: int) -> int:
    """Pixels of a square image, as the pipeline rounds them."""
    return int(stock.calculate_dimensions(area, 1.0)[0])


def _mark_image(encoder: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Which tokens are the image's: without it, transformers 5 gives them the rotary positions of text.

    The pipeline of diffusers 0.42 forgets to say it.
    """
    if options.get("image_grid_thw") is None or options.get("mm_token_type_ids") is not None:
        return args, options
    config: Any = encoder.config
    return args, {**options, "mm_token_type_ids": (options["input_ids"] == config.image_token_id).int()}
