"""Flow matching on the tiny latents, as small functions: images as latents, the loss, prompt encoding, sampling.

`x_t = (1 - t) x_0 + t noise`, velocity `noise - x_0` (Lipman et al., arXiv 2210.02747).
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from diffusionopd.files import write_atomically
from diffusionopd.tiny.grammar import corrupt, draw
from diffusionopd.tiny.models import CONTEXT, LATENT_CHANNELS, LATENT_SIDE, SHIFT
from diffusionopd.tiny.render import RESOLUTION, dull_vividness, render

# ---------------------------------------------------------------------------------------------------------------- data

#: Images in a task's training pool.
POOL = {"compose": 24000, "ocr": 12000, "scene": 4000}
POOL_SEED = 21

Pool = tuple[torch.Tensor, list[str], list[str]]
"""Latents (float16 [N, 8, 16, 16]) of images, the captions that they were drawn for, and wrong ones."""


@torch.no_grad()
def pool(folder: Path, task: str, vae: AutoencoderKL, dull: bool = False) -> Pool:
    """Images of training captions, clean or with mostly dull scenes; kept in `folder` between runs."""
    path = folder / f"{task}-{'dull' if dull else 'clean'}-{POOL[task]}-{POOL_SEED}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    rng = random.Random(POOL_SEED)
    latents, captions, wrong = [], [], []
    for rows in torch.arange(POOL[task]).split(64):
        images = []
        for _ in rows:
            caption = draw(task, rng)
            images.append(render(task, caption, rng, dull_vividness(rng) if dull else None))
            captions.append(caption.text)
            wrong.append(caption.text if task == "scene" else corrupt(task, caption, rng).text)
        x = to_signal(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        scaled = (vae.encode(x).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(scaled.half())
    made = torch.cat(latents).contiguous(), captions, wrong
    torch.save(made, content := io.BytesIO())
    write_atomically(path, content.getvalue())
    return made


def to_signal(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------ training


def loss(
    transformer: torch.nn.Module,
    x0: torch.Tensor,
    tokens: torch.Tensor,
    pooled: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the velocity at random times, which are logit-normal, half of them shifted."""
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(x0), generator=generator))
    shifted = torch.rand(len(x0), generator=generator) < 0.5
    t = torch.where(shifted, SHIFT * t / (1 + (SHIFT - 1) * t), t)
    w = t[:, None, None, None]
    x = (1 - w) * x0 + w * noise
    velocity = transformer(x, timestep=t * 1000, encoder_hidden_states=tokens, pooled_projections=pooled)
    return F.mse_loss(velocity.sample, noise - x0)


def token_ids(pipe: StableDiffusion3Pipeline, texts: Sequence[str]) -> torch.Tensor:
    """int64 [3, N, 14]: the three tokenizers' view of every text."""
    options = {"padding": "max_length", "max_length": CONTEXT, "truncation": True, "return_tensors": "pt"}
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)
    return torch.stack([tokenizer(list(texts), **options).input_ids for tokenizer in tokenizers])


def embed(encoders: Sequence[torch.nn.Module], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` computes, with gradients: tokens [B, 28, 128], pooled [B, 128]."""
    clip = [encoder(part, output_hidden_states=True) for encoder, part in zip(encoders[:2], ids[:2], strict=True)]
    hidden = torch.cat([output.hidden_states[-2] for output in clip], dim=-1)
    long = encoders[2](ids[2])[0]
    hidden = F.pad(hidden, (0, long.shape[-1] - hidden.shape[-1]))
    return torch.cat([hidden, long], dim=1), torch.cat([output[0] for output in clip], dim=-1)


# ------------------------------------------------------------------------------------------------------------ sampling


@torch.no_grad()
def encode(pipe: StableDiffusion3Pipeline, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's own prompt embeddings: tokens [N, 28, 128], pooled [N, 128]."""
    prompts = [list(texts)] * 3
    tokens, _, pooled, _ = pipe.encode_prompt(*prompts, do_classifier_free_guidance=False, max_sequence_length=CONTEXT)
    return tokens, pooled


def generate(
    pipe: StableDiffusion3Pipeline,
    texts: Sequence[str],
    guidance_scale: float = 1.0,
    steps: int = 10,
    seed: int = 0,
    batch: int = 32,
) -> torch.Tensor:
    """uint8 [N, 3, 64, 64] by the pipeline itself (Euler ODE); image i depends on (seed, i, text) only."""
    shape, images = (LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE), []
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "max_sequence_length": CONTEXT}
    for rows in torch.arange(len(texts)).split(batch):
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100_003 + int(i))) for i in rows]
        prompts, latents = [texts[i] for i in rows], torch.stack(noise)
        made = pipe(prompts, height=RESOLUTION, width=RESOLUTION, latents=latents, output_type="pt", **settings)
        images.append(made.images)
    return (torch.cat(images) * 255).round().to(torch.uint8)
