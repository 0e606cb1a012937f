"""Grids of images with a caption under each, as one PNG."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusionopd.files import write_atomically

_PADDING = 6  # pixels around an image and its caption
_FONT_SIZE = 12  # pixels
_CAPTION_LINES = 4
_SMALLEST_CELL = 160  # pixels: narrower images are enlarged, or their captions could not be read


def sample_grid(
    images: np.ndarray, captions: Sequence[str], path: str | Path, columns: int | None = None, title: str = ""
) -> Path:
    """Write images (uint8 [B, H, W, 3]) with a caption under each; return the path. OSError leaves what was there.

    `columns` defaults to a nearly square grid.
    """
    factor = max(1, math.ceil(_SMALLEST_CELL / images.shape[2]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width = images.shape[:3]
    columns = columns or math.ceil(math.sqrt(count))
    font = ImageFont.load_default(_FONT_SIZE)
    line_height = _FONT_SIZE + 3
    texts = [_wrapped(caption, width, font) for caption in captions]
    cell = (width + 2 * _PADDING, height + 3 * _PADDING + line_height * max(len(text) for text in texts))
    top = line_height + 2 * _PADDING if title else 0
    grid = Image.new("RGB", (columns * cell[0], top + math.ceil(count / columns) * cell[1]), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((_PADDING, _PADDING), title, fill="black", font=font)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = i % columns * cell[0] + _PADDING, top + i // columns * cell[1] + _PADDING
        grid.paste(Image.fromarray(image), (x, y))
        for n, line in enumerate(text):
            draw.text((x, y + height + _PADDING + n * line_height), line, fill="black", font=font)
    encoded = io.BytesIO()
    grid.save(encoded, format="PNG")  # given a file, Pillow does not notice when a full disk takes a part only
    return write_atomically(path, encoded.getvalue())


def _wrapped(caption: str, width: int, font: Any) -> list[str]:
    """The caption as lines of about `width` pixels, by its own average letter, cut after a few of them."""
    letter = font.getlength(caption) / max(len(caption), 1)
    per_line = max(4, int(0.92 * width / max(letter, 1.0)))
    return textwrap.wrap(caption, per_line, max_lines=_CAPTION_LINES, placeholder="…") or [""]
