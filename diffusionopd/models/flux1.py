"""FLUX.1: dev and Krea-dev (guidance is an input), schnell (none)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusionopd.models.backbone import EMBEDDED, NO_GUIDANCE, Backbone, Configs, Defaults
from diffusionopd.models.conditions import Conditions, Row
from diffusionopd.models.latents import halvings, pack, places, side_of, unpack
from diffusionopd.models.lora_names import RowSplit, Shapes, in_blocks, renamed, swapped


class Flux1(Backbone):
    """Joint and single blocks on packed latents; conditions are T5's ``tokens``, always of full length and attended
    with their padding, and CLIP's ``pooled``."""

    MODELS = {"transformer": ("FluxTransformer2DModel",), "vae": ("AutoencoderKL",)}
    TEXT = {
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
    }
    BLOCKS = ("transformer_blocks", "single_transformer_blocks")
    # As diffusers' own training script; "attn.to_k" and its like are in the single blocks too.
    LORA_TARGETS = (
        "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj",
        "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    DEFAULTS = Defaults(num_steps=28, guidance_scale=3.5, max_sequence_length=512, mixed_precision="bf16")
    LONGEST_PROMPT = 512
    OPTIONAL = ("image_encoder", "feature_extractor")
    SHARED = {
        "transformer": ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds"),
        "vae": ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor"),
        "text_encoder": ("hidden_size", "num_hidden_layers", "vocab_size"),
        "text_encoder_2": ("d_model", "num_layers", "vocab_size"),
    }

    @classmethod
    def unsupported(cls, configs: Configs) -> str:
        """Fill, Canny, Depth and Kontext-like transformers have more input channels than latents."""
        given, latents = configs["transformer"]["in_channels"], 4 * configs["vae"]["latent_channels"]
        if given != latents:
            what = f"its transformer takes {given} channels, of which the latents have {latents}"
            return f"{what}: a variant with an image as input (Fill, Canny, Depth), not a text-to-image model"
        return ""

    @classmethod
    def guidance_of(cls, configs: Configs) -> str:
        """dev embeds it, schnell has none."""
        return EMBEDDED if configs["transformer"].get("guidance_embeds") else NO_GUIDANCE

    @classmethod
    def defaults_of(cls, configs: Configs) -> Defaults:
        """schnell's are those of its model card: 4 steps, 256 tokens."""
        if cls.guidance_of(configs) == EMBEDDED:
            return cls.DEFAULTS
        return Defaults(num_steps=4, guidance_scale=1.0, max_sequence_length=256, mixed_precision="bf16")

    @classmethod
    def shape_of(cls, resolution: int, configs: Configs) -> tuple[int, ...]:
        """See :meth:`Backbone.shape_of`."""
        factor = halvings(configs["vae"])
        side = side_of(resolution, factor, 2 * factor)
        return configs["transformer"]["in_channels"] // 4, side, side

    @classmethod
    def row_shapes(cls, max_sequence_length: int, configs: Configs) -> dict[str, tuple[int, ...]]:
        """See :meth:`Backbone.row_shapes`."""
        pooled = {"pooled": (configs["transformer"]["pooled_projection_dim"],)}
        return super().row_shapes(max_sequence_length, configs) | pooled

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | Tensor) -> Tensor:
        _, _, h, w = x.shape
        (velocity,) = self.transformer(
            hidden_states=pack(x),
            timestep=self._rounded_time(x, sigma),  # times 1000 in the transformer
            guidance=self._each(x, guidance) if self.guidance_of(self.configs) == EMBEDDED else None,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["tokens"],
            txt_ids=torch.zeros(conditions["tokens"].shape[1], 3, device=x.device),
            img_ids=places(h // 2, w // 2, 3, x.device),
            return_dict=False,
        )
        return unpack(velocity, h, w)

    @classmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """See :meth:`Backbone.encode`."""
        tokens, pooled, _ = pipeline.encode_prompt(
            prompt=cls.texts(prompts),
            prompt_2=None,
            device=device,
            max_sequence_length=max_sequence_length,
        )
        return [{"tokens": t, "pooled": p} for t, p in zip(tokens, pooled, strict=True)]

    @classmethod
    def lora_layers(cls, shapes: Shapes) -> Mapping[str, RowSplit]:
        """As diffusers' ``convert_flux_transformer_checkpoint_to_diffusers`` has the original code's."""
        return original_layers(_DOUBLE, _SINGLE, _OTHERS, shapes)


def original_layers(
    double: Mapping[str, str], single: Mapping[str, str], others: Mapping[str, str], shapes: Shapes
) -> Mapping[str, RowSplit]:
    """Layers of the original code, in its two kinds of blocks and outside of them -> modules."""
    return {
        **in_blocks("double_blocks", "transformer_blocks", double, shapes),
        **in_blocks("single_blocks", "single_transformer_blocks", single, shapes),
        **renamed(others, shapes),
        "final_layer_adaLN_modulation_1": swapped("norm_out.linear"),
    }


_DOUBLE = {
    "img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn_proj": "attn.to_out.0",
    "img_mlp_0": "ff.net.0.proj",
    "img_mlp_2": "ff.net.2",
    "img_mod_lin": "norm1.linear",
    "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp_0": "ff_context.net.0.proj",
    "txt_mlp_2": "ff_context.net.2",
    "txt_mod_lin": "norm1_context.linear",
}
_SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation_lin": "norm.linear",
}
_OTHERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}
