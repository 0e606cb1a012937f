"""Stage `base`: transformer and text encoders from nothing, by flow matching, in two phases.

First clean captions, so that which colour goes with which shape is really learned. Then, while the learning rate
decays, many captions are wrong: the base becomes weak at obeying prompts, so that the teachers have something to teach,
but keeps the features that a low-rank adapter needs. Scenes are mostly dull all along.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from diffusionopd.distributed import average_gradients
from diffusionopd.tiny import flow, models, parallel
from diffusionopd.tiny.grammar import TASKS

#: Pictures in the training pool, share of each batch, and share of wrong captions in the second phase.
POOL = {"compose": 24000, "ocr": 12000, "scene": 4000}
SHARE = {"compose": 0.65, "ocr": 0.15, "scene": 0.2}
WRONG = {"compose": 0.6, "ocr": 0.7, "scene": 0.0}
CLEAN_PHASE = 0.6
_BATCH = 16  # a process
_DROP = 0.1  # captions replaced by the empty one, for guidance
_LEARNING_RATE = 1.5e-3
_EMA_DECAY = 0.998
_SAVE_SECONDS = 120
POOL_SEED = 21


class BaseTraining:
    """Everything that training advances; `save` and `resume` carry it over an interruption."""

    def __init__(self, vae: AutoencoderKL, work: Path, seed: int = 0) -> None:
        self.rank, self.world = parallel.start()
        self.work = work
        self.pipe = models.pipeline(vae, seed)
        self.encoders = [self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3]
        self.modules = torch.nn.ModuleList([self.pipe.transformer, *self.encoders]).train()
        self.average = copy.deepcopy(self.modules).eval().requires_grad_(False)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self.generator = torch.Generator()
        self.step, self.seconds, self.mean_loss = 0, 0.0, 0.0
        self._load_pools()

    def _load_pools(self) -> None:
        """Rank 0 draws the pictures, the others wait and read them."""
        folder, vae = self.work / "pool", self.pipe.vae
        if self.rank > 0:
            parallel.agree(0, self.world)
        self.pools = [flow.cached_pool(folder, task, POOL[task], POOL_SEED, vae, dull=True) for task in TASKS]
        if self.rank == 0:
            parallel.agree(0, self.world)
        self.ids = [torch.stack([flow.token_ids(self.pipe, t) for t in (p.captions, p.wrong)]) for p in self.pools]
        self.empty = flow.token_ids(self.pipe, [""])

    # -------------------------------------------------------------------------------------------------------- one step

    def batch(self, noisy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean latents [B, 8, 16, 16], token ids [3, B, 14]); a function of (step, rank) alone."""
        self.generator.manual_seed(self.step * 64 + self.rank)
        counts = torch.multinomial(torch.tensor(list(SHARE.values())), _BATCH, True, generator=self.generator).bincount(
            minlength=3
        )
        latents, ids = [], []
        for task, pool, pool_ids, n in zip(TASKS, self.pools, self.ids, counts.tolist(), strict=True):
            rows = torch.randint(len(pool.latents), (n,), generator=self.generator)
            wrong = torch.rand(n, generator=self.generator) < (WRONG[task] if noisy else 0.0)
            latents.append(pool.latents[rows].float())
            ids.append(torch.where(wrong[None, :, None], pool_ids[1][:, rows], pool_ids[0][:, rows]))
        dropped = torch.rand(_BATCH, generator=self.generator) < _DROP
        return torch.cat(latents), torch.where(dropped[None, :, None], self.empty, torch.cat(ids, dim=1))

    def advance(self, learning_rate: float, noisy: bool) -> None:
        """One optimizer step on one batch a process; `noisy` mixes in wrong captions."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        x0, ids = self.batch(noisy)
        x, t, target = flow.training_pair(x0, self.generator)
        tokens, pooled = flow.embed(self.encoders, ids)
        loss = F.mse_loss(flow.velocity(self.pipe.transformer, x, t, tokens, pooled), target)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.mean_loss += (
            0.01 * (loss.item() - self.mean_loss) if self.step > 100 else (loss.item() - self.mean_loss) / self.step
        )
        self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        weight = 1 - min(_EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.modules.parameters()), weight)

    # ------------------------------------------------------------------------------------------------------------ state

    def save(self) -> None:
        """One file, replaced at once; plain tensors only."""
        state = {f"modules.{k}": v for k, v in self.modules.state_dict().items()}
        state |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, slot in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in slot.items()}
        state["progress"] = torch.tensor([self.step, self.seconds, self.mean_loss], dtype=torch.float64)
        temporary = self.work / "base-state.tmp"
        save_file({k: v.contiguous().clone() for k, v in state.items()}, temporary)
        os.replace(temporary, self.work / "base-state.safetensors")

    def resume(self) -> bool:
        """Load what `save` wrote; False where there is nothing."""
        path = self.work / "base-state.safetensors"
        if not path.exists():
            return False
        state = load_file(path)
        for name in ("modules", "average"):
            part = {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}
            getattr(self, name).load_state_dict(part)
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                slots.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        step, self.seconds, self.mean_loss = state["progress"].tolist()
        self.step = int(step)
        return True

    def export(self, out: Path) -> None:
        """The averaged weights as a pipeline folder."""
        transformer, *encoders = self.average
        parts = dict(self.pipe.components, transformer=transformer)
        parts |= dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), encoders, strict=True))
        StableDiffusion3Pipeline(**{k: v for k, v in parts.items() if v is not None}).save_pretrained(out)


def learning_rate(done: float, step: int) -> float:
    """Constant for half of the time, then a cosine down to 3%."""
    decay = 1.0 if done < 0.5 else 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
    return _LEARNING_RATE * min(1.0, (step + 1) / 200) * decay


def train(work: Path, minutes: float, out: Path) -> None:
    """Train for `minutes` in all, earlier sittings included; write the pipeline folder `out` at the end."""
    vae = AutoencoderKL.from_pretrained(work / "vae", use_safetensors=True).eval().requires_grad_(False)
    training = BaseTraining(vae, work)
    if training.resume() and training.rank == 0:
        print(f"base: resumed at step {training.step}", flush=True)
    begin, saved = time.monotonic() - training.seconds, time.monotonic()
    while True:
        training.seconds = parallel.agree(time.monotonic() - begin, training.world)
        done = training.seconds / (60 * minutes)
        if done >= 1:
            break
        training.advance(learning_rate(done, training.step), noisy=done >= CLEAN_PHASE)
        if training.rank == 0 and training.step % 100 == 0:
            speed = training.step * _BATCH * training.world / training.seconds
            loss = f"loss {training.mean_loss:.4f}"
            print(f"base {done:5.1%} step {training.step} {loss} {speed:.0f} images/s", flush=True)
        if training.rank == 0 and time.monotonic() - saved > _SAVE_SECONDS:
            training.save()
            saved = time.monotonic()
    if training.rank == 0:
        training.save()
        training.export(out)


def main() -> None:
    """The stage's command line, for `parallel.spawn`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    arguments = parser.parse_args()
    train(arguments.work, arguments.minutes, arguments.out)


if __name__ == "__main__":
    main()
