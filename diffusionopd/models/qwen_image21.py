"""Qwen-Image 2.1, drawing from prompts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin, Qwen3VLProcessor

from diffusionopd.models.backbone import Backbone, Configs, Defaults
from diffusionopd.models.conditions import Conditions, Row
from diffusionopd.models.latents import as_frame, linear_mu, side_of
from diffusionopd.models.schedules import FAMILY, LINSPACE, flow_levels

_FACTOR = 16  # pixels a latent position, which is a token


class TextProcessor(Qwen3VLProcessor):
    """The pipeline's processor without what reads images and videos, for which the whole needs torchvision."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = "<|image_pad|>"  # noqa: S105 (without it, texts are no batch)
        ProcessorMixin.__init__(self, tokenizer, chat_template=chat_template)


class QwenImage21(Backbone):
    """One stream of prompt and image, causal but for the image. Conditions are ``tokens``, as many as the prompt has:
    the image's rotary positions begin behind them, so that padding would move it."""

    MODELS = {"transformer": ("QwenImage21Transformer2DModel",), "vae": ("AutoencoderKLQwenImage21",)}
    TEXT = {"text_encoder": ("Qwen3VLForConditionalGeneration",), "processor": ("Qwen3VLProcessor",)}
    READERS = {"processor": TextProcessor}
    WIDTH = "context_in_dim"
    LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")  # as diffusers' own training script
    DEFAULTS = Defaults(num_steps=40, guidance_scale=1.0, max_sequence_length=1024, mixed_precision="bf16")
    FIXED_LENGTH = False
    NEGATIVE_PROMPT = " "
    GUIDANCE_ARGUMENT = "true_cfg_scale"
    TOKENS_AROUND = 8  # of the template
    PADDABLE = False
    SHARED = {
        "transformer": ("in_channels", "context_in_dim"),
        "vae": ("z_dim", "latents_mean", "latents_std"),
        "text_encoder": ("hidden_size", "num_hidden_layers", "vocab_size"),
    }

    @classmethod
    def defaults_of(cls, configs: Configs) -> Defaults:
        """As many steps as the pipeline has levels of its own."""
        if not (own := configs["index"].get("sample_sigmas")):
            return cls.DEFAULTS
        return replace(cls.DEFAULTS, num_steps=len(own))

    @classmethod
    def shape_of(cls, resolution: int, configs: Configs) -> tuple[int, ...]:
        """See :meth:`Backbone.shape_of`: four tokens of an image are a token's place in a prompt."""
        side = side_of(resolution, _FACTOR, 2 * _FACTOR)
        return configs["transformer"]["in_channels"], side, side

    def sigmas(self, num_steps: int, resolution: int, schedule: str = FAMILY) -> Tensor:
        """See :meth:`Backbone.sigmas`: before their shift evenly spread, or along ``sample_sigmas`` of the pipeline,
        which are what it has if there are as many."""
        _, h, w = self.latent_shape(resolution)
        mu = linear_mu(self.scheduler.config, h * w)
        own = self.configs["index"].get("sample_sigmas")
        if schedule == LINSPACE or not own:
            return flow_levels(self.scheduler, num_steps, mu, LINSPACE)
        places = np.linspace(0, len(own) - 1, num_steps)
        return flow_levels(self.scheduler, num_steps, mu, np.interp(places, range(len(own)), own).tolist())

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | Tensor) -> Tensor:
        b, _, h, w = x.shape
        slots = torch.zeros(b, conditions["tokens"].shape[1] + h * w // 4, dtype=torch.bool, device=x.device)
        slots[:, -h * w // 4 :] = True
        (velocity,) = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=self._rounded_time(x, sigma),  # times 1000 in its embedding
            encoder_hidden_states=conditions["tokens"],
            img_shapes=[[(1, h, w)]] * b,
            img_mask=slots,
            return_dict=False,
        )
        return velocity[:, -h * w :].transpose(1, 2).reshape(x.shape)

    def _decode(self, latents: Tensor) -> Tensor:
        """On white: the VAE's images have an alpha channel."""
        images = self.vae.decode(as_frame(latents, self.vae.config), return_dict=False)[0][:, :, 0].clamp(-1, 1)
        alpha = images[:, 3:] / 2 + 0.5
        return images[:, :3] * alpha + 1 - alpha

    @classmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """See :meth:`Backbone.encode`; the pipeline itself cuts nothing."""
        tokens, mask, _ = pipeline.encode_prompt(cls.texts(prompts), device=device)
        lengths = [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(1).tolist()
        return [{"tokens": own[: min(n, max_sequence_length)]} for own, n in zip(tokens, lengths, strict=True)]
