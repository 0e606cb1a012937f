"""Stage `check`: base and teachers scored on the 384 held-out prompts of each task (`scores.json`), the sample images
(`samples.png`), and size and sha256 of every shipped file (`manifest.json`).

Also holds what the demonstration relies on: the guidance of each teacher and the bounds that shipped weights must keep.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusion3Pipeline
from peft import PeftModel

from diffusionopd.files import sha256
from diffusionopd.rewards import Scorer, build_scorer
from diffusionopd.rewards.images import to_uint8
from diffusionopd.tiny import fit, flow
from diffusionopd.tiny.grammar import TASKS, Caption, file_captions
from diffusionopd.tiny.render import render
from diffusionopd.training.grids import sample_grid

STEPS = 10
SEED = 5
GUIDANCES = (1.0, 1.5, 2.0, 2.5)
#: Guidance of each teacher in the demonstration. The base and the student run at 1.
TEACHER_GUIDANCE = {"compose": 1.5, "ocr": 1.0, "scene": 1.0}
#: What each teacher reaches at least on its own task at its guidance, and by how much it beats the base.
TEACHER_BOUND = {"compose": 0.72, "ocr": 0.90, "scene": 0.70}
GAP_BOUND = 0.20
MANIFEST = "manifest.json"
_COLUMNS = 8

# -------------------------------------------------------------------------------------------------------------- scores


@cache
def _scorer(task: str) -> Scorer:
    return build_scorer(f"tiny_{task}")


@cache
def load(assets: Path, teacher: str | None = None) -> StableDiffusion3Pipeline:
    """The base pipeline, or one with a teacher's LoRA merged into it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(assets / "model", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if teacher is not None:
        adapted = PeftModel.from_pretrained(pipe.transformer, assets / "teachers" / teacher / "lora")
        pipe.transformer = adapted.merge_and_unload()
    return pipe


def score(
    pipe: StableDiffusion3Pipeline, task: str, guidance_scale: float, prompts: Sequence[Caption]
) -> dict[str, float]:
    """Mean scores of one image per prompt, sampled by the 10-step Euler ODE."""
    texts = [prompt.text for prompt in prompts]
    images = flow.generate(pipe, texts, guidance_scale, STEPS, SEED)
    scores = _scorer(task).score(images, texts, [prompt.metadata for prompt in prompts])
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


def measure(assets: Path, job: tuple[str | None, str, float]) -> dict[str, Any]:
    """Scores of one (teacher or None for the base, task, guidance), printed as they come."""
    fit.one_thread()
    teacher, task, guidance = job
    scores = score(load(assets, teacher), task, guidance, file_captions(task, "test"))
    record = {"model": teacher or "base", "task": task, "guidance_scale": guidance, "scores": scores}
    print(json.dumps(record), flush=True)
    return record


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


def write_scores(assets: Path, processes: int) -> list[str]:
    """Base and teachers at every guidance, teachers also on other tasks, into `scores.json`; returns the violations."""
    jobs = [(model and task, task, g) for model in (None, "own") for task in TASKS for g in GUIDANCES]
    jobs += [(teacher, task, TEACHER_GUIDANCE[teacher]) for teacher in TASKS for task in TASKS if task != teacher]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        records = list(pool.map(partial(measure, assets), jobs))
    about = {"sampler": f"Euler ODE, {STEPS} steps", "prompts_per_task": len(file_captions(TASKS[0], "test"))}
    content = about | {"seed": SEED, "teacher_guidance_scale": TEACHER_GUIDANCE, "results": records}
    (assets / "scores.json").write_text(json.dumps(content, indent=1) + "\n")
    return violations(records)


# -------------------------------------------------------------------------------------------------------- sample images


def draw(assets: Path, file: Path) -> None:
    """A PNG with a row each of clean, base and teacher images of the same held-out prompts, for every task."""
    images: list[np.ndarray] = []
    captions: list[str] = []
    for task in TASKS:
        prompts, rng = file_captions(task, "test")[:_COLUMNS], random.Random(0)
        texts = [prompt.text for prompt in prompts]
        rows = {
            "clean": np.stack([render(task, prompt, rng) for prompt in prompts]),
            "base": to_uint8(flow.generate(load(assets), texts, 1.0, STEPS, SEED)),
            "teacher": to_uint8(flow.generate(load(assets, task), texts, TEACHER_GUIDANCE[task], STEPS, SEED)),
        }
        images += rows.values()
        captions += [f"{name}: {text}" for name in rows for text in texts]
    sample_grid(np.concatenate(images), captions, file, columns=_COLUMNS)


# ------------------------------------------------------------------------------------------------------------ manifest


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Path below `folder` -> {"bytes", "sha256"} of every file but the manifest itself."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths}


def write_manifest(folder: Path) -> None:
    """Describes what is in `folder` in its manifest, so that what is shipped can be told from what others built."""
    (folder / MANIFEST).write_text(json.dumps({"files": describe(folder)}, indent=1) + "\n")
