"""Grids of images with a caption under each, as one PNG."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusionopd.files import write_atomically

_PADDING = 6  # pixels around an image and its caption
_FONT_SIZE, _LINE_HEIGHT = 12, 16  # pixels
_CAPTION_LINES = 4
_SMALLEST_CELL = 160  # pixels: narrower images are enlarged, or their captions could not be read


def sample_grid(
    images: np.ndarray, captions: Sequence[str], path: str | Path, title: str = "", columns: int | None = None
) -> Path:
    """Write images (uint8 [B, H, W, 3]) with a caption under each; return the path. OSError leaves what was there."""
    factor = math.ceil(_SMALLEST_CELL / images.shape[2])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width = images.shape[:3]
    columns = columns or math.ceil(math.sqrt(count))
    font = ImageFont.load_default(_FONT_SIZE)
    letters = int(0.92 * width / font.getlength("n"))
    lines = [textwrap.wrap(text, letters, max_lines=_CAPTION_LINES, placeholder="…") for text in captions]
    cell_width, cell_height = width + 2 * _PADDING, height + 3 * _PADDING + _LINE_HEIGHT * _CAPTION_LINES
    top = _LINE_HEIGHT + 2 * _PADDING if title else 0
    grid = Image.new("RGB", (columns * cell_width, top + math.ceil(count / columns) * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((_PADDING, _PADDING), title, fill="black", font=font)
    for i, (image, text) in enumerate(zip(images, lines, strict=True)):
        x, y = i % columns * cell_width + _PADDING, top + i // columns * cell_height + _PADDING
        grid.paste(Image.fromarray(image), (x, y))
        draw.text((x, y + height + _PADDING), "\n".join(text), fill="black", font=font)
    encoded = io.BytesIO()
    grid.save(encoded, format="PNG")  # given a file, Pillow does not notice when a full disk takes a part only
    return write_atomically(path, encoded.getvalue())
