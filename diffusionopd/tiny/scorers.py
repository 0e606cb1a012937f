"""The rewards of the tiny world, under the ordinary scorer protocol (`diffusionopd.rewards.Scorer`).

`tiny_compose`, `tiny_ocr` and `tiny_scene` are the values that the demonstration reports; the keys beside them are
milder versions of the same, useful as training rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusionopd.rewards.base import UnfitPromptError, find_packages, unfit
from diffusionopd.rewards.images import Images, to_uint8
from diffusionopd.rewards.ocr import check_quotes
from diffusionopd.rewards.quotes import wanted_text
from diffusionopd.tiny.grammar import RELATIONS, SHAPES
from diffusionopd.tiny.render import PALETTE, SIGN_ROWS

Metadata = Sequence[Mapping[str, Any]]

# ----------------------------------------------------------------------------------------------------------- detection

_NEAR = 80.0  # Euclidean RGB distance within which a pixel has a palette colour
_SATURATED = 70  # max - min channel from which a pixel is no background
_MIN_AREA = 40  # pixels; the smallest object drawn has about 200
_MAX_ASPECT = 1.5
_MIN_OFFSET = 8.0  # pixels between two centres for a relation to hold
_OTHER = "other"


class Detection(NamedTuple):
    """A blob's colour, shape and centre in pixels."""

    color: str  # a palette colour, or "other"
    shape: str  # circle, square, triangle, or "other"
    x: float
    y: float


def detect(image: np.ndarray) -> list[Detection]:
    """Coloured blobs of a uint8 [H, W, 3] image: nearest palette colour, then connected components."""
    from scipy import ndimage

    pixels = image.astype(np.float64)
    distance = np.linalg.norm(pixels[:, :, None] - np.array(list(PALETTE.values()), dtype=np.float64), axis=-1)
    nearest, near = distance.argmin(-1), distance.min(-1) < _NEAR
    masks = {color: near & (nearest == i) for i, color in enumerate(PALETTE)}
    masks[_OTHER] = ~near & (pixels.max(-1) - pixels.min(-1) > _SATURATED)
    found = []
    for color, mask in masks.items():
        labels, _ = ndimage.label(mask)
        for i, window in enumerate(ndimage.find_objects(labels), start=1):
            blob = labels[window] == i
            if blob.sum() >= _MIN_AREA and not (color == _OTHER and min(blob.shape) < 5):  # a thin rim is antialiasing
                y, x = (part.start + size / 2 for part, size in zip(window, blob.shape, strict=True))
                found.append(Detection(color, _shape_of(blob), x, y))
    return found


def _shape_of(blob: np.ndarray) -> str:
    """Filled fraction of the bounding box: square 1, circle pi/4, triangle 1/2 (and narrow at the top)."""
    height, width = blob.shape
    if max(height, width) > _MAX_ASPECT * min(height, width):
        return _OTHER
    fraction = blob.sum() / blob.size
    if fraction > 0.89:
        return "square"
    top, bottom = (blob[rows].mean() for rows in (slice(0, height // 4), slice(-(height // 4), None)))
    if fraction < 0.68 and top < 0.45 and bottom > 0.7:
        return "triangle"
    return "circle" if fraction > 0.66 else _OTHER


def _related(subject: Detection, relation: str, reference: Detection) -> bool:
    """Image coordinates: y grows downwards."""
    dx, dy = subject.x - reference.x, subject.y - reference.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > max(_MIN_OFFSET, abs(across))


# ------------------------------------------------------------------------------------------------------------- compose


class TinyCompose:
    """`tiny_compose`: 1 where the image shows exactly what GenEval's metadata asks for and nothing else, otherwise 0.

    `tiny_compose_soft`: how far its conditions hold (each kind's count, each relation, nothing else), averaged.
    """

    @staticmethod
    def packages(options: Mapping[str, Any]) -> None:
        """Raises `ImportError` where a package is missing; loads none."""
        find_packages("scipy")

    @staticmethod
    def check(prompts: Sequence[str], metadata: Metadata) -> dict[int, str]:
        """As `unfit`: prompts without GenEval's metadata in the words of the tiny world."""
        return unfit(_included, prompts, metadata)

    def score(self, images: Images, prompts: Sequence[str], metadata: Metadata) -> dict[str, np.ndarray]:
        """Raises UnfitPromptError where a prompt has no such metadata."""
        include = [_included(*one) for one in zip(prompts, metadata, strict=True)]
        conditions = [_conditions(*one) for one in zip(to_uint8(images), include, strict=True)]
        return {
            "tiny_compose": np.array([float(all(c >= 1 for c in part)) for part in conditions]),
            "tiny_compose_soft": np.array([float(np.mean(part)) for part in conditions]),
        }


def _included(prompt: str, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects that a prompt asks for. Raises UnfitPromptError where its metadata does not say them."""
    try:
        include = metadata["include"]
        for entry in include:
            relation, reference = entry.get("position", (RELATIONS[0], 0))
            known = entry["color"] in PALETTE and entry["class"] in SHAPES and relation in RELATIONS
            if not (known and entry["count"] in range(1, 100) and reference in range(len(include))):
                raise ValueError(f"{entry} is no object of the tiny world")
        if not include:
            raise ValueError("'include' is empty")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        needed = '{"include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": ...}'
        raise UnfitPromptError(f"lacks metadata as of prompt_fn 'geneval' ({error!r}): {needed}", prompt) from error
    return include


def _conditions(image: np.ndarray, include: list[dict[str, Any]]) -> list[float]:
    """How far each condition of one prompt holds, each in [0, 1]."""
    found = detect(image)
    kinds = [(i["color"], i["class"]) for i in include]
    groups = [[d for d in found if (d.color, d.shape) == kind] for kind in kinds]
    # Two entries of the same kind share their detections, so counts are compared per kind.
    wanted = {kind: sum(i["count"] for i, other in zip(include, kinds, strict=True) if other == kind) for kind in kinds}
    seen = {kind: len(group) for kind, group in zip(kinds, groups, strict=True)}
    held = [max(0.0, 1 - abs(seen[kind] - count) / count) for kind, count in wanted.items()]
    for group, i in zip(groups, include, strict=True):
        if "position" in i:
            relation, reference = i["position"]
            held.append(float(any(_related(a, relation, b) for a in group for b in groups[reference] if a is not b)))
    return [*held, float(len(found) == sum(wanted.values()))]


# ----------------------------------------------------------------------------------------------------------------- ocr

_UPSCALE = 4
_READ_WIDTH = 112
"""Pixels: a sign is 110 wide at the recogniser's height. Its usual 320, of which the rest is padding, take twice as
long; of 1536 signs of trained models one was read differently, of 384 of the base 29 (score +.005)."""


class TinyOcr:
    """`tiny_ocr`: 1 where the sign reads exactly the quoted text, otherwise 0.

    `tiny_ocr_soft`: 1 - edit distance / length of the text, at least 0. Read by RapidOCR's recogniser (PP-OCR, ONNX,
    inside the package) on the rows of the sign.
    """

    def __init__(self) -> None:
        from rapidocr import RapidOCR

        threads = "EngineConfig.onnxruntime.intra_op_num_threads"
        params = {"Global.log_level": "error", threads: 1, "Rec.rec_img_shape": [3, 48, _READ_WIDTH]}
        self._engine = RapidOCR(params=params)

    @staticmethod
    def packages(options: Mapping[str, Any]) -> None:
        """Raises `ImportError` where a package is missing; loads none."""
        find_packages("rapidocr", "onnxruntime", "rapidfuzz")

    def read(self, image: np.ndarray) -> str:
        """The letters and digits on the sign of a uint8 [64, 64, 3] image."""
        strip = Image.fromarray(image[SIGN_ROWS[0] + 1 : SIGN_ROWS[1] - 1])
        large = strip.resize((strip.width * _UPSCALE, strip.height * _UPSCALE), Image.Resampling.BICUBIC)
        bgr = np.ascontiguousarray(np.asarray(large)[:, :, ::-1])
        output = self._engine(bgr, use_det=False, use_cls=False, use_rec=True)
        text = output.txts[0] if output.txts else ""
        return _letters(text)

    @staticmethod
    def check(prompts: Sequence[str], metadata: Metadata) -> dict[int, str]:
        """As `unfit`: prompts without letters or digits in quotes."""
        return check_quotes(prompts, metadata) | unfit(lambda prompt, _: _wanted_letters(prompt), prompts, metadata)

    def score(self, images: Images, prompts: Sequence[str], metadata: Metadata) -> dict[str, np.ndarray]:
        """1 for the number that the prompt quotes, else 0; softly, 1 less the edits per wanted character."""
        from rapidfuzz.distance import Levenshtein

        wanted = [_wanted_letters(prompt) for prompt in prompts]
        seen = [self.read(image) for image in to_uint8(images)]
        soft = [max(0.0, 1 - Levenshtein.distance(s, w) / len(w)) for s, w in zip(seen, wanted, strict=True)]
        exact = [float(s == w) for s, w in zip(seen, wanted, strict=True)]
        return {"tiny_ocr": np.array(exact), "tiny_ocr_soft": np.array(soft)}


def _letters(text: str) -> str:
    """Letters and digits alone; a lone round digit is at times read as the letter."""
    return "".join(c for c in text.upper() if c.isalnum()).replace("O", "0")


def _wanted_letters(prompt: str) -> str:
    if not (letters := _letters(wanted_text(prompt))):
        raise UnfitPromptError("has no letter or digit in quotes", prompt)
    return letters


# --------------------------------------------------------------------------------------------------------------- scene

_FULL_COLOURFULNESS = 110.0  # the most colourful clean scenes


class TinyScene:
    """`tiny_scene`: colourfulness by Hasler and Suesstrunk (2003), equation 8, as a fraction of 110, at most 1."""

    def score(self, images: Images, prompts: Sequence[str], metadata: Metadata) -> dict[str, np.ndarray]:
        """Colourfulness, whatever the prompt."""
        red, green, blue = np.moveaxis(to_uint8(images).astype(np.float64), -1, 0)
        opponents = np.stack([red - green, (red + green) / 2 - blue])
        spread = np.linalg.norm(opponents.std(axis=(2, 3)), axis=0)
        offset = np.linalg.norm(opponents.mean(axis=(2, 3)), axis=0)
        return {"tiny_scene": np.minimum(1.0, (spread + 0.3 * offset) / _FULL_COLOURFULNESS)}


class TinyDull(TinyScene):
    """`tiny_dull`: the opposite of `tiny_scene`, for worlds in which tasks fight."""

    def score(self, images: Images, prompts: Sequence[str], metadata: Metadata) -> dict[str, np.ndarray]:
        """1 less the colourfulness."""
        return {"tiny_dull": 1 - super().score(images, prompts, metadata)["tiny_scene"]}
