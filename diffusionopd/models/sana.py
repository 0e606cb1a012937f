"""SANA 1.0 and 1.5: linear attention on latents of a 32 times smaller side. Sprint is another kind of model."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from diffusionopd.models.backbone import Backbone, Configs, Defaults
from diffusionopd.models.conditions import NEGATIVE, Conditions, Row
from diffusionopd.models.latents import side_of
from diffusionopd.models.schedules import FAMILY, flow_levels


class Sana(Backbone):
    """Conditions are Gemma's ``tokens``, as many as the prompt has: it is encoded behind an instruction, the negative
    prompt is not."""

    MODELS = {"transformer": ("SanaTransformer2DModel",), "vae": ("AutoencoderDC",)}
    TEXT = {"text_encoder": ("Gemma2Model",), "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast")}
    LORA_TARGETS = ("to_k", "to_q", "to_v")  # as diffusers' own training script
    DEFAULTS = Defaults(num_steps=20, guidance_scale=4.5, max_sequence_length=300, mixed_precision="bf16")
    WIDTH = "caption_channels"
    FIXED_LENGTH = False
    TOKENS_AROUND = 1  # of the instruction, whose last one stays
    SHARED = {
        "transformer": ("in_channels", "patch_size", "caption_channels", "timestep_scale"),
        "vae": ("latent_channels", "encoder_block_out_channels", "scaling_factor"),
        "text_encoder": ("hidden_size", "num_hidden_layers", "vocab_size"),
    }

    @classmethod
    def unsupported(cls, configs: Configs) -> str:
        """Sprint's transformer has guidance as an input, and does not predict velocities of flow matching."""
        if configs["transformer"].get("guidance_embeds"):
            return (
                "its transformer has guidance as an input (SANA-Sprint): a consistency model, not one of flow matching"
            )
        return ""

    @classmethod
    def defaults_of(cls, configs: Configs) -> Defaults:
        """Models of 512 to 4096 pixels differ by the size of their transformer's latents."""
        return replace(cls.DEFAULTS, resolution=configs["transformer"].get("sample_size", 32) * _factor(configs))

    @classmethod
    def shape_of(cls, resolution: int, configs: Configs) -> tuple[int, ...]:
        """See :meth:`Backbone.shape_of`."""
        config = configs["transformer"]
        factor = _factor(configs)
        side = side_of(resolution, factor, factor * config["patch_size"])
        return config["in_channels"], side, side

    @property
    def multistep(self) -> bool:
        """See :attr:`Backbone.multistep`; not when it was saved with a scheduler of Euler steps."""
        c = self.scheduler.config
        made_for = ("dpmsolver++", 2, "midpoint")
        return self._has_whole_times and (c.algorithm_type, c.solver_order, c.solver_type) == made_for

    @property
    def _has_whole_times(self) -> bool:
        return isinstance(self.scheduler, DPMSolverMultistepScheduler)

    def sigmas(self, num_steps: int, resolution: int, schedule: str = FAMILY) -> Tensor:
        """See :meth:`Backbone.sigmas`; those of the published scheduler begin just below 1.

        It cuts its times to whole numbers before it rounds its levels to float32, so that for some the time of a level
        is not the one cut from it: such levels are moved, by less than 2e-7, to where it is.
        """
        levels = flow_levels(self.scheduler, num_steps, schedule=schedule)
        if self._has_whole_times and schedule == FAMILY:
            made = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
            made.set_timesteps(num_steps)
            unit, margin = made.config.num_train_timesteps, 1e-4  # of a time: survives float32
            levels[:-1] = levels[:-1].clamp((made.timesteps + margin) / unit, (made.timesteps + 1 - margin) / unit)
        return levels

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | Tensor) -> Tensor:
        time, mask = sigma * self.scheduler.config.num_train_timesteps, conditions.mask()
        if self._has_whole_times:
            time = time.floor()
        (velocity,) = self.transformer(
            x,
            encoder_hidden_states=conditions["tokens"],
            encoder_attention_mask=None if mask is None else mask.to(x.dtype),
            timestep=time.float() * self.transformer.config.timestep_scale,
            return_dict=False,
        )
        return velocity

    @classmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """See :meth:`Backbone.encode`; the instruction is the default of the pipeline's call."""
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default

        def rows(texts: list[str], before: list[str] | None) -> list[Row]:
            tokens, mask, *_ = pipeline.encode_prompt(
                texts,
                do_classifier_free_guidance=False,
                device=device,
                max_sequence_length=max_sequence_length,
                complex_human_instruction=before,
            )
            return [{"tokens": t[m]} for t, m in zip(tokens, mask.bool(), strict=True)]

        texts = [prompt for prompt in prompts if prompt != NEGATIVE]
        found = iter(rows(texts, instruction) if texts else ())
        negative = rows([cls.NEGATIVE_PROMPT], None) if NEGATIVE in prompts else []
        return [negative[0] if prompt == NEGATIVE else next(found) for prompt in prompts]


def _factor(configs: Configs) -> int:
    """Pixels a latent position, a side."""
    return int(2 ** (len(configs["vae"]["encoder_block_out_channels"]) - 1))
