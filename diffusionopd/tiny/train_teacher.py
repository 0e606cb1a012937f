"""Stage `teachers`: one LoRA per task, by supervision (flow matching) on clean images with true captions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model

from diffusionopd.models.sd3 import StableDiffusion3
from diffusionopd.tiny import fit, flow
from diffusionopd.tiny.grammar import TASKS
from diffusionopd.tiny.train_base import POOL

RANK, ALPHA = 16, 32
_LEARNING_RATE = 2e-3
_BATCH = 32
_DROP = 0.1
_EMA_DECAY = 0.995


def train(task: str, model: Path, work: Path, out: Path, minutes: float) -> None:
    """Train one task's LoRA on the base in `model` for `minutes`; write it to `out`."""
    fit.one_thread()
    torch.manual_seed(TASKS.index(task))
    pipe = StableDiffusion3Pipeline.from_pretrained(model, use_safetensors=True)
    pool = flow.cached_pool(work / "pool", task, POOL[task], pipe.vae, dull=task != "scene")
    distinct = [*dict.fromkeys(pool.captions), ""]  # the empty caption is the last
    row = {text: i for i, text in enumerate(distinct)}
    text_row = torch.tensor([row[text] for text in pool.captions])
    tokens, pooled = flow.encode(pipe, distinct)
    targets = list(StableDiffusion3.LORA_TARGETS)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=targets)
    adapted: PeftModel = get_peft_model(pipe.transformer, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(31 + TASKS.index(task))

    def rate(done: float, step: int) -> float:
        return _LEARNING_RATE * min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * done))

    def loss(done: float, step: int) -> torch.Tensor:
        """A tenth of the captions is the empty one, for guidance."""
        rows = torch.randint(len(pool.latents), (_BATCH,), generator=generator)
        dropped = torch.rand(_BATCH, generator=generator) < _DROP
        text = torch.where(dropped, len(tokens) - 1, text_row[rows])
        x, t, target = flow.training_pair(pool.latents[rows].float(), generator)
        return F.mse_loss(flow.velocity(adapted, x, t, tokens[text], pooled[text]), target)

    fit.fit(f"teacher {task}", parameters, optimizer, minutes, rate, loss, average=average, decay=_EMA_DECAY)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    _save(adapted, out)


def _save(adapted: PeftModel, out: Path) -> None:
    """PEFT's own format, without the folder that the base happened to be in and without PEFT's model card."""
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order changes from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
