"""Base models without weights: the published ones, whose configurations are here, and those on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoConfig

_PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
PUBLISHED: dict[str, dict[str, Any]] = _PUBLISHED["transformers"]
"""Hub id -> its transformer's configuration. The models share the autoencoder, two CLIPs and T5 v1.1 XXL."""


class ArchitectureError(ValueError):
    """Raised for a base model whose configuration is neither on this machine nor published here."""


@dataclass(frozen=True)
class Pipeline:
    """The parts of a base model, all on the meta device but the transformer, of which this is the configuration."""

    transformer: Mapping[str, Any]
    vae: Any
    encoders: Sequence[Any]

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latent of a square image."""
        side = resolution // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, side, side


def read_pipeline(model: str) -> Pipeline:
    """The parts of a pipeline folder, a published model or one in the hub cache. Raises ArchitectureError."""
    if model in PUBLISHED and not Path(model).is_dir():
        encoders = [_encoder(kind, config) for kind, config in _PUBLISHED["text_encoders"]]
        return Pipeline(PUBLISHED[model], build(_PUBLISHED["vae"]), encoders)
    root = Path(model) if Path(model).is_dir() else _cached(model)
    try:
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
        transformer, vae = (_read(root / part) for part in ("transformer", "vae"))
    except (OSError, ValueError) as error:
        raise ArchitectureError(f"{model} is not a diffusers pipeline folder: {error}") from error
    names = [name for name in index if name.startswith("text_encoder") and (root / name).is_dir()]
    encoders = [_encoder(index[name][1], _read(root / name)) for name in names]
    return Pipeline(transformer, build(vae), encoders)


def _encoder(kind: str, config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return getattr(transformers, kind)(AutoConfig.for_model(**config))


def _cached(model: str) -> Path:
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        raise ArchitectureError(
            f"the architecture of {model!r} is not known: it is no folder, not in the hub cache and none of "
            f"{', '.join(PUBLISHED)}. Download the model, or give its folder"
        ) from None


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def build(config: Mapping[str, Any]) -> Any:
    """The model of a diffusers configuration on the meta device, by its ``_class_name``, else SD3's."""
    with torch.device("meta"):
        return getattr(diffusers, config.get("_class_name", "SD3Transformer2DModel")).from_config(dict(config))


# ---- What a family's models are called with; the values do not matter ------------------------------------------------


def transformer_inputs(
    config: Mapping[str, Any], latent: Sequence[int], text_tokens: int, rows: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Keyword arguments of SD3's forward pass over ``rows`` latents of shape ``latent``, as the backbone gives them."""
    return {
        "hidden_states": torch.zeros(rows, *latent, dtype=dtype),
        "timestep": torch.zeros(rows),
        "encoder_hidden_states": torch.zeros(rows, text_tokens, config["joint_attention_dim"], dtype=dtype),
        "pooled_projections": torch.zeros(rows, config["pooled_projection_dim"], dtype=dtype),
    }


def prompt_tokens(encoder: Any, max_sequence_length: int) -> int:
    """Tokens of a prompt for one text encoder: CLIP's context or T5's length."""
    return getattr(encoder.config, "max_position_embeddings", max_sequence_length)


def text_tokens(pipeline: Pipeline, max_sequence_length: int) -> int:
    """Tokens that the transformer sees of a prompt: CLIP's context, then T5's, which are zeros where there is no T5."""
    return prompt_tokens(pipeline.encoders[0], max_sequence_length) + max_sequence_length
