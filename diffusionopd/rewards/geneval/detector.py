"""Which detector finds the objects: the interface, the choice by name, and mmdetection itself as one of them."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Mask2FormerForUniversalSegmentation

from diffusionopd.files import located
from diffusionopd.rewards.base import RewardError, find_packages
from diffusionopd.rewards.geneval.convert import UNUSED, convert, read_checkpoint
from diffusionopd.rewards.geneval.mask2former import by_class, detect
from diffusionopd.rewards.geneval.rules import THRESHOLD, Detection
from diffusionopd.rewards.weights import load_pretrained

Detector = Callable[[np.ndarray], list[dict[str, list[Detection]]]]
"""Finds the objects in B images of one size, uint8 `[B, H, W, 3]`, RGB.

For each image GenEval's class name -> detections of a score above `rules.THRESHOLD`, in any order.
"""


def parse_choice(choice: str) -> tuple[str, str]:
    """Kind and name ("" for "converted") of a choice of `build_detector`'s. Raises `RewardError` for another."""
    kind, _, name = choice.partition(":")
    if choice != "converted" and not (kind in ("transformers", "mmdet") and name):
        raise RewardError(f"detector '{choice}' is none of converted, transformers:HUB_ID_OR_FOLDER, mmdet:CONFIG.py")
    return kind, name


def build_detector(choice: str, checkpoint: str, device: str, dtype: torch.dtype) -> Detector:
    """The detector of a choice.

    Args:
        choice: "converted", the official weights in transformers; "transformers:NAME", a Mask2Former of COCO instances
            as hub id or folder, whose scores are not GenEval's; "mmdet:CONFIG.py", the official weights in mmdetection.
        checkpoint: the official weights, mmdetection's .pth file.

    Raises:
        RewardError: no such choice; weights that are missing, with the command that fetches them, or that do not fit.
        ImportError: no scipy, without which transformers does not build the model.
    """
    kind, name = parse_choice(choice)
    if kind == "mmdet":
        return mmdet_detector(name, checkpoint, device)
    if kind == "converted":
        model = convert(checkpoint)
    else:
        warnings.warn(f"GenEval scores by the detector {name} are not comparable with published ones", stacklevel=3)
        model = load_model(name)
    return partial(detect, model.to(device, dtype).requires_grad_(False).eval())


def find_detector(choice: str) -> None:
    """Raises as `build_detector` where a package is missing; loads none."""
    kind, name = parse_choice(choice)
    if kind == "mmdet":
        with _mmdet_package(name):
            find_packages("mmdet")
    else:
        find_packages("scipy")


def load_model(name: str) -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former of COCO's 80 classes, from the hub or a folder. Raises `RewardError` as `build_detector`."""
    model = load_pretrained(Mask2FormerForUniversalSegmentation, "detector", name, unused=UNUSED)
    labels = model.config.id2label
    if (len(labels), labels[0], labels[len(labels) - 1]) != (80, "person", "toothbrush"):
        raise RewardError(f"detector '{name}' has other classes than COCO's 80 in order: give one of COCO instances")
    return model


def mmdet_detector(config: str, checkpoint: str, device: str) -> Detector:
    """`mmdet.apis.inference_detector`, of mmdetection 2 or 3, one image after the other.

    Args:
        config: mmdetection's configuration file (of the installed version).

    Raises:
        RewardError: no mmdetection, no such files, weights of another model.
    """
    with _mmdet_package(config):
        from mmdet import apis
    config, checkpoint = located(config), located(checkpoint)
    if not Path(config).is_file():
        raise RewardError(f"detector 'mmdet:{config}': there is no file {config}")
    weights = read_checkpoint(checkpoint)  # first: mmdetection would run what a pickle holds
    model = apis.init_detector(config, checkpoint, device=device)
    # mmdetection only prints which weights it did not find; a detector of random ones would give scores too.
    if differing := model.state_dict().keys() ^ weights.keys():
        raise RewardError(
            f"{checkpoint} does not fit the installed mmdetection: {len(differing)} entries differ, such as "
            f"{min(differing)}. Versions 2 and 3 have files of their own; the detector 'converted' takes that of 2"
        )
    # mmdetection takes arrays as BGR, as it reads files.
    return lambda pixels: [
        by_class(_instances(apis.inference_detector(model, image[:, :, ::-1].copy()))) for image in pixels
    ]


@contextmanager
def _mmdet_package(config: str) -> Iterator[None]:
    """mmdetection that is missing inside the block is a `RewardError`."""
    try:
        yield
    except ImportError as error:
        raise RewardError(
            f"detector 'mmdet:{config}' needs mmdetection, which cannot be imported: {error}. It runs in an "
            "environment of its own (https://mmdetection.readthedocs.io, mim install mmcv mmdet); "
            "the detector 'converted' has the same weights and needs none"
        ) from error


def _instances(result: Any) -> Iterator[tuple[int, Detection]]:
    """`(class index, detection)` of each instance above the threshold, from the result of either version."""
    rows: Iterable[tuple[int, Any, float, Any]]
    if hasattr(result, "pred_instances"):
        found = result.pred_instances.cpu().numpy()
        rows = zip(found.labels, found.bboxes, found.scores, found.masks, strict=True)
    else:  # mmdetection 2: a list over the classes of [n, 5], and one of n masks
        both = enumerate(zip(*result, strict=True))
        rows = ((i, row[:4], row[4], mask) for i, pair in both for row, mask in zip(*pair, strict=True))
    for label, box, score, mask in rows:
        if score > THRESHOLD:
            left, top, right, bottom = map(float, box)
            yield int(label), Detection((left, top, right, bottom), float(score), np.asarray(mask, dtype=bool))
