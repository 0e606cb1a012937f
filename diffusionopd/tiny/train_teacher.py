"""Stage `teachers`: one LoRA a task, by supervision (flow matching) on clean pictures with true captions."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model

from diffusionopd.tiny import flow, parallel
from diffusionopd.tiny.grammar import TASKS
from diffusionopd.tiny.train_base import POOL, POOL_SEED
from diffusionopd.training import base_config

RANK, ALPHA = 16, 32
_LEARNING_RATE = 2e-3
_BATCH = 32
_DROP = 0.1
_EMA_DECAY = 0.995

Batch = tuple[torch.Tensor, ...]  # x_t, t, velocity target, prompt tokens, pooled prompt
EmbeddingTable = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def train(task: str, model: Path, work: Path, out: Path, minutes: float, learning_rate: float = _LEARNING_RATE) -> None:
    """Train one task's LoRA on the base in `model` for `minutes`; write it to `out`."""
    parallel.start()
    torch.manual_seed(TASKS.index(task))
    pipe = StableDiffusion3Pipeline.from_pretrained(model, use_safetensors=True)
    pool = flow.cached_pool(work / "pool", task, POOL[task], POOL_SEED, pipe.vae, dull=task != "scene")
    batches = _batches(pool.latents, _embedding_table(pipe, pool.captions), seed=31 + TASKS.index(task))
    targets = list(base_config().train.lora_target_modules)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=targets)
    adapted: PeftModel = get_peft_model(pipe.transformer, config)
    _fit(adapted, batches, minutes, learning_rate, name=task)
    _save(adapted, out)


def _fit(adapted: PeftModel, batches: Iterator[Batch], minutes: float, learning_rate: float, name: str) -> None:
    """Adam on the adapter for `minutes`, learning rate on a cosine; leaves the averaged weights in it."""
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    start, step, mean_loss = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * done))
        x, t, target, tokens, pooled = next(batches)
        loss = F.mse_loss(flow.velocity(adapted, x, t, tokens, pooled), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        mean_loss += (loss.item() - mean_loss) / min(step, 100)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(_EMA_DECAY, (1 + step) / (10 + step)))
        if step % 100 == 0:
            print(f"teacher {name} {done:5.1%} step {step} loss {mean_loss:.4f}", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def _batches(latents: torch.Tensor, table: EmbeddingTable, seed: int) -> Iterator[Batch]:
    """Endless random batches; a tenth of the captions is the empty one, for guidance."""
    tokens, pooled, text_row = table
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(latents), (_BATCH,), generator=generator)
        dropped = torch.rand(_BATCH, generator=generator) < _DROP
        text = torch.where(dropped, len(tokens) - 1, text_row[rows])
        yield *flow.training_pair(latents[rows].float(), generator), tokens[text], pooled[text]


def _embedding_table(pipe: StableDiffusion3Pipeline, texts: list[str]) -> EmbeddingTable:
    """(tokens [K + 1, 28, 128], pooled [K + 1, 128], row of each text); the last row is the empty caption."""
    distinct = [*dict.fromkeys(texts), ""]
    row = {text: i for i, text in enumerate(distinct)}
    tokens, pooled = flow.encode(pipe, distinct)
    return tokens, pooled, torch.tensor([row[text] for text in texts])


def _save(adapted: PeftModel, out: Path) -> None:
    """PEFT's own format, without the folder that the base happened to be in and without PEFT's model card."""
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order changes from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """The stage's command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    for name in ("--model", "--work", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--learning_rate", type=float, default=_LEARNING_RATE)
    a = parser.parse_args()
    train(a.task, a.model, a.work, a.out, a.minutes, a.learning_rate)


if __name__ == "__main__":
    main()
