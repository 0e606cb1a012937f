"""Images in every form a scorer may be given, brought to the one used inside; and how the models want them prepared.

Inside, images are uint8 `[B, H, W, 3]` arrays, RGB. Letters: B images, H height, W width in pixels, S side of the
square that a model sees.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

Images = Tensor | np.ndarray | Sequence[Image.Image]
"""`[B, 3, H, W]` tensor (uint8, or float in [0, 1]), `[B, H, W, 3]` uint8 array, or B PIL images."""

_OVERSHOOT = 0.5
"""How far floats may be outside [0, 1]: less than images of 0 to 255, or of -1 to 1, are."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's constants of each colour, for levels in [0, 1]."""


def to_uint8(images: Images) -> np.ndarray:
    """Images of one size as uint8 `[B, H, W, 3]`, RGB; an array of that form is returned as it is.

    Floats are rounded to the nearest of the 256 levels and clamped: a decoder overshoots [0, 1] by a little.

    Raises:
        ValueError: another shape or dtype, a value that is not finite or far outside [0, 1], PIL images of several
            sizes.
    """
    if isinstance(images, Tensor):
        images = images.detach()
        if images.is_floating_point():
            low, high = map(float, images.aminmax()) if images.numel() else (0.0, 0.0)
            if not math.isfinite(high - low):
                raise ValueError("an image tensor holds values that are not finite")
            if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
                raise ValueError(
                    f"an image tensor of floats holds values from {low:g} to {high:g}, not in [0, 1]: give levels of 0 "
                    "to 255 as uint8, and x / 2 + 0.5 of an x in [-1, 1]"
                )
            images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
        images = images.movedim(-3, -1).contiguous().cpu().numpy()
    elif not isinstance(images, np.ndarray):
        arrays = each_uint8(images)
        images = np.stack(arrays) if len(arrays) else np.zeros((0, 0, 0, 3), dtype=np.uint8)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            "images must be [B, 3, H, W] tensors, uint8 or float, uint8 [B, H, W, 3] arrays, or PIL images; these are "
            f"{images.dtype} {list(images.shape)} as [B, H, W, 3]"
        )
    return images


def each_uint8(images: Images) -> Sequence[np.ndarray]:
    """Images as uint8 `[H, W, 3]` arrays, for scorers that look at one at a time: PIL images may differ in size."""
    if isinstance(images, Tensor | np.ndarray):
        return list(to_uint8(images))
    return [np.asarray(image.convert("RGB")) for image in images]


def resize_and_crop(pixels: np.ndarray, side: int) -> Tensor:
    """`[3, S, S]` float32 of uint8 `[H, W, 3]`: shorter side to S by PIL's bicubic, centre crop, normalised.

    torchvision's `Resize` and `CenterCrop` as OpenAI's CLIP and ImageReward compose them: the longer side is cut to an
    integer, and half a pixel of offset goes to the even neighbour.
    """
    image = Image.fromarray(pixels)
    width, height = (int(side * length / min(image.size)) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return normalised(levels(resized.crop((left, top, left + side, top + side))))


def fit_and_pad(pixels: np.ndarray, side: int) -> Tensor:
    """`[3, S, S]` float32 of uint8 `[H, W, 3]`: uncropped, the longest side S, centred on black, normalised.

    open_clip's `ResizeMaxSize` as HPSv2 applies it, after the conversion to a tensor: bicubic with antialiasing on
    floats, which are neither rounded nor clamped. An odd row or column of padding goes below or to the right.
    """
    values = levels(pixels)
    height, width = (round(length * side / max(values.shape[1:])) for length in values.shape[1:])
    if (height, width) != values.shape[1:]:
        values = interpolate(values[None], (height, width), mode="bicubic", antialias=True)[0]
    top, left = (side - height) // 2, (side - width) // 2
    return normalised(pad(values, (left, side - width - left, top, side - height - top)))


def levels(pixels: np.ndarray | Image.Image) -> Tensor:
    """`[3, H, W]` float32 in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def normalised(values: Tensor) -> Tensor:
    """`[3, H, W]` levels less OpenAI's mean of each colour, over its deviation."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (CLIP_MEAN, CLIP_STD))
    return (values - mean) / std
