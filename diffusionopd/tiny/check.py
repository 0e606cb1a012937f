"""Stage `check`: base and teachers scored on the 384 held-out prompts a task, into `scores.json`.

Also holds what the demonstration relies on: the guidance of each teacher and the bounds that shipped weights must keep.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from peft import PeftModel

from diffusionopd.rewards import build_scorer
from diffusionopd.tiny import flow, parallel
from diffusionopd.tiny.grammar import TASKS, Caption, file_captions

STEPS = 10
SEED = 5
GUIDANCES = (1.0, 1.5, 2.0, 2.5)
#: Guidance of each teacher in the demonstration. The base and the student run at 1.
TEACHER_GUIDANCE = {"compose": 1.5, "ocr": 1.0, "scene": 1.0}
#: What each teacher reaches at least on its own task at its guidance, and by how much it beats the base.
TEACHER_BOUND = {"compose": 0.72, "ocr": 0.90, "scene": 0.70}
GAP_BOUND = 0.20

Scores = dict[str, float]
Job = tuple[str | None, str, float]  # teacher (None: the base), task, guidance scale


@cache
def _scorer(task: str) -> Any:
    return build_scorer(f"tiny_{task}")


def load(assets: Path, teacher: str | None = None) -> StableDiffusion3Pipeline:
    """The base pipeline, or one with a teacher's LoRA merged into it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(assets / "model", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if teacher is not None:
        adapted = PeftModel.from_pretrained(pipe.transformer, assets / "teachers" / teacher / "lora")
        pipe.transformer = adapted.merge_and_unload()
    return pipe


def score(
    pipe: StableDiffusion3Pipeline, task: str, guidance_scale: float, prompts: Sequence[Caption], seed: int = SEED
) -> Scores:
    """Mean scores of one picture a prompt, sampled by the 10-step Euler ODE."""
    texts = [prompt.text for prompt in prompts]
    pictures = flow.generate(pipe, texts, guidance_scale, STEPS, seed)
    scores = _scorer(task).score(pictures, texts, [prompt.metadata for prompt in prompts])
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


def _jobs() -> list[Job]:
    """(teacher, task, guidance): base and teachers at every guidance, teachers also on other tasks."""
    base: list[Job] = [(None, task, g) for task in TASKS for g in GUIDANCES]
    own: list[Job] = [(teacher, teacher, g) for teacher in TASKS for g in GUIDANCES]
    other: list[Job] = [
        (teacher, task, TEACHER_GUIDANCE[teacher]) for teacher in TASKS for task in TASKS if task != teacher
    ]
    return base + own + other


def measure(
    assets: Path, jobs: Iterable[tuple[str | None, str, float]], prompts: int | None = None
) -> list[dict[str, Any]]:
    """Scores of every (teacher, task, guidance), printed as they come; `prompts` limits the held-out prompts."""
    loaded: tuple[str | None, StableDiffusion3Pipeline] | None = None
    records = []
    for teacher, task, guidance in jobs:
        if loaded is None or loaded[0] != teacher:
            loaded = (teacher, load(assets, teacher))
        scores = score(loaded[1], task, guidance, file_captions(task, "test")[:prompts])
        records.append({"model": teacher or "base", "task": task, "guidance_scale": guidance, "scores": scores})
        print(json.dumps(records[-1]), flush=True)
    return records


def violations(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the recorded scores fail of the bounds; empty for weights that may be shipped."""
    main = {(r["model"], r["task"], r["guidance_scale"]): r["scores"][f"tiny_{r['task']}"] for r in records}
    found = []
    for task in TASKS:
        teacher, base = main[task, task, TEACHER_GUIDANCE[task]], main["base", task, 1.0]
        if teacher < TEACHER_BOUND[task]:
            found.append(f"{task}: the teacher has {teacher:.3f}, wanted at least {TEACHER_BOUND[task]}")
        if teacher - base < GAP_BOUND:
            found.append(f"{task}: the teacher's {teacher:.3f} is less than {GAP_BOUND} above the base's {base:.3f}")
    return found


def write(assets: Path, records: Sequence[dict[str, Any]], prompts: int) -> None:
    """Writes `scores.json`: how it was measured, and the records."""
    about = {"sampler": f"Euler ODE, {STEPS} steps", "prompts_per_task": prompts, "seed": SEED}
    content = about | {"teacher_guidance_scale": TEACHER_GUIDANCE, "results": list(records)}
    (assets / "scores.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """One of several processes takes every n-th job and leaves its part in the work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    a = parser.parse_args()
    torch.manual_seed(0)
    rank, world = parallel.start()
    (a.work / f"scores-{rank}.json").write_text(json.dumps(measure(a.assets, _jobs()[rank::world])))


def combine(assets: Path, work: Path, processes: int) -> list[str]:
    """Writes `scores.json` from the processes' parts; returns the violations."""
    parts = [r for rank in range(processes) for r in json.loads((work / f"scores-{rank}.json").read_text())]
    order = {job: i for i, job in enumerate(_jobs())}
    parts.sort(key=lambda r: order[None if r["model"] == "base" else r["model"], r["task"], r["guidance_scale"]])
    write(assets, parts, len(file_captions(TASKS[0], "test")))
    return violations(parts)


if __name__ == "__main__":
    main()
