"""Stage `vae`: the autoencoder, on clean and dull images of all tasks: L1 + L2 + a light KL term."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffusionopd.tiny import fit, models
from diffusionopd.tiny.grammar import TASKS, draw
from diffusionopd.tiny.render import dull_vividness, render

_LEARNING_RATE = 4e-3
_KL_WEIGHT = 1e-3
_BATCH = 8
_IMAGES_PER_TASK = 2500
_DATA_SEED = 11


def training_images() -> torch.Tensor:
    """uint8 [N, 3, 64, 64]; half of the scenes are dull."""
    rng = random.Random(_DATA_SEED)
    images = []
    for task in TASKS:
        for _ in range(_IMAGES_PER_TASK):
            vividness = dull_vividness(rng) if task == "scene" and rng.random() < 0.5 else None
            images.append(render(task, draw(task, rng), rng, vividness))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def to_signal(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def train(rank: int, out: Path, minutes: float) -> None:
    """Train for `minutes` and write the autoencoder, its latents normalised, to `out`."""
    images, vae = training_images(), models.autoencoder(0).train()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, _LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 + rank)
    torch.manual_seed(2000 + rank)

    def rate(done: float, step: int) -> float:
        return _LEARNING_RATE * min(1, (step + 1) / 50) * (1 - done) ** 0.7 + 1e-5

    def loss(done: float, step: int) -> torch.Tensor:
        x = to_signal(images[torch.randint(len(images), (_BATCH,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl

    fit.fit("vae", parameters, optimizer, minutes, rate, loss)
    if rank == 0:
        _normalize_latents(vae.eval(), images)
        vae.save_pretrained(out)


@torch.no_grad()
def _normalize_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Sets `shift_factor` and `scaling_factor` so that latents have mean 0 and standard deviation 1."""
    sample = images[:: max(1, len(images) // 600)]
    latents = torch.cat([vae.encode(to_signal(part)).latent_dist.mean for part in sample.split(50)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
