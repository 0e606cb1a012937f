"""The reward `geneval`: detect, name colours, judge, and report by kind of prompt."""

import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, Scores, not_whole, unfit
from diffusionopd.rewards.clip import CLIP_L, Clip, load_clip
from diffusionopd.rewards.geneval.classes import COLOURS, TAGS
from diffusionopd.rewards.geneval.convert import CHECKPOINT
from diffusionopd.rewards.geneval.detector import build_detector, find_detector, parse_choice
from diffusionopd.rewards.geneval.rules import Detection, Verdict, judge, parse_request, select_objects
from diffusionopd.rewards.images import Images, to_uint8
from diffusionopd.rewards.weights import Dtype, scorer_dtype

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = (0x99, 0x99, 0x99)
"""RGB around the object."""


def crop(pixels: np.ndarray, detection: Detection) -> np.ndarray:
    """The object's pixels on `BACKGROUND`, cut to its box: uint8 `[h, w, 3]`.

    Args:
        pixels: uint8 `[H, W, 3]`, RGB.
        detection: its mask is not empty; an empty one has no mask score, and never is an object.
    """
    pasted = np.where(detection.mask[..., None], pixels, np.array(BACKGROUND, dtype=np.uint8))
    left, top, right, bottom = (round(edge) for edge in detection.box)
    return np.ascontiguousarray(pasted[top:bottom, left:right])


class ColourClassifier:
    """The colour of an object, named by CLIP (ViT-L/14 in GenEval) from what its mask cuts out of the image.

    A zero-shot classifier over GenEval's ten colours, one for each class name.
    """

    def __init__(self, clip: Clip):
        """Args: `clip`, frozen."""
        self.clip = clip
        self._weights: dict[str, torch.Tensor] = {}

    def class_weights(self, name: str) -> torch.Tensor:
        """`[10, P]` float32: the unit text embeddings of a colour's three templates, averaged, of unit length again."""
        if name not in self._weights:
            prompts = [text.format(colour=colour, name=name) for colour in COLOURS for text in TEMPLATES]
            embeddings = self.clip.text_embeddings(prompts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._weights[name] = torch.nn.functional.normalize(embeddings.mean(dim=1), dim=-1)
        return self._weights[name]

    def __call__(self, pixels: np.ndarray, name: str, detections: Sequence[Detection]) -> list[str]:
        """The colour of each detection of class `name` in a uint8 `[H, W, 3]` RGB image."""
        crops = [crop(pixels, detection) for detection in detections]
        cosines = self.clip.image_embeddings(crops) @ self.class_weights(name).T
        return [COLOURS[best] for best in cosines.argmax(dim=-1).tolist()]


load_detector = functools.cache(build_detector)
"""`build_detector`, once for all scorers in a process: monitoring and evaluation share it."""


class GenEval:
    """`geneval`: the share of what the prompt asks for that the image shows, 0 to 1, as a reward for training.

    `accuracy` and `strict_accuracy` are 1 or 0 (see `rules.judge`), `<tag>_accuracy` and `<tag>_strict_accuracy` the
    same for the images of one of the six tags. GenEval's own overall score is the plain mean of the six accuracies.
    """

    combined: Mapping[str, tuple[str, ...]] = {"geneval_overall": tuple(f"{tag}_accuracy" for tag in TAGS)}

    def __init__(
        self,
        device: str = "cpu",
        dtype: Dtype = "float32",
        detector: str = "converted",
        checkpoint: str = CHECKPOINT,
        clip: str = CLIP_L,
        batch_size: int = 8,
    ):
        """Load detector and CLIP.

        Args:
            device: where both run.
            dtype: of both; published scores are those of float32.
            detector: "converted", "transformers:NAME" or "mmdet:CONFIG.py", see `build_detector`.
            checkpoint: mmdetection's .pth file, converted each time that it is loaded.
            clip: that names colours, hub id or folder.
            batch_size: images that the detector sees at once, enlarged to 800 pixels.

        Raises:
            RewardError: as `build_detector` and `load_clip`.
        """
        self.batch_size = batch_size
        # First, because its file is missing at once, and CLIP only after several tries to reach the hub.
        self.detect = load_detector(detector, checkpoint, device, scorer_dtype(dtype))
        self.colours = ColourClassifier(load_clip(clip, clip, device, dtype))

    check = staticmethod(partial(unfit, parse_request))

    @staticmethod
    def packages(options: Mapping[str, Any]) -> None:
        """Raises as the constructor where a package is missing; loads none."""
        find_detector(options.get("detector", "converted"))

    @staticmethod
    def dispensable(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Options whose files need not be there: another detector has its own."""
        return ("checkpoint",) if str(options.get("detector", "")).startswith("transformers:") else ()

    @staticmethod
    def problems(**options: Any) -> list[str]:
        """What is wrong with options, found without loading anything."""
        found = not_whole({"batch_size": 1}, **options)
        detector = str(options.get("detector", "converted"))
        if detector.startswith("mmdet:") and options.get("dtype", "float32") != "float32":
            found.append(f"dtype is {options['dtype']}, but mmdetection computes in float32: leave it out")
        try:
            parse_choice(detector)
        except RewardError as error:
            found.append(str(error))
        return found

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `UnfitPromptError` for a prompt without GenEval's metadata, first of all."""
        requests = [parse_request(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        pixels = to_uint8(images)
        found = []
        for start in range(0, len(pixels), self.batch_size):
            found += self.detect(pixels[start : start + self.batch_size])
        verdicts = [
            judge(select_objects(detections, request.tag), request, partial(self.colours, image))
            for detections, request, image in zip(found, requests, pixels, strict=True)
        ]
        return _scores(verdicts, [request.tag for request in requests])


def _scores(verdicts: Sequence[Verdict], tags: Sequence[str]) -> Scores:
    rows = [(verdict.soft, verdict.correct, verdict.strict) for verdict in verdicts]
    soft, correct, strict = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    scores = {"geneval": soft, "accuracy": correct, "strict_accuracy": strict}
    for tag in TAGS:
        is_tag = np.array([tag == other for other in tags], dtype=bool)
        scores[f"{tag}_accuracy"] = np.where(is_tag, correct, NOT_APPLICABLE)
        scores[f"{tag}_strict_accuracy"] = np.where(is_tag, strict, NOT_APPLICABLE)
    return scores
