"""Stable Diffusion 3: SD3-medium, SD3.5-medium and -large, and the embedded tiny world.

They differ in their folder's own configuration alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusionopd.models.backbone import Backbone, Configs, Defaults
from diffusionopd.models.conditions import Conditions, Row
from diffusionopd.models.latents import halvings, linear_mu, side_of
from diffusionopd.models.lora_names import RowSplit, Shapes, count_blocks, in_blocks, renamed, swapped
from diffusionopd.models.schedules import FAMILY, flow_levels


class StableDiffusion3(Backbone):
    """Joint blocks; conditions are ``tokens`` (CLIP's, then T5's, always of full length) and CLIP's ``pooled``."""

    MODELS = {"transformer": ("SD3Transformer2DModel",), "vae": ("AutoencoderKL",)}
    TEXT = {
        **{f"text_encoder{n}": ("CLIPTextModelWithProjection", "CLIPTextModel") for n in ("", "_2")},
        **{f"tokenizer{n}": ("CLIPTokenizer", "CLIPTokenizerFast") for n in ("", "_2")},
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
    }
    IN_CHECKPOINT = {
        "text_encoder": ("text_encoders.clip_l.transformer.", ("text_projection.weight",)),  # the identity
        "text_encoder_2": ("text_encoders.clip_g.transformer.", ()),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", ()),
    }
    LORA_TARGETS = (
        "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
    )  # fmt: skip
    DEFAULTS = Defaults(num_steps=40, guidance_scale=4.5, max_sequence_length=128, mixed_precision="fp16")
    LONGEST_PROMPT = 512
    OPTIONAL = ("image_encoder", "feature_extractor")
    MAY_LACK = ("text_encoder_3", "tokenizer_3")
    SHARED = {
        "transformer": ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"),
        "vae": ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor"),
        **{
            f"text_encoder{n}": ("hidden_size", "num_hidden_layers", "projection_dim", "vocab_size") for n in ("", "_2")
        },
        "text_encoder_3": ("d_model", "num_layers", "vocab_size"),
    }

    @classmethod
    def shape_of(cls, resolution: int, configs: Configs) -> tuple[int, ...]:
        """See :meth:`Backbone.shape_of`."""
        config, factor = configs["transformer"], halvings(configs["vae"])
        unit = factor * config["patch_size"]
        side = side_of(resolution, factor, unit, config["pos_embed_max_size"] * unit)
        return config["in_channels"], side, side

    @classmethod
    def row_shapes(cls, max_sequence_length: int, configs: Configs) -> dict[str, tuple[int, ...]]:
        """See :meth:`Backbone.row_shapes`; T5's tokens are there without T5 too, as zeros."""
        config, tokens = configs["transformer"], configs["text_encoder"]["max_position_embeddings"]
        shape = (tokens + max_sequence_length, config["joint_attention_dim"])
        return {"tokens": shape, "pooled": (config["pooled_projection_dim"],)}

    def sigmas(self, num_steps: int, resolution: int, schedule: str = FAMILY) -> Tensor:
        """See :meth:`Backbone.sigmas`; the scheduler's own spacing, from 1."""
        mu = None
        if self.scheduler.config.get("use_dynamic_shifting"):
            _, h, w = self.latent_shape(resolution)
            mu = linear_mu(self.scheduler.config, h * w // self.transformer.config.patch_size**2, max_shift=1.16)
        return flow_levels(self.scheduler, num_steps, mu, schedule)

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | Tensor) -> Tensor:
        (velocity,) = self.transformer(
            hidden_states=x,
            # The transformer embeds time in units of the scheduler's training steps (1000), in float32.
            timestep=(sigma * self.scheduler.config.num_train_timesteps).float(),
            encoder_hidden_states=conditions["tokens"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )
        return velocity

    @classmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """See :meth:`Backbone.encode`."""
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=cls.texts(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        return [{"tokens": t, "pooled": p} for t, p in zip(tokens, pooled, strict=True)]

    @classmethod
    def inert_of(cls, transformer: nn.Module) -> set[str]:
        """The last joint block drops its text stream (``context_pre_only``), and the text queries with it."""
        last = [n for n, m in transformer.named_modules() if getattr(m, "context_pre_only", False) is True]
        return {f"{name.removesuffix('.attn')}.attn.add_q_proj" for name in last}

    @classmethod
    def lora_layers(cls, shapes: Shapes) -> Mapping[str, RowSplit]:
        """Queries, keys and values are one matrix in the original code, and the modulation before a part without gates
        has its scale and shift the other way round: diffusers' ``convert_sd3_transformer_checkpoint_to_diffusers``."""
        last = count_blocks("transformer_blocks", shapes) - 1
        return {
            **in_blocks("joint_blocks", "transformer_blocks", _BLOCK, shapes),
            **renamed(_EMBEDDINGS, shapes),
            f"joint_blocks_{last}_context_block_adaLN_modulation_1": swapped(
                f"transformer_blocks.{last}.norm1_context.linear"
            ),
            "final_layer_adaLN_modulation_1": swapped("norm_out.linear"),
        }


_BLOCK = {
    "x_block_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block_attn2_qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block_attn_proj": "attn.to_out.0",
    "x_block_attn2_proj": "attn2.to_out.0",
    "x_block_mlp_fc1": "ff.net.0.proj",
    "x_block_mlp_fc2": "ff.net.2",
    "x_block_adaLN_modulation_1": "norm1.linear",
    "context_block_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block_attn_proj": "attn.to_add_out",
    "context_block_mlp_fc1": "ff_context.net.0.proj",
    "context_block_mlp_fc2": "ff_context.net.2",
    "context_block_adaLN_modulation_1": "norm1_context.linear",
}
_EMBEDDINGS = {
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
}
