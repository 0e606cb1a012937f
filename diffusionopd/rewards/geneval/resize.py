"""`cv2.resize` of uint8 pictures, bilinear, as mmdetection resizes what it is given: the same to the last bit.

OpenCV interpolates bytes in fixed point and drops bits on the way, which makes pictures an eighth of a level darker on
average than rounded bilinear interpolation; its float path and torch do not.
"""

import torch
from torch import Tensor

_ONE = 1 << 11  # the unit of OpenCV's weights


def resize_bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 `[B, H, W, C]` to int32 `[B, height, width, C]` in [0, 255], without antialiasing."""
    rows, columns = pixels.shape[1:3]
    left, right, of_left, of_right = _neighbours(columns, width, pixels.device)
    values = pixels.int()
    # Rows keep 7 of the 11 bits of their weights, so that the next product fits; of that, 2 bits are left to round.
    values = (values[:, :, left] * of_left[:, None] + values[:, :, right] * of_right[:, None]) >> 4
    top, bottom, of_top, of_bottom = _neighbours(rows, height, pixels.device)
    of_top, of_bottom = of_top[:, None, None], of_bottom[:, None, None]
    return ((values[:, top] * of_top >> 16) + (values[:, bottom] * of_bottom >> 16) + 2) >> 2


def _neighbours(size: int, resized: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the pixels before and after each new one, and their weights in units of `1 / _ONE`: `[resized]`."""
    centres = ((torch.arange(resized, dtype=torch.float64) + 0.5) * (size / resized) - 0.5).float()
    before = centres.floor()
    share = centres - before
    first, second = before.long().clamp(0, size - 1), (before.long() + 1).clamp(0, size - 1)
    weights = ((1 - share) * _ONE).round().int(), (share * _ONE).round().int()
    return first.to(device), second.to(device), weights[0].to(device), weights[1].to(device)
