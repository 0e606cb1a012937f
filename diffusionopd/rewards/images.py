"""Pictures in every form a scorer may be given, brought to the one it wants.

Letters: B pictures, H height, W width in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

Images = torch.Tensor | np.ndarray | Sequence[Image.Image]
"""`[B, 3, H, W]` tensor (uint8, or float in [0, 1]), `[B, H, W, 3]` uint8 array, or PIL pictures of one size."""


def to_uint8(images: Images) -> np.ndarray:
    """Pictures as uint8 `[B, H, W, 3]`, RGB.

    Floats are rounded to the nearest of the 256 levels and clamped: a decoder overshoots [0, 1] by a little.

    Raises:
        ValueError: another shape or dtype, a value that is not finite, PIL pictures of several sizes.
    """
    if isinstance(images, torch.Tensor):
        return _tensor_to_uint8(images)
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"an image array must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}")
        return images
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"pictures of one batch differ in size: {sorted({image.size for image in images})}")
    return np.stack(arrays) if arrays else np.zeros((0, 0, 0, 3), dtype=np.uint8)


def _tensor_to_uint8(images: torch.Tensor) -> np.ndarray:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"an image tensor must be [B, 3, H, W], not {list(images.shape)}")
    images = images.detach()
    if images.is_floating_point():
        if not torch.isfinite(images).all():
            raise ValueError("an image tensor holds values that are not finite")
        images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    elif images.dtype != torch.uint8:
        raise ValueError(f"an image tensor must be uint8 or float, not {images.dtype}")
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(images: Images) -> list[Image.Image]:
    """Pictures as a list of B RGB PIL pictures; raises as `to_uint8`."""
    if not isinstance(images, torch.Tensor | np.ndarray):
        return [image.convert("RGB") for image in images]
    return [Image.fromarray(array) for array in to_uint8(images)]
