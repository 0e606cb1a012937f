"""Images of the tiny world: 64x64, drawn at twice the size and averaged down.

Objects sit in fixed slots with a jitter of one pixel: a low-entropy layout that 2.4 M parameters learn in an hour.
"""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusionopd.tiny.grammar import Caption

RESOLUTION = 64
_SUPERSAMPLE = 2

PALETTE = {"red": (215, 35, 35), "green": (30, 160, 60), "blue": (40, 70, 215), "yellow": (235, 205, 30)}
_BACKGROUNDS = (205, 235)
_SLOTS = {
    1: ((32, 32),),
    2: ((16, 32), (48, 32)),
    3: ((16, 16), (48, 16), (32, 48)),
    4: ((16, 16), (48, 16), (16, 48), (48, 48)),
}
_UPRIGHT = ((32, 16), (32, 48))

#: Rows of the sign in an ocr image.
SIGN_ROWS = (17, 47)
_WALLS = ((70, 90, 120), (90, 110, 80), (120, 90, 80))
_DIGIT_X = (15, 32, 49)

_HILL_COLORS = {"green": (40, 160, 40), "brown": (150, 80, 30), "snowy": (235, 240, 250)}
_SUN_X = {"left": 12, "middle": 32, "right": 52}
_SUN_Y = {"high": 10, "low": 31}
#: Colour strength of a clean scene; the base model sees `dull_vividness` instead.
CLEAN_VIVIDNESS = (0.85, 1.0)


def render(task: str, caption: Caption, rng: random.Random, vividness: float | None = None) -> np.ndarray:
    """uint8 [64, 64, 3] image that does what `caption` says. `vividness` in [0, 1] holds for scenes only."""
    if task == "compose":
        return _render_compose(caption, rng)
    if task == "ocr":
        return _render_sign(caption, rng)
    return _render_scene(caption, rng, rng.uniform(*CLEAN_VIVIDNESS) if vividness is None else vividness)


def dull_vividness(rng: random.Random) -> float:
    """Mostly dull, now and then vivid: the scenes of the base model."""
    return rng.random() ** 4


def _canvas(color: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (RESOLUTION * _SUPERSAMPLE,) * 2, color)
    return image, ImageDraw.Draw(image)


def _scaled(*points: float) -> list[float]:
    return [p * _SUPERSAMPLE for p in points]


def _finish(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX))


# ------------------------------------------------------------------------------------------------------------- compose


def placed_things(caption: Caption) -> list[tuple[str, str, tuple[int, int]]]:
    """(colour, shape, slot centre) of everything in the image; of two joined by `and` the first is left."""
    include = caption.metadata["include"]
    things = [(i["color"], i["class"]) for i in include for _ in range(i["count"])]
    slots = _SLOTS[len(things)]
    if caption.metadata["tag"] == "position":
        relation = include[1]["position"][0]
        slots = _SLOTS[2] if relation in ("left of", "right of") else _UPRIGHT
        # include[1] is the subject: "left of" and "above" give it the first slot.
        slots = slots[::-1] if relation in ("left of", "above") else slots
    return [(color, shape, slot) for (color, shape), slot in zip(things, slots, strict=True)]


def _render_compose(caption: Caption, rng: random.Random) -> np.ndarray:
    image, pen = _canvas((rng.choice(_BACKGROUNDS),) * 3)
    things = placed_things(caption)
    radius = 11 if len(things) < 4 else 10
    for color, shape, (x, y) in things:
        _draw_shape(pen, shape, PALETTE[color], x + rng.randint(-1, 1), y + rng.randint(-1, 1), radius)
    return _finish(image)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, color: tuple[int, int, int], x: int, y: int, r: float) -> None:
    if shape == "circle":
        pen.ellipse(_scaled(x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        r *= 0.9  # about the circle's area
        pen.rectangle(_scaled(x - r, y - r, x + r, y + r), fill=color)
    else:
        pen.polygon(_scaled(x, y - r, x - r, y + r, x + r, y + r), fill=color)


# ----------------------------------------------------------------------------------------------------------------- ocr


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=26 * _SUPERSAMPLE)


def _render_sign(caption: Caption, rng: random.Random) -> np.ndarray:
    image, pen = _canvas(rng.choice(_WALLS))
    pen.rectangle(_scaled(4, SIGN_ROWS[0], 60, SIGN_ROWS[1]), fill=(245, 245, 240))
    for digit, x in zip(caption.metadata["text"], _DIGIT_X, strict=True):
        pen.text((x * _SUPERSAMPLE, 32 * _SUPERSAMPLE), digit, font=_font(), fill=(20, 20, 25), anchor="mm")
    return _finish(image)


# --------------------------------------------------------------------------------------------------------------- scene


def _render_scene(caption: Caption, rng: random.Random, vividness: float) -> np.ndarray:
    asked = caption.metadata
    side = RESOLUTION * _SUPERSAMPLE
    t = np.linspace(0, 1, side)[:, None, None]
    sky = np.array((30, 90, 225.0)) * (1 - t) + np.array((255, 150, 70.0)) * t
    image = Image.fromarray(np.broadcast_to(sky, (side, side, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    x, y = _SUN_X[asked["side"]] + rng.randint(-1, 1), _SUN_Y[asked["height"]] + rng.randint(-1, 1)
    pen.ellipse(_scaled(x - 7, y - 7, x + 7, y + 7), fill=(255, 225, 40))
    if asked["extra"] == "cloud":
        for dx, r in ((-7, 4), (0, 6), (7, 4)):
            center = (x + 32) % RESOLUTION + dx
            pen.ellipse(_scaled(center - r, 20 - r, center + r, 20 + r), fill=(250, 250, 250))
    phase = rng.choice((0.0, 3.1))
    ridge = [_scaled(x, 42 + 4 * math.sin(phase + 0.12 * x)) for x in range(RESOLUTION + 1)]
    outline = [_scaled(0, RESOLUTION), *ridge, _scaled(RESOLUTION, RESOLUTION)]
    pen.polygon(sum(outline, []), fill=_HILL_COLORS[asked["hills"]])
    if asked["extra"] != "cloud":
        _draw_on_ground(pen, asked["extra"], x=rng.choice((20, 44)))
    pixels = _finish(image).astype(np.float64)
    gray = pixels.mean(-1, keepdims=True) * 0.5 + 70
    return (gray + (pixels - gray) * (0.15 + 0.85 * vividness)).clip(0, 255).astype(np.uint8)


def _draw_on_ground(pen: ImageDraw.ImageDraw, extra: str, x: int) -> None:
    if extra == "tree":
        pen.rectangle(_scaled(x - 2, 48, x + 2, 58), fill=(95, 55, 25))
        pen.ellipse(_scaled(x - 8, 34, x + 8, 50), fill=(15, 95, 35))
    elif extra == "house":
        pen.rectangle(_scaled(x - 7, 47, x + 7, 59), fill=(245, 215, 160))
        pen.polygon(_scaled(x - 10, 47, x, 37, x + 10, 47), fill=(205, 40, 30))
    else:
        pen.ellipse(_scaled(x - 13, 51, x + 13, 60), fill=(40, 110, 230))
