"""How CLIP, HPSv2 and ImageReward prepare a picture, without torchvision.

Letters: S side of the square that the model sees.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's constants of each colour, for levels in [0, 1]."""


def fit_and_pad(picture: Image.Image, side: int) -> Tensor:
    """`[3, S, S]` float32: the whole picture, its longest side S, centred on black, normalised.

    open_clip's `ResizeMaxSize` as HPSv2 applies it, after the conversion to a tensor: bicubic with antialiasing on
    floats, which are neither rounded nor clamped. An odd row or column of padding goes below or to the right.
    """
    levels = _levels(picture)
    height, width = (round(length * side / max(picture.size)) for length in levels.shape[1:])
    if (height, width) != levels.shape[1:]:
        levels = interpolate(levels[None], (height, width), mode="bicubic", antialias=True)[0]
    top, left = (side - height) // 2, (side - width) // 2
    return _normalised(pad(levels, (left, side - width - left, top, side - height - top)))


def resize_and_crop(picture: Image.Image, side: int) -> Tensor:
    """`[3, S, S]` float32: shorter side to S by PIL's bicubic, centre crop, normalised.

    torchvision's `Resize` and `CenterCrop` as OpenAI's CLIP and ImageReward compose them: the longer side is cut to an
    integer, and half a pixel of offset goes to the even neighbour.
    """
    width, height = (int(side * length / min(picture.size)) for length in picture.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return _normalised(_levels(resized.crop((left, top, left + side, top + side))))


def _levels(picture: Image.Image) -> Tensor:
    """`[3, H, W]` float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _normalised(levels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (levels - mean) / std
