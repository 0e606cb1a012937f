"""Does the picture show the text that the prompt asks for? Read by RapidOCR (PP-OCR models inside the package)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusionopd.rewards.base import RewardError, Scores
from diffusionopd.rewards.images import Images, to_uint8

# Double quotes first, straight or curly; single ones only around whole words, so that an apostrophe is none.
_QUOTED = (
    re.compile(r'"([^"]*)"'),
    re.compile(r"[“„]([^“”„]*)[”“]"),
    re.compile(r"‘([^‘]*?)’(?!\w)"),
    re.compile(r"(?<!\w)'([^']*)'(?!\w)"),
)


def wanted_text(prompt: str) -> str:
    """The first text in quotes of the prompt, without spaces, in lower case.

    Raises:
        RewardError: nothing in quotes, or nothing but spaces.
    """
    for pattern in _QUOTED:
        if match := pattern.search(prompt):
            if text := normalised(match.group(1)):
                return text
            raise RewardError(f"reward 'ocr': the quotes in the prompt {prompt!r} are empty")
    raise RewardError(f"reward 'ocr': the prompt {prompt!r} has no text in quotes that a picture could show")


def normalised(text: str) -> str:
    """Without white space, in lower case."""
    return "".join(text.split()).lower()


def ocr_reward(read: str, wanted: str) -> float:
    """`1 - d / len(wanted)`: d is the Levenshtein distance, at most len(wanted), and 0 where the text occurs in full.

    Args: both `normalised`; `wanted` not empty.
    """
    from rapidfuzz.distance import Levenshtein

    distance = 0 if wanted in read else min(Levenshtein.distance(read, wanted), len(wanted))
    return 1 - distance / len(wanted)


class Ocr:
    """`ocr`: share of the wanted text that the picture shows, 0 to 1."""

    def __init__(self) -> None:
        """Load the engine, on the CPU. Raises `ImportError` without the packages."""
        import rapidfuzz  # noqa: F401  (missing packages are to be found before pictures are made)
        from rapidocr import RapidOCR

        self._engine = RapidOCR(params={"Global.use_cls": False, "Global.log_level": "error"})

    def read(self, pixels: np.ndarray) -> str:
        """All text in a uint8 `[H, W, 3]` RGB picture, `normalised`, in the order of the engine's lines."""
        found = self._engine(np.ascontiguousarray(pixels[:, :, ::-1]))  # it expects BGR
        return normalised("".join(found.txts or ()))

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `RewardError` for a prompt without quoted text."""
        wanted = [wanted_text(prompt) for prompt in prompts]
        read = [self.read(pixels) for pixels in to_uint8(images)]
        return {"ocr": np.array([ocr_reward(*pair) for pair in zip(read, wanted, strict=True)], dtype=np.float64)}
