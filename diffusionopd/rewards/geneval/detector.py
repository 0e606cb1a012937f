"""Which detector finds the objects: the interface, the choice by name, and mmdetection itself as one of them."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import Mask2FormerForUniversalSegmentation

from diffusionopd.rewards.base import RewardError
from diffusionopd.rewards.geneval.classes import COCO
from diffusionopd.rewards.geneval.convert import check_entries, converted_folder, read_checkpoint
from diffusionopd.rewards.geneval.mask2former import Mask2Former, by_class
from diffusionopd.rewards.geneval.rules import THRESHOLD, Detection


class Detector(Protocol):
    """Finds objects of GenEval's classes."""

    def detect(self, pixels: np.ndarray) -> list[dict[str, list[Detection]]]:
        """The objects in B images of one size.

        Args:
            pixels: uint8 `[B, H, W, 3]`, RGB.

        Returns:
            For each image, GenEval's class name -> detections of a score above `rules.THRESHOLD`, in any order.
        """
        ...


# Pascal VOC's words, which some published COCO models carry.
_OTHER_WORDS = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def check_labels(source: str, labels: Sequence[str]) -> None:
    """Raises `RewardError` unless the labels of a detector, by output index, are COCO's 80 classes in order."""
    given = [_OTHER_WORDS.get(label, label) for label in labels]
    if len(given) != len(COCO):
        raise RewardError(f"detector '{source}' has {len(given)} classes, not COCO's 80: give one of COCO instances")
    for i, (label, name) in enumerate(zip(given, COCO, strict=True)):
        if label != name:
            raise RewardError(f"detector '{source}' calls class {i} '{labels[i]}', which is '{name}' in COCO's order")


class MmdetModel:
    """`mmdet.apis.inference_detector`, of mmdetection 2 or 3, one image after the other."""

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
        weights = read_checkpoint(checkpoint)  # first: mmdetection would run what a pickle holds
        self.model = apis.init_detector(config, checkpoint, device=device)
        # mmdetection only prints which weights it did not find; a detector of random ones would give scores too.
        if differing := self.model.state_dict().keys() ^ set(weights):
            raise RewardError(
                f"{checkpoint} does not fit the installed mmdetection: {len(differing)} entries differ, such as "
                f"{min(differing)}. Versions 2 and 3 have files of their own; the detector 'converted' takes that of 2"
            )

    def detect(self, pixels: np.ndarray) -> list[dict[str, list[Detection]]]:
        """As `Detector.detect`. mmdetection takes arrays as BGR, as it reads files."""
        return [by_class(_instances(self._infer(self.model, image[:, :, ::-1].copy()))) for image in pixels]


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
    kind, _, name = choice.partition(":")
    if choice == "converted":
        return Mask2Former(load_model(str(converted_folder(checkpoint)), device, dtype))
    if kind == "transformers" and name:
        warnings.warn(f"GenEval scores by the detector {name} are not comparable with published ones", stacklevel=3)
        return Mask2Former(load_model(name, device, dtype))
    if kind == "mmdet" and name:
        return MmdetModel(name, checkpoint, device)
    raise RewardError(f"detector '{choice}' is none of converted, transformers:HUB_ID_OR_FOLDER, mmdet:CONFIG.py")


def load_model(name: str, device: str, dtype: torch.dtype) -> Mask2FormerForUniversalSegmentation:
    """A frozen Mask2Former of COCO's 80 classes. Raises `RewardError` as `build_detector`."""
    try:
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            name, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"the detector '{name}' cannot be loaded: {error}. To fetch it: hf download {name}"
        ) from error
    check_entries(name, set(report["missing_keys"]), set())
    check_labels(name, [model.config.id2label[i] for i in range(len(model.config.id2label))])
    return model.to(device).requires_grad_(False).eval()
