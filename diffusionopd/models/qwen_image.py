"""Qwen-Image, 2512 included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffusionopd.models.backbone import Backbone, Configs, Defaults
from diffusionopd.models.conditions import Conditions, Row
from diffusionopd.models.latents import as_frame, pack, side_of, unpack

LAYERED = dict.fromkeys(("use_additional_t_cond", "use_layer3d_rope"), "a model of layers (Qwen-Image-Layered)")
EDITING = {"zero_cond_t": "an editing model (Qwen-Image-Edit-2511), which is used by its own pipeline"}
"""Options of a transformer -> what model each makes of it."""


class QwenImage(Backbone):
    """Joint blocks on packed latents; conditions are ``tokens``, as many as the prompt has, without the template's."""

    MODELS = {"transformer": ("QwenImageTransformer2DModel",), "vae": ("AutoencoderKLQwenImage",)}
    TEXT = {
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    }
    LORA_TARGETS = (
        "to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    DEFAULTS = Defaults(num_steps=50, guidance_scale=4.0, max_sequence_length=512, mixed_precision="bf16")
    LONGEST_PROMPT = 1024
    FIXED_LENGTH = False
    NEGATIVE_PROMPT = " "  # as on the model's card
    GUIDANCE_ARGUMENT = "true_cfg_scale"
    TOKENS_AROUND = 5  # of the template, behind the part that is dropped
    SHARED = {
        "transformer": ("in_channels", "joint_attention_dim"),
        "vae": ("z_dim", "temperal_downsample", "latents_mean", "latents_std"),
        "text_encoder": ("hidden_size", "num_hidden_layers", "vocab_size"),
    }

    VARIANTS: ClassVar[Mapping[str, str]] = {**LAYERED, **EDITING}
    """Those of the options that it does not have."""

    @classmethod
    def unsupported(cls, configs: Configs) -> str:
        """Models for other uses have the same transformer class."""
        found = {name: what for name, what in cls.VARIANTS.items() if configs["transformer"].get(name)}
        if not found:
            return ""
        return f"its transformer has {', '.join(found)}: {' and '.join(dict.fromkeys(found.values()))}"

    @classmethod
    def shape_of(cls, resolution: int, configs: Configs) -> tuple[int, ...]:
        """See :meth:`Backbone.shape_of`."""
        factor = int(2 ** len(configs["vae"]["temperal_downsample"]))
        side = side_of(resolution, factor, 2 * factor)
        return configs["transformer"]["in_channels"] // 4, side, side

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | Tensor) -> Tensor:
        _, _, h, w = x.shape
        seen = [x, conditions["image"]] if "image" in conditions.parts else [x]
        (velocity,) = self.transformer(
            hidden_states=torch.cat([pack(image) for image in seen], 1),
            timestep=self._rounded_time(x, sigma),  # times 1000 in its embedding
            encoder_hidden_states=conditions["tokens"],
            encoder_hidden_states_mask=conditions.mask(),
            img_shapes=[[(1, image.shape[-2] // 2, image.shape[-1] // 2) for image in seen]] * len(x),
            return_dict=False,
        )
        return unpack(velocity[:, : h * w // 4], h, w)

    def _guide(self, conditional: Tensor, negative: Tensor, guidance: float | Tensor) -> Tensor:
        """As long as the conditional velocity, token by token."""
        guided, own = pack(super()._guide(conditional, negative, guidance)), pack(conditional)
        guided = guided * (own.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(guided, *conditional.shape[-2:])

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(as_frame(latents, self.vae.config), return_dict=False)[0][:, :, 0]

    @classmethod
    def encode(cls, pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> list[Row]:
        """See :meth:`Backbone.encode`."""
        texts = cls.texts(prompts)
        tokens, mask = pipeline.encode_prompt(texts, device=device, max_sequence_length=max_sequence_length)
        lengths = [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(1).tolist()
        return [{"tokens": own[:length]} for own, length in zip(tokens, lengths, strict=True)]

    @classmethod
    def inert_of(cls, transformer: nn.Module) -> set[str]:
        """The last block's text stream is dropped, but for its keys and values."""
        blocks: Any = transformer.transformer_blocks
        last = f"transformer_blocks.{len(blocks) - 1}"
        return {f"{last}.{n}" for n in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}

    @classmethod
    def mixing_in(cls, transformer: Any) -> set[str]:
        """See :meth:`Backbone.mixing_in`: of 2511 twice as many times as samples."""
        return {"img_mod", "time_text_embed"} if transformer.config.zero_cond_t else set()
