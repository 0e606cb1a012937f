"""Signs that a student collapses: it draws one picture for all, or its LoRA has outgrown the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

KINDS = ("diversity", "prompt_diversity")
_SIZE = 32  # pixels a side at which images are compared: layout and colour count, not texture
# Measured in the tiny world (docs/resume.md).
_LEAST_SHARE, _LARGEST_NORM = 0.3, 1.0


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Images (uint8 ``[B, H, W, 3]``) as they are compared: float32 ``[B, 3, 32, 32]`` in [0, 1]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return nn.functional.adaptive_avg_pool2d(pixels, _SIZE).numpy()


def diversities(small: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, float]:
    """Mean distance of all pairs of different prompts (``diversity``) and of one prompt (``prompt_diversity``), if any.

    The distance of two thumbnails is the root mean square of their difference; black and white are 1 apart.
    """
    flat = torch.from_numpy(np.stack(small)).flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    codes = torch.tensor([texts.index(text) for text in texts])
    alike, pairs = codes[:, None] == codes, torch.ones_like(distances).triu(1).bool()
    chosen = zip(KINDS, (distances[pairs & ~alike], distances[pairs & alike]), strict=True)
    return {name: values.mean().item() for name, values in chosen if len(values)}


class Signs:
    """Says when a round's metrics look like a collapse, once until they no longer do."""

    def __init__(self, first: Mapping[str, float]) -> None:
        """``first``: the diversities of the run's first monitored round, as far as it had one; kept in ``first``."""
        self.first = dict(first)
        self._said: set[str] = set()

    def of(self, row: Mapping[str, Any]) -> list[str]:
        """What is to be said about a round's metrics."""
        found = {}
        for name, value in row.items():
            if name.split("/")[0] in KINDS:
                first = self.first.setdefault(name, value)
                if value < _LEAST_SHARE * first:
                    found[name] = f"{name} is {value:.3g}, and was {first:.3g} at first: images become alike"
        if (norm := row.get("lora_norm", 0.0)) > _LARGEST_NORM:
            found["lora_norm"] = f"lora_norm is {norm:.3g}: the LoRA adds more than the base's own matrices are"
        new = [found[name] for name in found if name not in self._said]
        self._said = (self._said - row.keys()) | found.keys()
        return new
