"""Stage `base`: transformer and text encoders from nothing, by flow matching, in two phases.

First clean captions, so that which colour goes with which shape is really learned. Then, while the learning rate
decays, many captions are wrong: the base becomes weak at obeying prompts, so that the teachers have something to teach,
but keeps the features that a low-rank adapter needs. Scenes are mostly dull all along.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from diffusionopd.tiny import fit, flow, models
from diffusionopd.tiny.grammar import TASKS

#: Images in the training pool, share of each batch, and share of wrong captions in the second phase.
POOL = {"compose": 24000, "ocr": 12000, "scene": 4000}
SHARE = {"compose": 0.65, "ocr": 0.15, "scene": 0.2}
WRONG = {"compose": 0.6, "ocr": 0.7, "scene": 0.0}
CLEAN_PHASE = 0.6
_BATCH = 16  # per process
_DROP = 0.1  # captions replaced by the empty one, for guidance
_LEARNING_RATE = 1.5e-3
_EMA_DECAY = 0.998


class BaseTraining:
    """Everything that training advances; `save` and `resume` carry it over an interruption."""

    def __init__(self, rank: int, vae: AutoencoderKL, work: Path) -> None:
        self.rank, self.file = rank, work / "base-state.pt"
        self.pipe = models.pipeline(vae, 0)
        self.encoders = [self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3]
        self.modules = torch.nn.ModuleList([self.pipe.transformer, *self.encoders]).train()
        self.average = copy.deepcopy(self.modules).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.generator, self.progress = torch.Generator(), fit.Progress()
        if rank > 0:  # rank 0 draws the images, the others wait and read them
            dist.barrier()
        self.pools = [flow.cached_pool(work / "pool", task, POOL[task], vae, dull=True) for task in TASKS]
        if rank == 0 and dist.is_initialized():
            dist.barrier()
        self.ids = [torch.stack([flow.token_ids(self.pipe, t) for t in (p.captions, p.wrong)]) for p in self.pools]
        self.empty = flow.token_ids(self.pipe, [""])

    def batch(self, step: int, noisy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean latents [B, 8, 16, 16], token ids [3, B, 14]); a function of (step, rank) alone."""
        generator = self.generator.manual_seed(step * 64 + self.rank)
        shares = torch.tensor(list(SHARE.values()))
        counts = torch.multinomial(shares, _BATCH, True, generator=generator).bincount(minlength=3)
        latents, ids = [], []
        for task, pool, pool_ids, n in zip(TASKS, self.pools, self.ids, counts.tolist(), strict=True):
            rows = torch.randint(len(pool.latents), (n,), generator=generator)
            wrong = torch.rand(n, generator=generator) < (WRONG[task] if noisy else 0.0)
            latents.append(pool.latents[rows].float())
            ids.append(torch.where(wrong[None, :, None], pool_ids[1][:, rows], pool_ids[0][:, rows]))
        dropped = torch.rand(_BATCH, generator=generator) < _DROP
        return torch.cat(latents), torch.where(dropped[None, :, None], self.empty, torch.cat(ids, dim=1))

    def loss(self, done: float, step: int) -> torch.Tensor:
        """Flow matching on this process's batch of a step."""
        x0, ids = self.batch(step, noisy=done >= CLEAN_PHASE)
        x, t, target = flow.training_pair(x0, self.generator)
        tokens, pooled = flow.embed(self.encoders, ids)
        return F.mse_loss(flow.velocity(self.pipe.transformer, x, t, tokens, pooled), target)

    def save(self) -> None:
        """One file, replaced at once; plain values only."""
        parts = {name: getattr(self, name).state_dict() for name in ("modules", "average", "optimizer")}
        temporary = self.file.with_suffix(".tmp")
        torch.save(parts | {"progress": asdict(self.progress)}, temporary)
        os.replace(temporary, self.file)

    def resume(self) -> None:
        """Load what `save` wrote, if anything."""
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for name in ("modules", "average", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.progress = fit.Progress(**state["progress"])
            print(f"base: resumed at step {self.progress.step}", flush=True)

    def export(self, out: Path) -> None:
        """The averaged weights as a pipeline folder."""
        names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
        parts = dict(self.pipe.components) | dict(zip(names, self.average, strict=True))
        StableDiffusion3Pipeline(**{k: v for k, v in parts.items() if v is not None}).save_pretrained(out)


def learning_rate(done: float, step: int) -> float:
    """Constant for half of the time, then a cosine down to 3%."""
    decay = 1.0 if done < 0.5 else 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
    return _LEARNING_RATE * min(1.0, (step + 1) / 200) * decay


def train(rank: int, work: Path, out: Path, minutes: float) -> None:
    """Train for `minutes` in all, interrupted runs included; write the pipeline folder `out` at the end."""
    vae = AutoencoderKL.from_pretrained(work / "vae", use_safetensors=True).eval().requires_grad_(False)
    training = BaseTraining(rank, vae, work)
    training.resume()
    fit.fit(
        "base",
        list(training.modules.parameters()),
        training.optimizer,
        minutes,
        learning_rate,
        training.loss,
        progress=training.progress,
        average=list(training.average.parameters()),
        decay=_EMA_DECAY,
        save=training.save,
    )
    if rank == 0:
        training.save()
        training.export(out)
