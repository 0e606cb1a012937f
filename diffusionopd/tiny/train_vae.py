"""Stage `vae`: the autoencoder, on clean and dull pictures of all tasks: L1 + L2 + a light KL term."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffusionopd.distributed import average_gradients
from diffusionopd.tiny import models, parallel
from diffusionopd.tiny.grammar import TASKS, draw
from diffusionopd.tiny.render import dull_vividness, render

_LEARNING_RATE = 4e-3
_KL_WEIGHT = 1e-3
_BATCH = 8
_PICTURES_A_TASK = 2500
_DATA_SEED = 11


def training_pictures(seed: int = _DATA_SEED) -> torch.Tensor:
    """uint8 [N, 3, 64, 64]; half of the scenes are dull."""
    rng = random.Random(seed)
    pictures = []
    for task in TASKS:
        for _ in range(_PICTURES_A_TASK):
            vividness = dull_vividness(rng) if task == "scene" and rng.random() < 0.5 else None
            pictures.append(render(task, draw(task, rng), rng, vividness))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_signal(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return pictures.float() / 127.5 - 1


def train(out: Path, minutes: float, seed: int = 0) -> None:
    """Train for `minutes` and write the autoencoder, its latents normalised, to `out`."""
    rank, world = parallel.start()
    pictures = training_pictures()
    vae = models.autoencoder(seed).train()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, _LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 + rank)
    torch.manual_seed(2000 + rank)
    start, step = time.monotonic(), 0
    while (done := parallel.agree((time.monotonic() - start) / (60 * minutes), world)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1, (step + 1) / 50) * (1 - done) ** 0.7 + 1e-5
        x = to_signal(pictures[torch.randint(len(pictures), (_BATCH,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if rank == 0 and step % 200 == 0:
            print(
                f"vae {done:5.1%} step {step} loss {loss.item():.4f} mse {error.square().mean().item():.5f}", flush=True
            )
    if rank == 0:
        _normalize_latents(vae.eval(), pictures)
        vae.save_pretrained(out)


@torch.no_grad()
def _normalize_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Sets `shift_factor` and `scaling_factor` so that latents have mean 0 and standard deviation 1."""
    sample = pictures[:: max(1, len(pictures) // 600)]
    latents = torch.cat([vae.encode(to_signal(part)).latent_dist.mean for part in sample.split(50)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def main() -> None:
    """The stage's command line, for `parallel.spawn`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes)


if __name__ == "__main__":
    main()
