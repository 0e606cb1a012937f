"""Where two objects are: the official rule of T2I-CompBench's 2D-spatial score, and a detector that finds them.

The rule is that of `UniDet_eval/2D_spatial_eval.py` of github.com/Karine-Huang/T2I-CompBench. Its detector, UniDet with
ResNeSt-200, exists for detectron2 only; here an OWLv2 is asked for the two objects by name.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer, Owlv2ForObjectDetection
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from diffusionopd.rewards.compbench.phrases import Spatial
from diffusionopd.rewards.weights import load_pretrained, load_tokenizer, scorer_dtype

DETECTOR = "google/owlv2-base-patch16-ensemble"
THRESHOLD = 0.1  # of OWLv2's scores; UniDet's are taken above 0.5
SHORT_SIDE, LONG_SIDE = 479, 480  # pixels of the image in which distances are measured
MOST_OVERLAP, NEAR = 0.1, 150.0  # intersection over union, and pixels
LEAST = 0.5  # a lower score is 0


@dataclass(frozen=True)
class Found:
    """The best detection of an object: its box in pixels (left, top, right, bottom) and its score."""

    box: tuple[float, float, float, float]
    score: float


Detector = Callable[[np.ndarray, Sequence[str]], Mapping[str, Found]]
"""Finds objects by name in a uint8 `[H, W, 3]` image; boxes as in an image of `frame_scale`."""


def frame_scale(height: int, width: int) -> float:
    """How much larger the image is in which distances are measured: shorter side 479, longer at most 480."""
    return min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))


def overlap(a: Found, b: Found) -> float:
    """Intersection over union of two boxes."""
    sides = [max(0.0, min(a.box[i + 2], b.box[i + 2]) - max(a.box[i], b.box[i])) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a.box, b.box)]
    both = math.prod(sides)
    return both / (sum(areas) - both)


def position_score(relation: str | None, first: Found, second: Found) -> float:
    """How well the first object stands to the second, 0 to 1."""
    x, y = ((second.box[i] + second.box[i + 2] - first.box[i] - first.box[i + 2]) / 2 for i in (0, 1))
    if relation in ("next to", "on side of", "near"):
        return 1.0 if min(abs(x), abs(y)) < NEAR else NEAR / max(abs(x), abs(y))
    along, across = {
        "on the right of": (-x, y), "on the left of": (x, y), "on the bottom of": (-y, x), "on the top of": (y, x),
    }.get(relation or "", (0.0, 0.0))  # fmt: skip
    if along <= abs(across):
        return 0.0
    shared = overlap(first, second)
    return 1.0 if shared < MOST_OVERLAP else MOST_OVERLAP / shared


def spatial_score(asked: Spatial, found: Mapping[str, Found]) -> float:
    """A quarter of each object's detection score, and half of their position's; 0 below one half."""
    first, second = (found.get(name) if name else None for name in (asked.first, asked.second))
    if not (first and second):
        return 0.0  # officially a quarter of the one that is there, and so below the least
    score = 0.25 * (first.score + second.score) + position_score(asked.relation, first, second) / 2
    return score if score >= LEAST else 0.0


@functools.cache
def load_detector(name: str, device: str, dtype: str) -> Detector:
    """An OWLv2 of a hub id or folder. Raises `RewardError` as `load_pretrained` and `load_tokenizer`."""
    number = scorer_dtype(dtype)
    warnings.warn(
        f"spatial relations are found by {name}, not by T2I-CompBench's own detector: these scores are not comparable "
        "with published ones",
        stacklevel=3,
    )
    model = load_pretrained(Owlv2ForObjectDetection, "detector", name)
    side = model.config.vision_config.image_size
    processor = Owlv2ImageProcessorPil(size={"height": side, "width": side})
    return functools.partial(_detect, model.to(device, number), processor, load_tokenizer(CLIPTokenizer, name))


@torch.no_grad()
def _detect(
    model: Owlv2ForObjectDetection,
    processor: Owlv2ImageProcessorPil,
    tokenizer: CLIPTokenizer,
    pixels: np.ndarray,
    names: Sequence[str],
) -> dict[str, Found]:
    """The best detection of each name, of those above the threshold."""
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return {}
    height, width = pixels.shape[:2]
    image = processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
    length = model.config.text_config.max_position_embeddings
    words = tokenizer(wanted, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    output = model(pixel_values=image.to(model.device, model.dtype), **words.to(model.device))
    scores = output.logits[0].float().sigmoid()  # [boxes, names]
    centre, size = output.pred_boxes[0].float().split(2, dim=-1)  # of the square that the image is padded to, in [0, 1]
    corners = (
        torch.cat([centre - size / 2, centre + size / 2], dim=-1) * max(height, width) * frame_scale(height, width)
    )
    found = {}
    for i, name in enumerate(wanted):
        own = scores[:, i] * (scores.argmax(dim=-1) == i)
        best = int(own.argmax())
        if own[best] > THRESHOLD:
            left, top, right, bottom = corners[best].tolist()
            found[name] = Found((left, top, right, bottom), float(own[best]))
    return found
