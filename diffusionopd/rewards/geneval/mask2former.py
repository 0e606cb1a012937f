"""Mask2Former as mmdetection runs it: its resizing, normalisation and padding, its way from logits to instances.

transformers' own `post_process_instance_segmentation` is another rule: it resizes to 384 x 384 first and does not
know of padding. Letters: B images, Q queries, C classes, K instances, H and W the size of the image in pixels,
h and w of what the model sees.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from diffusionopd.rewards.geneval.classes import CLASSES
from diffusionopd.rewards.geneval.rules import THRESHOLD, Detection

LONG_SIDE, SHORT_SIDE, DIVISOR = 1333, 800, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB in [0, 255]
MAX_INSTANCES = 100

_ONE = 1 << 11  # the unit of OpenCV's weights

Size = tuple[int, int]


def resized_size(height: int, width: int) -> Size:
    """The largest size of the same shape within 1333 x 800, rounded to whole pixels."""
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 `[B, H, W, C]` to int32 `[B, height, width, C]` in [0, 255]: `cv2.resize`, bilinear, to the last bit.

    OpenCV interpolates bytes in fixed point and drops bits on the way, which makes images an eighth of a level darker
    on average than rounded bilinear interpolation; its float path and torch do not. There is no antialiasing.
    """
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


def preprocess(pixels: Tensor) -> tuple[Tensor, Size]:
    """uint8 `[B, H, W, 3]` RGB to float32 `[B, 3, h, w]`, and the size without the padding.

    Resized as OpenCV does, normalised, and padded with zeros at the right and the bottom to multiples of 32.
    """
    size = resized_size(pixels.shape[1], pixels.shape[2])
    images = resize_bilinear(pixels, *size).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    bottom, right = -size[0] % DIVISOR, -size[1] % DIVISOR
    return F.pad((images - mean) / std, (0, right, 0, bottom)), size


def instances(
    class_logits: Tensor, mask_logits: Tensor, padded: Size, resized: Size, original: Size, floor: float
) -> list[tuple[int, Detection]]:
    """The instances of one image, as `(class index, detection)`.

    Of all pairs of query and class the `MAX_INSTANCES` most probable are instances. Their score is the probability
    times the mean of the sigmoid within the mask, and the mask is where its logit, resized to the padded input, cut to
    the image and resized to the original, is positive. As the second factor is below 1, pairs up to `floor` are
    left out before their masks are resized: nothing above `floor` is lost, and few masks are large.

    Args:
        class_logits: `[Q, C + 1]`, "no object" last.
        mask_logits: `[Q, h / 4, w / 4]`.
        padded, resized, original: (height, width) of the model's input, of the image in it, of the image.
    """
    probabilities = class_logits.float().softmax(dim=-1)[:, :-1]
    count = min(MAX_INSTANCES, probabilities.numel())
    best, index = probabilities.flatten().topk(count)
    best, index = best[best > floor], index[best > floor]
    if len(index) == 0:
        return []
    query, label = index // probabilities.shape[1], index % probabilities.shape[1]
    logits = _resize(mask_logits[query].float(), padded)[:, : resized[0], : resized[1]]
    logits = _resize(logits, original)
    masks = logits > 0
    scores = best * (logits.sigmoid() * masks).sum(dim=(1, 2)) / (masks.sum(dim=(1, 2)) + 1e-6)
    found = zip(label.tolist(), scores.tolist(), masks.cpu().numpy(), strict=True)
    return [(name, Detection(bounding_box(mask), score, mask)) for name, score, mask in found if score > floor]


def _resize(logits: Tensor, size: Size) -> Tensor:
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


def bounding_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box (left, top, right, bottom), right and bottom exclusive, of a bool `[H, W]` mask not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def by_class(found: Iterable[tuple[int, Detection]]) -> dict[str, list[Detection]]:
    """`(class index, detection)` of one image as GenEval's class name -> detections."""
    objects: dict[str, list[Detection]] = {}
    for label, detection in found:
        objects.setdefault(CLASSES[label], []).append(detection)
    return objects


@torch.no_grad()
def detect(model: Mask2FormerForUniversalSegmentation, pixels: np.ndarray) -> list[dict[str, list[Detection]]]:
    """What a frozen model of COCO's 80 classes finds in uint8 `[B, H, W, 3]` images, as a `detector.Detector` does."""
    images, resized = preprocess(torch.from_numpy(pixels).to(model.device))
    padded, original = (images.shape[2], images.shape[3]), (pixels.shape[1], pixels.shape[2])
    outputs = model(pixel_values=images.to(model.dtype))
    logits = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
    return [by_class(instances(*pair, padded, resized, original, THRESHOLD)) for pair in logits]
