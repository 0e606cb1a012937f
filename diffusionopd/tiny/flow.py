"""Flow matching on the tiny latents, as small functions: data pool, training pair, prompt encoding, ODE sampling.

`x_t = (1 - t) x_0 + t noise`, velocity `noise - x_0` (Lipman et al., arXiv 2210.02747).
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from diffusionopd.tiny.grammar import corrupt, draw
from diffusionopd.tiny.models import CONTEXT, LATENT_CHANNELS, LATENT_SIDE, SHIFT
from diffusionopd.tiny.render import dull_vividness, render
from diffusionopd.tiny.train_vae import to_signal

# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class Pool:
    """Pictures of one task as latents, with the caption they were drawn for and a wrong one."""

    latents: torch.Tensor  # float16 [N, 8, 16, 16]
    captions: list[str]
    wrong: list[str]


@torch.no_grad()
def make_pool(task: str, size: int, seed: int, vae: AutoencoderKL, dull: bool = False) -> Pool:
    """`size` pictures of training captions, clean (`dull=False`) or with mostly dull scenes."""
    rng = random.Random(seed)
    latents, captions, wrong = [], [], []
    for start in range(0, size, 64):
        pictures = []
        for _ in range(min(64, size - start)):
            caption = draw(task, rng)
            pictures.append(render(task, caption, rng, dull_vividness(rng) if dull and task == "scene" else None))
            captions.append(caption.text)
            wrong.append(caption.text if task == "scene" else corrupt(task, caption, rng).text)
        x = to_signal(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
        latents.append(scale(vae, vae.encode(x).latent_dist.mean).half().contiguous())
    return Pool(torch.cat(latents).contiguous(), captions, wrong)


def cached_pool(folder: Path, task: str, size: int, seed: int, vae: AutoencoderKL, dull: bool = False) -> Pool:
    """`make_pool`, kept in `folder` between runs."""
    path = folder / f"{task}-{'dull' if dull else 'clean'}-{size}-{seed}.safetensors"
    if path.exists():
        stored = load_file(path)
        return Pool(stored["latents"], _from_bytes(stored["captions"]), _from_bytes(stored["wrong"]))
    pool = make_pool(task, size, seed, vae, dull)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"captions": _as_bytes(pool.captions), "wrong": _as_bytes(pool.wrong)}
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file({"latents": pool.latents, **texts}, temporary)
    os.replace(temporary, path)
    return pool


def _as_bytes(texts: list[str]) -> torch.Tensor:
    return torch.tensor(list("\n".join(texts).encode()), dtype=torch.uint8)


def _from_bytes(stored: torch.Tensor) -> list[str]:
    return bytes(stored.tolist()).decode().split("\n")


def scale(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents -> latents of mean 0 and standard deviation 1, what the transformer sees."""
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


# ------------------------------------------------------------------------------------------------------------ training


def training_pair(x0: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_t, t, velocity target) for clean latents `x0`; t is logit-normal, half of it shifted."""
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(x0), generator=generator))
    shifted = torch.rand(len(x0), generator=generator) < 0.5
    t = torch.where(shifted, SHIFT * t / (1 + (SHIFT - 1) * t), t)
    w = t[:, None, None, None]
    return (1 - w) * x0 + w * noise, t, noise - x0


def velocity(
    transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """[B, 8, 16, 16] velocity; `t` in [0, 1] of shape [B]."""
    return transformer(
        hidden_states=x, timestep=t * 1000, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False
    )[0]


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
    """The pipeline's own prompt embeddings, each distinct text encoded once."""
    distinct = list(dict.fromkeys(texts))
    parts = []
    for start in range(0, len(distinct), 256):
        part = distinct[start : start + 256]
        tokens, _, pooled, _ = pipe.encode_prompt(
            part, part, part, do_classifier_free_guidance=False, max_sequence_length=CONTEXT
        )
        parts.append((tokens, pooled))
    row = {text: i for i, text in enumerate(distinct)}
    index = torch.tensor([row[text] for text in texts])
    return torch.cat([p[0] for p in parts])[index], torch.cat([p[1] for p in parts])[index]


@torch.no_grad()
def generate(
    pipe: StableDiffusion3Pipeline,
    texts: Sequence[str],
    guidance_scale: float = 1.0,
    steps: int = 10,
    seed: int = 0,
    batch: int = 32,
) -> torch.Tensor:
    """uint8 [N, 3, 64, 64] by the Euler ODE; picture i depends on (seed, i, text) only."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas
    tokens, pooled = encode(pipe, texts)
    empty_tokens, empty_pooled = encode(pipe, [""])
    shape = (LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    x = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100_003 + i)) for i in range(len(texts))]
    )
    pictures = []
    for rows in torch.arange(len(texts)).split(batch):
        z = x[rows]
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            t = sigma.expand(len(rows))
            v = velocity(pipe.transformer, z, t, tokens[rows], pooled[rows])
            if guidance_scale > 1:
                n = len(rows)
                plain = velocity(pipe.transformer, z, t, empty_tokens.expand(n, -1, -1), empty_pooled.expand(n, -1))
                v = plain + guidance_scale * (v - plain)
            z = z + (sigma_next - sigma) * v
        pictures.append(decode(pipe.vae, z))
    return torch.cat(pictures)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, 64, 64]."""
    signal = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return ((signal.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
