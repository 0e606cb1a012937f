"""A page is one HTML file that refers to nothing outside itself: templates, which escape their values, and images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

THUMBNAIL = 256  # pixels: larger images are shrunk to this
PIXELS = THUMBNAIL // 2  # pixels: of images up to this the pixels are visible

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(template: str, **values: Any) -> str:
    """A page by one of the templates beside this file."""
    return _TEMPLATES.get_template(template).render(**values)


def image_of(file: Path) -> dict[str, str]:
    """An image's attributes: a small one as it is, with its pixels visible, a large one shrunk. Raises OSError."""
    with Image.open(file) as opened:
        if opened.format == "JPEG" and max(opened.size) <= PIXELS:
            return {"src": data_uri("image/jpeg", file.read_bytes()), "class": "pixels"}
        return shown(opened.convert("RGB"), THUMBNAIL)


def shown(image: Image.Image, most: int) -> dict[str, str]:
    """An RGB image's attributes, shrunk to at most ``most`` pixels a side, which may be done to ``image`` itself."""
    kind = "pixels" if max(image.size) <= PIXELS else ""
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    image.save(buffer := io.BytesIO(), format="JPEG", quality=90)
    return {"src": data_uri("image/jpeg", buffer.getvalue()), "class": kind}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a text table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def data_uri(kind: str, content: bytes) -> str:
    """The bytes of a file of MIME type `kind`, as an address to refer to."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
