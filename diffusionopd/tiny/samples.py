"""`samples.png`: per task one row each of clean, base and teacher pictures of the same held-out prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont

from diffusionopd.rewards.images import to_uint8
from diffusionopd.tiny import check, flow
from diffusionopd.tiny.grammar import TASKS, Caption, file_captions
from diffusionopd.tiny.render import RESOLUTION, render

_COLUMNS = 8
_ZOOM = 2
_MARGIN = 84  # pixels left of a row, for its name
_HEADING = 26  # pixels above a picture, for its prompt


def draw(assets: Path) -> Image.Image:
    """A grid of `_COLUMNS` prompts a task under their captions."""
    base = check.load(assets)
    blocks = [_block(task, file_captions(task, "test")[:_COLUMNS], assets, base) for task in TASKS]
    sheet = Image.new("RGB", (blocks[0].width, sum(block.height for block in blocks)))
    for i, block in enumerate(blocks):
        sheet.paste(block, (0, i * block.height))
    return sheet


def _block(task: str, prompts: Sequence[Caption], assets: Path, base: StableDiffusion3Pipeline) -> Image.Image:
    cell = RESOLUTION * _ZOOM
    rows = _rows(task, prompts, assets, base)
    block = Image.new("RGB", (_MARGIN + len(prompts) * cell, _HEADING + len(rows) * cell), "white")
    pen, font = ImageDraw.Draw(block), ImageFont.load_default(size=11)
    for column, prompt in enumerate(prompts):
        pen.multiline_text((_MARGIN + column * cell + 2, 1), _wrapped(prompt.text), fill="black", font=font, spacing=0)
    for row, (name, pictures) in enumerate(rows.items()):
        y = _HEADING + row * cell
        pen.text((4, y + cell // 2 - 14), f"{task}\n{name}", fill="black", font=font)
        strip = Image.fromarray(np.concatenate(pictures, axis=1))
        block.paste(strip.resize((len(prompts) * cell, cell), Image.Resampling.NEAREST), (_MARGIN, y))
    return block


def _rows(
    task: str, prompts: Sequence[Caption], assets: Path, base: StableDiffusion3Pipeline
) -> dict[str, list[np.ndarray]]:
    """Name -> uint8 [64, 64, 3] picture of each prompt."""
    rng, texts = random.Random(0), [p.text for p in prompts]
    teacher, guidance = check.load(assets, task), check.TEACHER_GUIDANCE[task]
    return {
        "clean": [render(task, p, rng) for p in prompts],
        "base": list(to_uint8(flow.generate(base, texts, 1.0, check.STEPS, check.SEED))),
        "teacher": list(to_uint8(flow.generate(teacher, texts, guidance, check.STEPS, check.SEED))),
    }


def _wrapped(text: str, width: int = 22) -> str:
    """At most two lines; the opening that every caption of a task shares is left out."""
    text = text.removeprefix("a photo of ").removeprefix("a landscape with ")
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width + 1)
    return text[:cut] + "\n" + text[cut + 1 :]
