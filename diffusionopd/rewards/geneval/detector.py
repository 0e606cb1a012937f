"""Which detector finds the objects: the interface, and the choice by name."""

import warnings
from typing import Protocol

import numpy as np
import torch
from transformers import Mask2FormerForUniversalSegmentation

from diffusionopd.rewards.base import RewardError
from diffusionopd.rewards.geneval.convert import check_entries, converted_folder
from diffusionopd.rewards.geneval.labels import check_labels
from diffusionopd.rewards.geneval.mask2former import Mask2Former
from diffusionopd.rewards.geneval.mmdet_model import MmdetModel
from diffusionopd.rewards.geneval.rules import Detection


class Detector(Protocol):
    """Finds objects of GenEval's classes."""

    def detect(self, pixels: np.ndarray) -> list[dict[str, list[Detection]]]:
        """The objects in B pictures of one size.

        Args:
            pixels: uint8 `[B, H, W, 3]`, RGB.

        Returns:
            For each picture, GenEval's class name -> detections of a score above `rules.THRESHOLD`, in any order.
        """
        ...


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
