"""Z-Image: base and Turbo (distilled, which its scheduler's shift tells)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusionopd.models.backbone import Backbone, Configs, Defaults
from diffusionopd.models.conditions import Conditions, Row
from diffusionopd.models.latents import halvings, side_of
from diffusionopd.models.lora_names import RowSplit, Shapes, in_blocks, renamed

_TURBO_SHIFT = 3.0  # of Turbo's scheduler, 6 of the base's: all that tells their files apart


class ZImage(Backbone):
    """One stream of image and caption. Conditions are the caption's ``tokens``, as many as it has: the image's rotary
    positions begin behind them, so that padding would move it.

    Its pipeline's guidance ``s`` is in ``v+ + s (v+ - v-)``: 1 less than the guidance here.
    """

    MODELS = {"transformer": ("ZImageTransformer2DModel",), "vae": ("AutoencoderKL",)}
    TEXT = {
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    }
    BLOCKS = ("noise_refiner", "context_refiner", "layers")
    LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")  # as diffusers' own training script
    DEFAULTS = Defaults(num_steps=50, guidance_scale=6.0, max_sequence_length=512, mixed_precision="bf16")
    WIDTH = "cap_feat_dim"
    FIXED_LENGTH = False
    TOKENS_AROUND = 8  # of the chat template
    SHARED = {
        "transformer": ("in_channels", "cap_feat_dim"),
        "vae": ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor"),
        "text_encoder": ("hidden_size", "num_hidden_layers", "vocab_size"),
    }

    @classmethod
    def unsupported(cls, configs: Configs) -> str:
        """Omni also sees images, through SigLIP."""
        if configs["transformer"].get("siglip_feat_dim") is not None:
            return "its transformer takes SigLIP's features of images: Z-Image-Omni, not a text-to-image model"
        return ""

    @classmethod
    def defaults_of(cls, configs: Configs) -> Defaults:
        """Turbo's are those of its model card: 8 steps without guidance."""
        if configs["scheduler"].get("shift") != _TURBO_SHIFT:
            return cls.DEFAULTS
        return Defaults(num_steps=8, guidance_scale=1.0, max_sequence_length=512, mixed_precision="bf16")

    @classmethod
    def pipeline_guidance(cls, guidance: float) -> dict[str, Any]:
        """See :meth:`Backbone.pipeline_guidance`."""
        return {"guidance_scale": round(guidance - 1, 6)}

    @classmethod
    def mixing_in(cls, transformer: nn.Module) -> set[str]:
        """See :meth:`Backbone.mixing_in`: the tokens of all samples in a row."""
        return {"all_x_embedder", "cap_embedder"}

    @classmethod
    def shape_of(cls, resolution: int, configs: Configs) -> tuple[int, ...]:
        """See :meth:`Backbone.shape_of`."""
        factor = halvings(configs["vae"])
        side = side_of(resolution, factor, 2 * factor)
        return configs["transformer"]["in_channels"], side, side

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | Tensor) -> Tensor:
        steps = self.scheduler.config.num_train_timesteps
        (velocities,) = self.transformer(
            list(x[:, :, None]),  # images are videos of one frame
            (steps - (steps * sigma).float()) / steps,  # its time runs from noise to data, and so does its velocity
            [sample["tokens"][0] for sample in conditions.each()],
            return_dict=False,
        )
        return -torch.stack(velocities)[:, :, 0]

    @classmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """See :meth:`Backbone.encode`."""
        tokens, _ = pipeline.encode_prompt(
            cls.texts(prompts),
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return [{"tokens": row} for row in tokens]

    @classmethod
    def lora_layers(cls, shapes: Shapes) -> Mapping[str, RowSplit]:
        """As diffusers' ``convert_z_image_transformer_checkpoint_to_diffusers`` has the original code's, most of whose
        names are the same."""
        found = renamed(_OTHERS, shapes)
        for blocks in cls.BLOCKS:
            found |= in_blocks(blocks, blocks, _ATTENTION, shapes)
        return found


_ATTENTION = {
    "attention_qkv": "attention.to_q attention.to_k attention.to_v",
    "attention_out": "attention.to_out.0",
}
_OTHERS = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer_linear": "all_final_layer.2-1.linear",
    "final_layer_adaLN_modulation_1": "all_final_layer.2-1.adaLN_modulation.1",
}
