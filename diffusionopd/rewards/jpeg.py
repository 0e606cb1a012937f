"""Size of the JPEG file: the two rewards that need no model (DDPO, arXiv 2305.13301, section 5.1)."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusionopd.rewards.base import Scores
from diffusionopd.rewards.images import Images, to_pil

QUALITY = 95


def jpeg_kilobytes(images: Images) -> np.ndarray:
    """Size in kB (1000 bytes) of each picture saved as JPEG at quality 95: float64 `[B]`."""
    sizes = []
    for image in to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes, dtype=np.float64)


class JpegIncompressibility:
    """Size in kB: rewards detail."""

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"jpeg_incompressibility": jpeg_kilobytes(images)}


class JpegCompressibility:
    """Minus the size in kB: rewards smoothness."""

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        return {"jpeg_compressibility": -jpeg_kilobytes(images)}
