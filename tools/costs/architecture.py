"""The shapes of a pipeline's parts, read from its configuration files; those of the published SD3 family by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Files <part>/config.json of the published repositories, where they differ from one another.
_SD3_TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "num_layers": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": None,
    "dual_attention_layers": (),
}
_SD35_LARGE = {
    **_SD3_TRANSFORMER,
    "num_attention_heads": 38,
    "num_layers": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
_SD35_MEDIUM = {
    **_SD3_TRANSFORMER,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
# Transformers of the published checkpoints: <repository>/transformer/config.json.
PUBLISHED: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _SD3_TRANSFORMER,
    "stabilityai/stable-diffusion-3.5-medium": _SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": _SD35_LARGE,
    "stabilityai/stable-diffusion-3.5-large-turbo": _SD35_LARGE,
}
# What all of them share: the autoencoder, CLIP ViT-L/14 and ViT-bigG/14, T5 v1.1 XXL.
_VAE = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "out_channels": 3,
    "use_post_quant_conv": False,
}
_CLIP_L = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_CLIP_G = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "is_gated_act": True,
}


class ArchitectureError(ValueError):
    """A base model whose configuration is neither here nor known; the message says what to give instead."""


@dataclass(frozen=True)
class TransformerShape:
    """What an SD3 transformer's cost depends on."""

    layers: int
    heads: int
    head_dim: int
    dual_layers: frozenset[int]  # blocks with a second attention over the picture alone
    qk_norm: bool
    text_width: int  # of a text token, D
    pooled_width: int
    patch: int
    in_channels: int
    out_channels: int
    pos_embed_max_size: int

    @property
    def width(self) -> int:
        """Features of a token inside the blocks."""
        return self.heads * self.head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TransformerShape:
        """From ``transformer/config.json``; keys that older files lack take diffusers' defaults."""
        return cls(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            dual_layers=frozenset(config.get("dual_attention_layers") or ()),
            qk_norm=config.get("qk_norm") is not None,
            text_width=config["joint_attention_dim"],
            pooled_width=config["pooled_projection_dim"],
            patch=config["patch_size"],
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            pos_embed_max_size=config["pos_embed_max_size"],
        )


@dataclass(frozen=True)
class Pipeline:
    """The parts of a base model: the transformer's shape, the other parts' configuration files as they are."""

    transformer: TransformerShape
    vae: Mapping[str, Any]
    clips: tuple[Mapping[str, Any], ...]
    t5: Mapping[str, Any] | None  # None: a pipeline without it, whose T5 tokens are zeros

    @property
    def downsampling(self) -> int:
        """Pixels a side of one latent position."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def latent_side(self, resolution: int) -> int:
        """Latent positions a side of a square picture."""
        return resolution // self.downsampling

    def image_tokens(self, resolution: int) -> int:
        """Tokens of a square picture."""
        return (self.latent_side(resolution) // self.transformer.patch) ** 2

    def text_tokens(self, max_sequence_length: int) -> int:
        """Tokens of a prompt: CLIP's context, then T5's; without T5 the pipeline pads by as many zeros."""
        return self.clips[0]["max_position_embeddings"] + max_sequence_length


def read_pipeline(model: str) -> Pipeline:
    """The parts of a local pipeline folder or of a published repository. ArchitectureError for anything else."""
    root = Path(model)
    if model in PUBLISHED and not root.is_dir():
        return Pipeline(TransformerShape.from_config(PUBLISHED[model]), _VAE, (_CLIP_L, _CLIP_G), _T5_XXL)
    if not (root / "transformer" / "config.json").is_file():
        raise ArchitectureError(
            f"the architecture of {model!r} is not known: it is no folder with transformer/config.json and none of "
            f"{', '.join(PUBLISHED)}. Download the model and give its folder."
        )
    clips = tuple(_read(root / name) for name in ("text_encoder", "text_encoder_2"))
    t5 = _read(root / "text_encoder_3") if (root / "text_encoder_3").is_dir() else None
    shape = TransformerShape.from_config(_read(root / "transformer"))
    return Pipeline(shape, {"use_post_quant_conv": True} | _read(root / "vae"), clips, t5)


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
