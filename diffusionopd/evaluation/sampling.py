"""Images of prompts: the first-order ODE on a backbone.

Letters: B images, C latent channels, h and w latent size, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusionopd.data.noise import Stream, noise
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.text_cache import TextCache
from diffusionopd.transitions import transition


@torch.no_grad()
def sample_images(
    backbone: Backbone, conditions: Conditions, latents: Tensor, num_steps: int, guidance: float, *, resolution: int
) -> Tensor:
    """Images by the first-order ODE (paper eq. 12: x' = x + dt v), decoded.

    Args:
        conditions: of B prompts.
        latents: noise `[B, C, h, w]` float32 on the backbone's device.
        num_steps: sampler steps of the schedule.
        guidance: classifier-free guidance; 1 is none.
        resolution: pixels a side, which the schedule's shift may depend on.

    Returns:
        float32 `[B, 3, H, W]` in [0, 1], on the VAE's device.
    """
    x = latents
    for sigma, sigma_next in pairwise(backbone.sigmas(num_steps, resolution).tolist()):
        velocity, _ = backbone.velocity(x, sigma, conditions, guidance)
        x = transition("ode", sigma, sigma_next).mean(x, velocity)
    return backbone.decode(x)


@dataclass(frozen=True)
class ImageGenerator:
    """Images of samples from a backbone (with whatever adapter is in use) and cached prompt embeddings."""

    backbone: Backbone
    cache: TextCache
    num_steps: int
    guidance_scale: float
    resolution: int
    seed: int

    def __call__(self, prompts: Sequence[str], samples: Sequence[tuple[int, int]]) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] of B prompts; `samples` are their (prompt index, image number).

        Raises `TextCacheError` for a prompt that the cache has not been filled with.
        """
        keys = [(Stream.EVALUATION, self.seed, *sample) for sample in samples]
        latents = noise(self.backbone.latent_shape(self.resolution), keys).to(self.backbone.device)
        conditions = self.cache.get(prompts, self.backbone.device)
        return sample_images(
            self.backbone, conditions, latents, self.num_steps, self.guidance_scale, resolution=self.resolution
        )
