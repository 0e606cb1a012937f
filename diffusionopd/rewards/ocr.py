"""Does the image show the text that the prompt asks for? Read by RapidOCR or by PaddleOCR."""

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from diffusionopd.rewards.base import Scores, find_packages, importing, unfit
from diffusionopd.rewards.images import Images, each_uint8
from diffusionopd.rewards.quotes import normalised, quoted, wanted_text

Reader = Callable[[np.ndarray], list[str]]
"""The lines of text in a uint8 `[H, W, 3]` image, which the engines expect as BGR."""
Alphabet = Callable[[], Collection[str]]
"""The characters that a reader can give, empty where they are not known."""
PADDLE = (
    "reward 'ocr' with engine 'paddleocr'",
    "Its packages: pip install -e '.[paddle]', in an environment of its own",
)


def ocr_reward(read: str, wanted: str) -> float:
    """`1 - d / len(wanted)`: d is the Levenshtein distance, at most len(wanted), and 0 where the text occurs in full.

    Args: both `normalised`; `wanted` not empty.
    """
    from rapidfuzz.distance import Levenshtein

    distance = 0 if wanted in read else min(Levenshtein.distance(read, wanted), len(wanted))
    return 1 - distance / len(wanted)


def rapidocr_reader() -> tuple[Reader, Alphabet]:
    """RapidOCR on the CPU, PP-OCR models in ONNX form, part of the package; and its alphabet, once it has read."""
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.use_cls": False, "Global.log_level": "error"})
    return lambda pixels: list(engine(pixels).txts or ()), partial(rapidocr_alphabet, engine)


def rapidocr_alphabet(engine: Any) -> Collection[str]:
    """The characters that its recogniser knows, empty until it is loaded."""
    decoder = getattr(getattr(engine, "text_rec", None), "postprocess_op", None)
    return frozenset(getattr(decoder, "character", ()))


def check_quotes(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """As `unfit`: prompts without text in quotes. Says once which text is taken where that is unclear."""
    unclear = {}

    def read(prompt: str, _: Mapping[str, Any]) -> None:
        if (found := quoted(prompt)).unclear:
            unclear[prompt] = found

    problems = unfit(read, prompts, metadata)
    if unclear and os.environ.get("RANK", "0") == "0":  # every process checks
        prompt, found = next(iter(unclear.items()))
        more = f"; {len(unclear) - 1} more prompts are like it" if len(unclear) > 1 else ""
        warnings.warn(f"the prompt {prompt!r} {found.unclear}: {found.text!r} is wanted{more}", stacklevel=2)
    return problems


def paddleocr_reader(device: str) -> Reader:
    """PaddleOCR 2.x or 3.x with the English PP-OCRv4 models, which upstream reads with; fetched at the first use.

    Args:
        device: `cuda` or `cuda:1` is used if Paddle was built for it; otherwise the CPU.

    Raises:
        RewardError: the packages are not installed.
    """
    with importing(*PADDLE):
        import paddle
        from paddleocr import PaddleOCR
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
        # The defaults of 2.x, which published scores are read with.
        text_det_limit_side_len=960,
        text_det_limit_type="max",
        text_rec_score_thresh=0.5,
    )
    return lambda pixels: [text for page in engine.predict(pixels) for text in page["rec_texts"]]


def _paddleocr_2(make: Callable[..., Any], gpu: int | None) -> Reader:
    """`ocr` gives a list for the image, of lines `[box, (text, confidence)]`, or None where there is no text."""
    engine = make(use_angle_cls=False, use_gpu=gpu is not None, gpu_id=gpu or 0, show_log=False)
    return lambda pixels: [text for page in engine.ocr(pixels, cls=False) for _, (text, _) in page or ()]


class Ocr:
    """`ocr`: share of the wanted text that the image shows, 0 to 1."""

    def __init__(self, engine: Literal["rapidocr", "paddleocr"] = "rapidocr", device: str = "cpu"):
        """Load the engine.

        Args:
            engine: "rapidocr", or "paddleocr", which upstream's published scores were made with. Upstream hands it RGB;
                here it gets the BGR that it expects.
            device: where PaddleOCR runs; RapidOCR runs on the CPU.

        Raises:
            ImportError: a package is missing. `RewardError` where it is PaddleOCR's.
        """
        import rapidfuzz  # noqa: F401  (missing packages are to be found before images are made)

        self._alphabet: Alphabet = tuple
        self._unreadable: set[str] = set()  # what has been warned about
        if engine == "rapidocr":
            self._read_lines, self._alphabet = rapidocr_reader()
        else:
            self._read_lines = paddleocr_reader(device)

    check = staticmethod(check_quotes)

    @staticmethod
    def packages(options: Mapping[str, Any]) -> None:
        """Raises as the constructor where a package is missing; loads none."""
        find_packages("rapidfuzz")
        if options.get("engine") == "paddleocr":
            with importing(*PADDLE):
                find_packages("paddle", "paddleocr")
        else:
            find_packages("rapidocr", "onnxruntime")

    def read(self, pixels: np.ndarray) -> str:
        """All text in a uint8 `[H, W, 3]` RGB image, `normalised`, in the order of the engine's lines."""
        return normalised("".join(self._read_lines(np.ascontiguousarray(pixels[:, :, ::-1]))))

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `UnfitPromptError` for a prompt without quoted text; the engine's errors pass.

        Wanted characters that the engine cannot read, which cost score on a perfect image, are named once.
        """
        wanted = [wanted_text(prompt) for prompt in prompts]
        read = [self.read(pixels) for pixels in each_uint8(images)]
        self._name_unreadable(set("".join(wanted)))
        return {"ocr": np.array([ocr_reward(*pair) for pair in zip(read, wanted, strict=True)], dtype=np.float64)}

    def _name_unreadable(self, wanted: set[str]) -> None:
        known = self._alphabet()
        unknown = {c for c in wanted - self._unreadable if c not in known and c.upper() not in known}
        if known and unknown:
            self._unreadable |= unknown
            listed = " ".join(sorted(unknown))
            warnings.warn(f"reward 'ocr': the engine's alphabet lacks {listed}: it never reads them", stacklevel=3)
