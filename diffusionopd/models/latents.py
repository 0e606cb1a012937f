"""Latents of square images: how many positions there are, how transformers of packed ones take them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def halvings(vae: Mapping[str, Any]) -> int:
    """Pixels that a latent position of an ``AutoencoderKL`` stands for, along a side."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def side_of(resolution: int, factor: int, unit: int, largest: float = math.inf) -> int:
    """Latent positions along a side, ``factor`` pixels each; ValueError unless ``unit`` divides the resolution."""
    if resolution % unit or not 0 < resolution <= largest:
        most = f" up to {largest}" if largest < math.inf else ""
        raise ValueError(f"resolution must be a multiple of {unit}{most} for this model, not {resolution}")
    return resolution // factor


def linear_mu(scheduler: Mapping[str, Any], tokens: int, max_shift: float = 1.15) -> float:
    """The shift of a dynamic schedule, linear in the number of image tokens; a scheduler that says nothing has the
    defaults of ``diffusers.pipelines.flux.pipeline_flux.calculate_shift``'s callers, of which SD3's differs."""
    fewest, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", max_shift)
    return float(low + (high - low) / (most - fewest) * (tokens - fewest))


def pack(x: Tensor) -> Tensor:
    """``[B, C, h, w]`` to ``[B, h/2 w/2, 4 C]``: two by two positions are a token."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of :func:`pack`."""
    b, _, c = tokens.shape
    return tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def places(h: int, w: int, columns: int, device: torch.device) -> Tensor:
    """``[h w, columns]``: the row and column of each position, in the second and third."""
    found = torch.zeros(h, w, columns, device=device)
    found[..., 1] = torch.arange(h, device=device)[:, None]
    found[..., 2] = torch.arange(w, device=device)
    return found.flatten(0, 1)


def as_frame(latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
    """Standard ones ``[B, C, h, w]`` as the one frame ``[B, C, 1, h, w]`` that a VAE of videos decodes."""
    mean, std = (
        torch.tensor(vae[name], device=latents.device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    return latents[:, :, None] * std + mean
