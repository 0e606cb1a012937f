"""Does a detector name COCO's classes in COCO's order?"""

from collections.abc import Sequence

from diffusionopd.rewards.base import RewardError
from diffusionopd.rewards.geneval.classes import CLASSES, RENAMED

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
    wanted = [RENAMED.get(name, name) for name in CLASSES]
    given = [_OTHER_WORDS.get(label, label) for label in labels]
    if len(given) != len(wanted):
        raise RewardError(f"detector '{source}' has {len(given)} classes, not COCO's 80: give one of COCO instances")
    for i, (label, name) in enumerate(zip(given, wanted, strict=True)):
        if label != name:
            raise RewardError(f"detector '{source}' calls class {i} '{labels[i]}', which is '{name}' in COCO's order")
