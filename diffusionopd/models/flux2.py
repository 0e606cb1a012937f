"""FLUX.2: dev (guidance is an input), klein base (classifier-free) and klein (distilled, none)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from diffusionopd.models.backbone import CLASSIFIER_FREE, EMBEDDED, NO_GUIDANCE, Backbone, Configs, Defaults
from diffusionopd.models.conditions import Conditions, Row
from diffusionopd.models.flux1 import original_layers
from diffusionopd.models.latents import halvings, places, side_of
from diffusionopd.models.lora_names import RowSplit, Shapes
from diffusionopd.models.schedules import FAMILY, LINSPACE, flow_levels


class Flux2(Backbone):
    """Joint and single blocks. A latent position is two by two of the VAE's, normalised by the statistics of its batch
    norm; conditions are ``tokens``, three layers of a language model side by side, always of full length and attended
    with their padding."""

    MODELS = {"transformer": ("Flux2Transformer2DModel",), "vae": ("AutoencoderKLFlux2",)}
    TEXT = {
        "text_encoder": ("Qwen3ForCausalLM", "Mistral3ForConditionalGeneration"),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PixtralProcessor"),
    }
    READERS = {"tokenizer": AutoTokenizer}  # of dev's processor, which needs torchvision, texts need this alone
    BLOCKS = ("transformer_blocks", "single_transformer_blocks")
    # As diffusers' own training script; a single block has two layers alone, "to_qkv_mlp_proj" and "to_out".
    LORA_TARGETS = (
        "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj",
        "attn.add_v_proj", "attn.to_add_out", "attn.to_qkv_mlp_proj", "attn.to_out",
    )  # fmt: skip
    DEFAULTS = Defaults(num_steps=50, guidance_scale=4.0, max_sequence_length=512, mixed_precision="bf16")
    SHARED = {
        "transformer": ("in_channels", "joint_attention_dim"),
        "vae": ("latent_channels", "block_out_channels", "batch_norm_eps"),
        "text_encoder": ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"),
    }

    @classmethod
    def guidance_of(cls, configs: Configs) -> str:
        """dev embeds it; of klein the pipeline says whether it is distilled."""
        if configs["transformer"].get("guidance_embeds"):
            return EMBEDDED
        return NO_GUIDANCE if configs["index"].get("is_distilled") else CLASSIFIER_FREE

    @classmethod
    def defaults_of(cls, configs: Configs) -> Defaults:
        """Distilled klein's are those of its model card: 4 steps."""
        if cls.guidance_of(configs) != NO_GUIDANCE:
            return cls.DEFAULTS
        return Defaults(num_steps=4, guidance_scale=1.0, max_sequence_length=512, mixed_precision="bf16")

    @classmethod
    def shape_of(cls, resolution: int, configs: Configs) -> tuple[int, ...]:
        """See :meth:`Backbone.shape_of`."""
        unit = 2 * halvings(configs["vae"])
        side = side_of(resolution, unit, unit)
        return configs["transformer"]["in_channels"], side, side

    def sigmas(self, num_steps: int, resolution: int, schedule: str = FAMILY) -> Tensor:
        """See :meth:`Backbone.sigmas`: evenly spread before their shift, which depends on their number too."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # brings Mistral along

        _, h, w = self.latent_shape(resolution)
        return flow_levels(self.scheduler, num_steps, compute_empirical_mu(h * w, num_steps), LINSPACE)

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | Tensor) -> Tensor:
        _, _, h, w = x.shape
        tokens = conditions["tokens"]
        words = torch.zeros(tokens.shape[1], 4, device=x.device)
        words[:, 3] = torch.arange(len(words), device=x.device)
        (velocity,) = self.transformer(
            hidden_states=x.flatten(2).mT,
            timestep=self._rounded_time(x, sigma),  # times 1000 in the transformer
            guidance=self._each(x, guidance) if self.guidance_of(self.configs) == EMBEDDED else None,
            encoder_hidden_states=tokens,
            txt_ids=words,
            img_ids=places(h, w, 4, x.device),
            return_dict=False,
        )
        return velocity.mT.unflatten(2, (h, w))

    def unnormalised(self, latents: Tensor) -> Tensor:
        """The VAE's own latents ``[B, C/4, 2h, 2w]``."""
        norm, (b, c, h, w) = self.vae.bn, latents.shape
        std = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        z = latents * std.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)
        return z.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(self.unnormalised(latents), return_dict=False)[0]

    @classmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """See :meth:`Backbone.encode`."""
        tokens, _ = pipeline.encode_prompt(cls.texts(prompts), device=device, max_sequence_length=max_sequence_length)
        return [{"tokens": row} for row in tokens]

    @classmethod
    def tokens_around(cls, pipeline: Any, row: Row) -> int:
        """See :meth:`Backbone.tokens_around`: of the chat template, and dev's system message."""
        options: dict[str, Any] = {"tokenize": True, "return_dict": True}
        chat: list[dict[str, Any]] = [{"role": "user", "content": ""}]
        if message := getattr(pipeline, "system_message", None):
            parts = {"system": message, "user": ""}
            chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in parts.items()]
        else:
            options |= {"add_generation_prompt": True, "enable_thinking": False}
        alone = pipeline.tokenizer("").input_ids  # what the tokenizer puts around any text
        return len(pipeline.tokenizer.apply_chat_template(chat, **options)["input_ids"]) - len(alone)

    @classmethod
    def lora_layers(cls, shapes: Shapes) -> Mapping[str, RowSplit]:
        """As diffusers' ``convert_flux2_transformer_checkpoint_to_diffusers`` has the original code's: with the halves
        of the last modulation swapped, which its converter of LoRAs forgets."""
        return original_layers(_DOUBLE, _SINGLE, _OTHERS, shapes)


_DOUBLE = {
    "img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn_proj": "attn.to_out.0",
    "img_mlp_0": "ff.linear_in",
    "img_mlp_2": "ff.linear_out",
    "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp_0": "ff_context.linear_in",
    "txt_mlp_2": "ff_context.linear_out",
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_OTHERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in_in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img_lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt_lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation_lin": "single_stream_modulation.linear",
    "final_layer_linear": "proj_out",
}
