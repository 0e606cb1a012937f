"""Size of the JPEG file: the two rewards that need no model (DDPO, arXiv 2305.13301, section 5.1)."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusionopd.rewards.base import NOT_APPLICABLE, Scores
from diffusionopd.rewards.images import Images, each_uint8

QUALITY = 95


class JpegIncompressibility:
    """Size in kB (1000 bytes) at quality 95: rewards detail."""

    name, sign = "jpeg_incompressibility", 1

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`."""
        sizes = []
        for pixels in each_uint8(images):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
            sizes.append(buffer.tell() / 1000)
        scores = self.sign * np.array(sizes, dtype=np.float64)
        scores[scores == NOT_APPLICABLE] += 1e-6  # of 10,000 bytes, and a score all the same
        return {self.name: scores}


class JpegCompressibility(JpegIncompressibility):
    """Minus the size in kB: rewards smoothness."""

    name, sign = "jpeg_compressibility", -1
