"""Images of prompts: the ODE on a backbone, by the steps of its pipeline.

Letters: B images, C latent channels, h and w latent size, H and W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionopd.data.noise import Stream, noise
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rollout import walk
from diffusionopd.transitions import schedule


@torch.no_grad()
def sample_latents(
    backbone: Backbone, conditions: Conditions, latents: Tensor, num_steps: int, guidance: float, *, resolution: int
) -> Tensor:
    """Latents of images by the first-order ODE (paper eq. 12: x' = x + dt v), or as the backbone's `multistep` has it.

    Args:
        conditions: of B prompts.
        latents: noise `[B, C, h, w]` float32 on the backbone's device.
        num_steps: sampler steps of the schedule.
        guidance: classifier-free guidance; 1 is none.
        resolution: pixels a side, which the schedule's shift may depend on.

    Returns:
        `[B, C, h, w]`, for `Backbone.decode`.
    """

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return backbone.velocity(x, sigma, conditions, guidance)[0]

    return follow(velocity, latents, backbone.sigmas(num_steps, resolution), backbone.multistep)


@torch.no_grad()
def follow(velocity: Callable[[Tensor, float], Tensor], latents: Tensor, sigmas: Tensor, multistep: bool) -> Tensor:
    """Where the ODE of any `velocity(x, sigma)` ends from `latents`, both `[B, C, h, w]`.

    Args:
        sigmas: the N + 1 noise levels of `Backbone.sigmas`.
        multistep: as `Backbone.multistep`.
    """

    def no_noise(step: int) -> Tensor:
        raise AssertionError("the ODE draws none")

    for visit in walk(latents, schedule("ode", sigmas), velocity, draw_noise=no_noise, multistep=multistep):
        latents = visit.x_next
    return latents


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
        how = self.num_steps, self.guidance_scale
        return self.backbone.decode(
            sample_latents(self.backbone, conditions, latents, *how, resolution=self.resolution)
        )
