"""The colour of an object, named by CLIP (ViT-L/14 in GenEval) from what its mask cuts out of the picture."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from diffusionopd.rewards.clip import Clip
from diffusionopd.rewards.geneval.classes import COLOURS
from diffusionopd.rewards.geneval.rules import Detection

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = (0x99, 0x99, 0x99)
"""RGB around the object."""


def crop(pixels: np.ndarray, detection: Detection) -> Image.Image:
    """The object's pixels on `BACKGROUND`, cut to its box.

    Args:
        pixels: uint8 `[H, W, 3]`, RGB.
        detection: its mask is not empty; an empty one has no mask score, and never is an object.
    """
    pasted = np.where(detection.mask[..., None], pixels, np.array(BACKGROUND, dtype=np.uint8))
    left, top, right, bottom = (round(edge) for edge in detection.box)
    return Image.fromarray(np.ascontiguousarray(pasted[top:bottom, left:right]))


class ColourClassifier:
    """CLIP's zero-shot classifier over GenEval's ten colours, one for each class name."""

    def __init__(self, clip: Clip):
        """Args: `clip`, frozen."""
        self.clip = clip
        self._weights: dict[str, torch.Tensor] = {}

    def class_weights(self, name: str) -> torch.Tensor:
        """`[10, P]` float32: the unit text embeddings of a colour's three templates, averaged, of unit length again."""
        if name not in self._weights:
            prompts = [text.format(colour=colour, name=name) for colour in COLOURS for text in TEMPLATES]
            embeddings = self.clip.text_embeddings(prompts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._weights[name] = torch.nn.functional.normalize(embeddings.mean(dim=1), dim=-1)
        return self._weights[name]

    def __call__(self, pixels: np.ndarray, name: str, detections: Sequence[Detection]) -> list[str]:
        """The colour of each detection of class `name` in a uint8 `[H, W, 3]` RGB picture."""
        crops = [crop(pixels, detection) for detection in detections]
        cosines = self.clip.image_embeddings(crops) @ self.class_weights(name).T
        return [COLOURS[best] for best in cosines.argmax(dim=-1).tolist()]
