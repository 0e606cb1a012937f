"""Stage `check`: base and teachers scored on the 384 held-out prompts of each task (`scores.json`), the sample images
(`samples.png`), and size and sha256 of every shipped file (`manifest.json`).

Also holds what the demonstration relies on: the guidance of each teacher and the bounds that shipped weights must keep.
"""

from __future__ import annotations

import hashlib
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
from PIL import Image, ImageDraw, ImageFont

from diffusionopd.rewards import Scorer, build_scorer
from diffusionopd.rewards.images import to_uint8
from diffusionopd.tiny import fit, flow
from diffusionopd.tiny.grammar import TASKS, Caption, file_captions
from diffusionopd.tiny.render import RESOLUTION, render

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
_ZOOM = 2
_MARGIN = 84  # pixels left of a row, for its name
_HEADING = 26  # pixels above an image, for its prompt

Scores = dict[str, float]
Job = tuple[str | None, str, float]  # teacher (None: the base), task, guidance scale

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
    pipe: StableDiffusion3Pipeline, task: str, guidance_scale: float, prompts: Sequence[Caption], seed: int = SEED
) -> Scores:
    """Mean scores of one image per prompt, sampled by the 10-step Euler ODE."""
    texts = [prompt.text for prompt in prompts]
    images = flow.generate(pipe, texts, guidance_scale, STEPS, seed)
    scores = _scorer(task).score(images, texts, [prompt.metadata for prompt in prompts])
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


def _jobs() -> list[Job]:
    """(teacher, task, guidance): base and teachers at every guidance, teachers also on other tasks."""
    base: list[Job] = [(None, task, g) for task in TASKS for g in GUIDANCES]
    own: list[Job] = [(teacher, teacher, g) for teacher in TASKS for g in GUIDANCES]
    other: list[Job] = [
        (teacher, task, TEACHER_GUIDANCE[teacher]) for teacher in TASKS for task in TASKS if task != teacher
    ]
    return base + own + other


def measure(assets: Path, job: Job) -> dict[str, Any]:
    """Scores of one (teacher, task, guidance), printed as they come."""
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
    """Measure everything into `scores.json`; returns the violations."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        records = list(pool.map(partial(measure, assets), _jobs()))
    about = {"sampler": f"Euler ODE, {STEPS} steps", "prompts_per_task": len(file_captions(TASKS[0], "test"))}
    content = about | {"seed": SEED, "teacher_guidance_scale": TEACHER_GUIDANCE, "results": records}
    (assets / "scores.json").write_text(json.dumps(content, indent=1) + "\n")
    return violations(records)


# -------------------------------------------------------------------------------------------------------- sample images


def draw(assets: Path) -> Image.Image:
    """Per task one row each of clean, base and teacher images of the same `_COLUMNS` held-out prompts."""
    base = load(assets)
    blocks = [_block(task, file_captions(task, "test")[:_COLUMNS], assets, base) for task in TASKS]
    sheet = Image.new("RGB", (blocks[0].width, sum(block.height for block in blocks)))
    for i, block in enumerate(blocks):
        sheet.paste(block, (0, i * block.height))
    return sheet


def _block(task: str, prompts: Sequence[Caption], assets: Path, base: StableDiffusion3Pipeline) -> Image.Image:
    cell, rng, texts = RESOLUTION * _ZOOM, random.Random(0), [p.text for p in prompts]
    teacher, guidance = load(assets, task), TEACHER_GUIDANCE[task]
    rows: dict[str, list[np.ndarray]] = {  # uint8 [64, 64, 3] each
        "clean": [render(task, p, rng) for p in prompts],
        "base": list(to_uint8(flow.generate(base, texts, 1.0, STEPS, SEED))),
        "teacher": list(to_uint8(flow.generate(teacher, texts, guidance, STEPS, SEED))),
    }
    block = Image.new("RGB", (_MARGIN + len(prompts) * cell, _HEADING + len(rows) * cell), "white")
    pen, font = ImageDraw.Draw(block), ImageFont.load_default(size=11)
    for column, text in enumerate(texts):
        pen.multiline_text((_MARGIN + column * cell + 2, 1), _wrapped(text), fill="black", font=font, spacing=0)
    for row, (name, images) in enumerate(rows.items()):
        y = _HEADING + row * cell
        pen.text((4, y + cell // 2 - 14), f"{task}\n{name}", fill="black", font=font)
        strip = Image.fromarray(np.concatenate(images, axis=1))
        block.paste(strip.resize((len(prompts) * cell, cell), Image.Resampling.NEAREST), (_MARGIN, y))
    return block


def _wrapped(text: str, width: int = 22) -> str:
    """At most two lines; the opening that every caption of a task shares is left out."""
    text = text.removeprefix("a photo of ").removeprefix("a landscape with ")
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width + 1)
    return text[:cut] + "\n" + text[cut + 1 :]


# ------------------------------------------------------------------------------------------------------------ manifest


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Path below `folder` -> {"bytes", "sha256"} of every file but the manifest itself."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    }


def write_manifest(folder: Path) -> None:
    """Describes what is in `folder` in its manifest, so that what is shipped can be told from what others built."""
    (folder / MANIFEST).write_text(json.dumps({"files": describe(folder)}, indent=1) + "\n")
