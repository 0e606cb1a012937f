"""The detector in mmdetection's own hands, for those who have an environment in which it runs."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from diffusionopd.rewards.base import RewardError
from diffusionopd.rewards.geneval.classes import CLASSES
from diffusionopd.rewards.geneval.convert import read_checkpoint
from diffusionopd.rewards.geneval.labels import check_labels
from diffusionopd.rewards.geneval.rules import THRESHOLD, Detection


class MmdetModel:
    """`mmdet.apis.inference_detector`, of mmdetection 2 or 3, one picture after the other."""

    def __init__(self, config: str, checkpoint: str, device: str):
        """Args: mmdetection's configuration file (of the installed version), the weights, where they run.

        Raises:
            RewardError: no mmdetection, no such files, weights or classes of another model.
        """
        try:
            from mmdet import apis
        except ImportError as error:
            raise RewardError(
                f"detector 'mmdet:{config}' needs mmdetection, which cannot be imported: {error}. It runs in an "
                "environment of its own (https://mmdetection.readthedocs.io, mim install mmcv mmdet); "
                "the detector 'converted' has the same weights and needs none"
            ) from error
        for path in (config, checkpoint):
            if not Path(path).is_file():
                raise RewardError(f"detector 'mmdet:{config}': there is no file {path}")
        self._infer = apis.inference_detector
        weights = read_checkpoint(Path(checkpoint))  # first: mmdetection would run what a pickle holds
        self.model = apis.init_detector(config, checkpoint, device=device)
        self._check_weights(checkpoint, weights)
        check_labels(f"mmdet:{config}", _class_names(self.model))

    def _check_weights(self, checkpoint: str, weights: Collection[str]) -> None:
        """mmdetection only prints which weights it did not find; a detector of random ones would give scores too."""
        differing = self.model.state_dict().keys() ^ set(weights)
        if differing:
            raise RewardError(
                f"{checkpoint} does not fit the installed mmdetection: {len(differing)} entries differ, such as "
                f"{min(differing)}. Versions 2 and 3 have files of their own; the detector 'converted' takes that of 2"
            )

    def detect(self, pixels: np.ndarray) -> list[dict[str, list[Detection]]]:
        """As `Detector.detect`. mmdetection takes arrays as BGR, as it reads files."""
        return [_objects(self._infer(self.model, np.ascontiguousarray(picture[:, :, ::-1]))) for picture in pixels]


def _class_names(model: Any) -> list[str]:
    meta = getattr(model, "dataset_meta", None)  # mmdetection 3
    return list(meta["classes"] if meta else model.CLASSES)


def _objects(result: Any) -> dict[str, list[Detection]]:
    objects: dict[str, list[Detection]] = {}
    for label, box, score, mask in _instances(result):
        if score > THRESHOLD:
            left, top, right, bottom = map(float, box)
            detection = Detection((left, top, right, bottom), float(score), np.asarray(mask, dtype=bool))
            objects.setdefault(CLASSES[int(label)], []).append(detection)
    return objects


def _instances(result: Any) -> list[tuple[int, Any, float, Any]]:
    """`(class index, box, score, mask)` of each instance, from the result of either version."""
    if hasattr(result, "pred_instances"):
        found = result.pred_instances.cpu().numpy()
        return list(zip(found.labels, found.bboxes, found.scores, found.masks, strict=True))
    boxes, masks = result  # mmdetection 2: a list over the classes of [n, 5], and one of n masks
    return [
        (label, row[:4], row[4], mask)
        for label in range(len(boxes))
        for row, mask in zip(boxes[label], masks[label], strict=True)
    ]
