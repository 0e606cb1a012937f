"""What the small pipelines of all families are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffusionopd.models.backbone import Backbone

PROMPTS = ["a red circle", "a photo of two green squares left of a blue triangle above a word"]
"""Of different lengths."""
STEPS = 5


@dataclass(frozen=True)
class Case:
    """A family's small pipeline, and how its stock pipeline is asked."""

    family: str  # the file among the models
    build: Callable[[Path], None]  # writes the folder
    stock: Callable[[Any, Tensor, float, dict[str, Any]], Tensor]
    """The stock pipeline's latents after :data:`STEPS` steps from ``x`` in our layout, at our guidance; the last
    argument has the keywords that all pipelines take."""
    guidances: tuple[float, ...] = (1.0, 3.5)
    resolution: int = 32
    length: int = 28  # tokens
    latents: Callable[[Backbone, Tensor], Tensor] = lambda backbone, x: x
    """What the stock pipeline calls latents, of ours."""


def randomised(module: nn.Module, seed: int = 7, scale: float = 0.2) -> Any:
    """Weights under which every module matters: gates and output layers are zero or small as they come."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.data = noise * min(1.0, parameter[0].numel() ** -0.5)
        elif "norm" not in name:
            parameter.data = noise * scale
        else:
            parameter.data += noise * 0.1
    return module.eval()


def autoencoder(kind: Any, **more: Any) -> Any:
    """A VAE of two scales and four channels."""
    torch.manual_seed(5)
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        mid_block_add_attention=False, **more,
    ).eval()  # fmt: skip


FLUX_VAE = {
    "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611,
}  # fmt: skip
"""Options of the VAE that FLUX.1 and Z-Image share."""


def dynamic_scheduler(**more: Any) -> FlowMatchEulerDiscreteScheduler:
    """Shifted by the number of image tokens."""
    options = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096} | more
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
