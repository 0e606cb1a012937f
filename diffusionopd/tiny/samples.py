"""`samples.png`: per task one row each of clean, base and teacher pictures of the same held-out prompts."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusionopd.tiny import check, flow
from diffusionopd.tiny.grammar import TASKS, file_captions
from diffusionopd.tiny.render import RESOLUTION, render

_COLUMNS = 8
_ZOOM = 2
_MARGIN = 84  # pixels left of a row, for its name
_HEADING = 26  # pixels above a picture, for its prompt


def draw(assets: Path) -> Image.Image:
    """A grid of `_COLUMNS` prompts a task under their captions."""
    cell = RESOLUTION * _ZOOM
    block = _HEADING + 3 * cell
    sheet = Image.new("RGB", (_MARGIN + _COLUMNS * cell, len(TASKS) * block), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    base = check.load(assets)
    for i, task in enumerate(TASKS):
        prompts = file_captions(task, "test")[:_COLUMNS]
        texts = [p.text for p in prompts]
        rng = random.Random(0)
        rows = {
            "clean": np.stack([render(task, p, rng) for p in prompts]),
            "base": _array(flow.generate(base, texts, 1.0, check.STEPS, check.SEED)),
            "teacher": _array(
                flow.generate(check.load(assets, task), texts, check.TEACHER_GUIDANCE[task], check.STEPS, check.SEED)
            ),
        }
        for column, text in enumerate(texts):
            pen.multiline_text(
                (_MARGIN + column * cell + 2, i * block + 1), _wrapped(text), fill="black", font=font, spacing=0
            )
        for row, (name, pictures) in enumerate(rows.items()):
            y = i * block + _HEADING + row * cell
            pen.text((4, y + cell // 2 - 14), f"{task}\n{name}", fill="black", font=font)
            for column, picture in enumerate(pictures):
                large = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
                sheet.paste(large, (_MARGIN + column * cell, y))
    return sheet


def _array(pictures: torch.Tensor) -> np.ndarray:
    """uint8 [N, 3, 64, 64] -> [N, 64, 64, 3]."""
    return pictures.permute(0, 2, 3, 1).numpy()


def _wrapped(text: str, width: int = 25) -> str:
    """At most two lines; the opening that every caption of a task shares is left out."""
    text = text.removeprefix("a photo of ").removeprefix("a landscape with ")
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width + 1)
    return text[:cut] + "\n" + text[cut + 1 :]
