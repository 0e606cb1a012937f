"""A gallery: rows are prompts and seeds, columns are models, every row is drawn from one noise."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from tools.report.pages import render_page, shown

LARGEST = 512  # pixels: larger images are shrunk to this


class Drawn(NamedTuple):
    """A column: the model, its images of all rows, uint8 `[H, W, 3]` each, and what is to be known of it."""

    title: str
    images: Iterable[np.ndarray]
    note: str = ""


def render_gallery(
    title: str,
    rows: Sequence[tuple[str, str]],
    columns: Iterable[Drawn],
    facts: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    table: Sequence[Sequence[str]] = (),
) -> str:
    """The page as one HTML document that refers to nothing outside itself.

    Args:
        rows: caption, which is shown once where several rows in turn have it, and what tells them apart, like the seed.
        columns: asked for one after the other, so that the images of a single one need to be in memory.
        facts: (name, value) pairs at the end.
        notes: sentences above the images, and above the table.
        table: a head, rows and a last one that sums up, above the images.
    """
    drawn = [
        (each.title, each.note, [shown(Image.fromarray(image), LARGEST) for image in each.images]) for each in columns
    ]
    repeated = [before[0] == row[0] for before, row in zip([("", ""), *rows], rows, strict=False)]
    body = list(zip(rows, repeated, zip(*(images for *_, images in drawn), strict=True), strict=True))
    heads = [(name, note) for name, note, _ in drawn]
    values = {"heads": heads, "rows": body, "facts": facts, "notes": notes, "table": table}
    return render_page("gallery.html.j2", title=title, **values)
