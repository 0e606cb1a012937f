"""What is trained: the autoencoder, the base model, and a teacher per task, each for a given time."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel

from diffusionopd.models.lora import Adapters
from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.tiny import fit, flow, models
from diffusionopd.tiny.grammar import TASKS, draw
from diffusionopd.tiny.render import dull_vividness, render

_BETAS = (0.9, 0.98)
_DROPPED = 0.1  # share of captions replaced by the empty one, for guidance

# -------------------------------------------------------------------------------------------------------- autoencoder

_VAE_RATE = 4e-3
_VAE_BATCH = 8  # per process
_IMAGES_PER_TASK = 2500
_KL_WEIGHT = 1e-3


def vae_images() -> torch.Tensor:
    """uint8 [N, 3, 64, 64] of all tasks; half of the scenes are dull."""
    rng, images = random.Random(11), []
    for task in TASKS:
        for _ in range(_IMAGES_PER_TASK):
            vividness = dull_vividness(rng) if task == "scene" and rng.random() < 0.5 else None
            images.append(render(task, draw(task, rng), rng, vividness))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def train_vae(rank: int, out: Path, minutes: float) -> None:
    """The autoencoder by L1 + L2 + a light KL term; its latents, scaled, have mean 0 and standard deviation 1."""
    images, vae = vae_images(), models.autoencoder(0).train()
    generator = torch.Generator().manual_seed(1000 + rank)
    torch.manual_seed(2000 + rank)

    def rate(done: float, step: int) -> float:
        return _VAE_RATE * min(1, (step + 1) / 50) * (1 - done) ** 0.7 + 1e-5

    def loss(done: float, step: int) -> torch.Tensor:
        x = flow.to_signal(images[torch.randint(len(images), (_VAE_BATCH,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl

    fit.fit("vae", torch.optim.AdamW(vae.parameters(), weight_decay=0.0), minutes, rate, loss)
    if rank == 0:
        vae.eval()
        sample = images[:: max(1, len(images) // 600)]
        with torch.no_grad():
            latents = torch.cat([vae.encode(flow.to_signal(part)).latent_dist.mean for part in sample.split(50)])
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
        vae.save_pretrained(out)


# --------------------------------------------------------------------------------------------------------- base model

#: Share of each task in a batch, and share of wrong captions in the second phase.
SHARE = {"compose": 0.65, "ocr": 0.15, "scene": 0.2}
WRONG = {"compose": 0.6, "ocr": 0.7, "scene": 0.0}
CLEAN_PHASE = 0.6
_BASE_RATE = 1.5e-3
_BASE_BATCH = 16  # per process


def base_pool(task: str, work: Path, vae: AutoencoderKL) -> flow.Pool:
    """The images that the base learns from: its scenes are mostly dull."""
    return flow.pool(work / "vae" / "pool", task, vae, dull=task == "scene")  # gone with the autoencoder


def load_vae(work: Path) -> AutoencoderKL:
    """The autoencoder that :func:`train_vae` wrote, frozen."""
    return AutoencoderKL.from_pretrained(work / "vae", use_safetensors=True).eval().requires_grad_(False)


def train_base(rank: int, work: Path, out: Path, minutes: float) -> None:
    """Transformer and text encoders from nothing, by flow matching, in two phases; a pipeline folder.

    First clean captions, so that which colour goes with which shape is really learned. Then, while the learning rate
    decays, many captions are wrong: the base becomes weak at obeying prompts, so that the teachers have something to
    teach, but keeps the features that a low-rank adapter needs.
    """
    vae = load_vae(work)
    pipe = models.pipeline(vae, 0)
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    modules = torch.nn.ModuleList([pipe.transformer, *encoders]).train()
    pools = [base_pool(task, work, vae) for task in TASKS]
    ids = [[flow.token_ids(pipe, texts) for texts in (captions, wrong)] for _, captions, wrong in pools]
    empty, generator = flow.token_ids(pipe, [""]), torch.Generator()

    def rate(done: float, step: int) -> float:
        """Constant for half of the time, then a cosine down to 3%."""
        decay = 1.0 if done < 0.5 else 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
        return _BASE_RATE * min(1.0, (step + 1) / 200) * decay

    def loss(done: float, step: int) -> torch.Tensor:
        """On a batch that is a function of (step, rank, phase) alone."""
        generator.manual_seed(step * 64 + rank)
        shares = torch.tensor(list(SHARE.values()))
        counts = torch.multinomial(shares, _BASE_BATCH, True, generator=generator).bincount(minlength=len(TASKS))
        x0, texts = [], []
        for task, (latents, *_), (right, wrong), count in zip(TASKS, pools, ids, counts.tolist(), strict=True):
            rows = torch.randint(len(latents), (count,), generator=generator)
            is_wrong = torch.rand(count, generator=generator) < (WRONG[task] if done >= CLEAN_PHASE else 0.0)
            x0.append(latents[rows].float())
            texts.append(torch.where(is_wrong[None, :, None], wrong[:, rows], right[:, rows]))
        dropped = torch.rand(_BASE_BATCH, generator=generator) < _DROPPED
        tokens, pooled = flow.embed(encoders, torch.where(dropped[None, :, None], empty, torch.cat(texts, dim=1)))
        return flow.loss(pipe.transformer, torch.cat(x0), tokens, pooled, generator)

    optimizer = torch.optim.AdamW(modules.parameters(), betas=_BETAS, weight_decay=0.01)
    average = EMAModel(modules.parameters(), decay=0.998, foreach=True)
    fit.fit("base", optimizer, minutes, rate, loss, average)
    if rank == 0:
        pipe.save_pretrained(out)


# ----------------------------------------------------------------------------------------------------------- teachers

_TEACHER_RATE = 2e-3
_TEACHER_BATCH = 32


def train_teacher(task: str, model: Path, work: Path, out: Path, minutes: float) -> None:
    """A task's LoRA on the base in `model`, by flow matching on clean images with true captions; PEFT's own form."""
    fit.one_thread()
    pipe = StableDiffusion3Pipeline.from_pretrained(model, use_safetensors=True)
    latents, captions, _ = flow.pool(work / "vae" / "pool", task, pipe.vae)
    distinct = [*dict.fromkeys(captions), ""]  # the empty caption is the last
    row = {text: i for i, text in enumerate(distinct)}
    text_row = torch.tensor([row[text] for text in captions])
    tokens, pooled = flow.encode(pipe, distinct)
    adapters, seed = Adapters(pipe.transformer), TASKS.index(task)
    adapters.add_student(task, rank=16, alpha=32, target_modules=StableDiffusion3.LORA_TARGETS, seed=seed)
    adapters.use(task)
    generator = torch.Generator().manual_seed(31 + seed)

    def rate(done: float, step: int) -> float:
        return _TEACHER_RATE * min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * done))

    def loss(done: float, step: int) -> torch.Tensor:
        rows = torch.randint(len(latents), (_TEACHER_BATCH,), generator=generator)
        dropped = torch.rand(_TEACHER_BATCH, generator=generator) < _DROPPED
        text = torch.where(dropped, len(tokens) - 1, text_row[rows])
        return flow.loss(pipe.transformer, latents[rows].float(), tokens[text], pooled[text], generator)

    optimizer = torch.optim.AdamW(adapters.parameters(task), betas=_BETAS, weight_decay=0.0)
    average = EMAModel(adapters.parameters(task), decay=0.995, foreach=True)
    fit.fit(f"teacher {task}", optimizer, minutes, rate, loss, average)
    adapters.save_peft(task, out)
