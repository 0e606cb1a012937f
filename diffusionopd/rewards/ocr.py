"""Does the image show the text that the prompt asks for? Read by RapidOCR or by PaddleOCR."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from diffusionopd.rewards.base import RewardError, Scores
from diffusionopd.rewards.images import Images, each_uint8

Reader = Callable[[np.ndarray], list[str]]
"""The lines of text in a uint8 `[H, W, 3]` image, which the engines expect as BGR."""

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
    raise RewardError(f"reward 'ocr': the prompt {prompt!r} has no text in quotes that an image could show")


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


def rapidocr_reader() -> Reader:
    """RapidOCR on the CPU: PP-OCR models in ONNX form, part of the package."""
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.use_cls": False, "Global.log_level": "error"})
    return lambda pixels: list(engine(pixels).txts or ())


def paddleocr_reader(device: str) -> Reader:
    """PaddleOCR 2.x or 3.x with the English PP-OCRv4 models, which upstream reads with; fetched at the first use.

    Args:
        device: `cuda` or `cuda:1` is used if Paddle was built for it; otherwise the CPU.

    Raises:
        RewardError: the packages are not installed.
    """
    try:
        import paddle
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise RewardError(
            f"reward 'ocr' with engine 'paddleocr' cannot be imported: {error}. "
            "Its packages: pip install -e '.[paddle]', in an environment of its own"
        ) from error
    kind, _, index = device.partition(":")
    gpu = int(index or 0) if kind == "cuda" and paddle.device.is_compiled_with_cuda() else None
    read = _paddleocr_3 if hasattr(PaddleOCR, "predict") else _paddleocr_2
    return read(partial(PaddleOCR, lang="en", ocr_version="PP-OCRv4"), gpu)


def _paddleocr_3(make: Callable[..., Any], gpu: int | None) -> Reader:
    """`predict` gives one dictionary for the image; its `rec_texts` are empty where there is no text."""
    engine = make(
        device="cpu" if gpu is None else f"gpu:{gpu}",
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
        enable_mkldnn=False,  # Paddle 3.3 fails on the CPU with it (PaddlePaddle/Paddle issue 77340)
    )
    return lambda pixels: [text for page in engine.predict(pixels) for text in page["rec_texts"]]


def _paddleocr_2(make: Callable[..., Any], gpu: int | None) -> Reader:
    """`ocr` gives a list for the image, of lines `[box, (text, confidence)]`, or None where there is no text."""
    engine = make(use_angle_cls=False, use_gpu=gpu is not None, gpu_id=gpu or 0, show_log=False)
    return lambda pixels: [text for page in engine.ocr(pixels, cls=False) for _, (text, _) in page or ()]


class Ocr:
    """`ocr`: share of the wanted text that the image shows, 0 to 1."""

    def __init__(self, engine: str = "rapidocr", device: str = "cpu"):
        """Load the engine.

        Args:
            engine: "rapidocr", or "paddleocr", which upstream's published scores were made with. Upstream hands it RGB;
                here it gets the BGR that it expects.
            device: where PaddleOCR runs; RapidOCR runs on the CPU.

        Raises:
            ImportError: a package is missing. `RewardError` where it is PaddleOCR's, or for another engine.
        """
        import rapidfuzz  # noqa: F401  (missing packages are to be found before images are made)

        if engine not in ("rapidocr", "paddleocr"):
            raise RewardError(f"reward 'ocr': engine must be 'rapidocr' or 'paddleocr', not {engine!r}")
        self._read_lines = rapidocr_reader() if engine == "rapidocr" else paddleocr_reader(device)

    def read(self, pixels: np.ndarray) -> str:
        """All text in a uint8 `[H, W, 3]` RGB image, `normalised`, in the order of the engine's lines."""
        return normalised("".join(self._read_lines(np.ascontiguousarray(pixels[:, :, ::-1]))))

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `RewardError` for a prompt without quoted text; what the engine raises, passes."""
        wanted = [wanted_text(prompt) for prompt in prompts]
        read = [self.read(pixels) for pixels in each_uint8(images)]
        return {"ocr": np.array([ocr_reward(*pair) for pair in zip(read, wanted, strict=True)], dtype=np.float64)}
