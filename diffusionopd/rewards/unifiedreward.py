"""UnifiedReward (arXiv:2503.05236): a vision-language model behind a server says how good a picture of a caption is.

The protocol is that of the official client (`sglang_inference.py`, github.com/CodeGoat24/UnifiedReward): the picture at
512x512, then the question, temperature 0; the number after "Final Score:" over 5.
"""

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, Scores
from diffusionopd.rewards.chat_server import ChatServer, shortened
from diffusionopd.rewards.images import Images, to_pil
from diffusionopd.rewards.threads import in_threads

QUESTION = "reward_ckpts/unifiedreward_question.txt"
"""The official question: UTF-8 text in which `{prompt}` stands for the caption. No other brace has a meaning."""

OWN_QUESTION = (
    "The picture was made for the caption below. Judge it by two things: how closely it follows the caption (which "
    "objects are there, how many, with what attributes, and how they relate), and how good it is as a picture (sharp, "
    "detailed, true in colour, pleasing). Write your overall judgement as a number from 1 (bad) to 5 (excellent) after "
    '"Final Score:".\nCaption: [{prompt}]'
)
"""What is asked without that file."""

SIDE = 512

_FINAL_SCORE = re.compile(
    r"""final \s+ score [\s*_:='"`\[]* (\d+(?:\.\d+)?)      # the number, perhaps bold or in quotes
        (?:[ *_]* (?:/|out\ of) \s* 5(?:\.0+)?)?          # of 5
        (?! [.,]?\d                                       # but no longer number (45),
          | [ *_]* (?:[-–/]|out\ of) \s* \d               # nor a range (1-5) or another scale (4/10)
          | \s* % )""",
    re.IGNORECASE | re.VERBOSE,
)


def final_score(answer: str) -> float | None:
    """The number from 1 to 5 after the first "Final Score:" of an answer; None if there is none such."""
    match = _FINAL_SCORE.search(answer)
    value = float(match.group(1)) if match else 0.0
    return value if 1 <= value <= 5 else None


def data_url(image: Image.Image) -> str:
    """An RGB picture at 512x512 (bicubic) as a PNG in a data URL."""
    stream = io.BytesIO()
    image.resize((SIDE, SIDE)).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def load_question(path: str) -> str:
    """The question of a file, without line breaks at its end; without the file `OWN_QUESTION`, with a warning.

    Raises:
        RewardError: a file without `{prompt}`.
    """
    if not Path(path).is_file():
        warnings.warn(
            f"reward 'unifiedreward': without {path} it asks in words of its own, and its scores cannot be compared "
            "with published ones. To fetch the official question: python -m tools.download rewards unifiedreward",
            stacklevel=3,
        )
        return OWN_QUESTION
    question = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    if "{prompt}" not in question:
        raise RewardError(
            f"{path} has no {{prompt}} where the caption belongs. "
            "To fetch it again: python -m tools.download rewards unifiedreward"
        )
    return question


class UnifiedReward:
    """`unifiedreward`: caption alignment and image quality, 0.2 to 1; `NOT_APPLICABLE` for an answer without a score.

    `unifiedreward_unparsable` beside it is 1 for such an answer and 0 otherwise, so its mean is their share.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:17140/v1",
        model: str = "UnifiedReward-7b-v1.5",
        api_key_variable: str = "UNIFIEDREWARD_API_KEY",
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        retries: int = 3,
        backoff: float = 1.0,
        concurrency: int = 8,
        question: str = QUESTION,
    ):
        """Read the question and see that the server is there.

        Args:
            base_url: address of an OpenAI-compatible server, with or without `/v1`.
            model: the name under which it serves the model.
            api_key_variable: the environment variable with the key; no key is sent if it is not set.
            timeout: seconds without a byte from the server, or for the whole of its answer once that has begun, after
                which a request has failed.
            connect_timeout: seconds for the connection, and for the server's answer here.
            retries: how often a request is repeated after a failure, a 429 or a 5xx.
            backoff: repetition n waits `backoff * 2**(n-1)` seconds, the first none; Retry-After goes before it.
            concurrency: requests under way at once.
            question: file with the official question, see `QUESTION`.

        Raises:
            RewardError: no server (with the command that starts one), a key refused, options that are none, or a
                file that is not the question.
        """
        if concurrency < 1 or retries < 0 or backoff < 0 or not (timeout > 0 and connect_timeout > 0):
            raise RewardError(
                "reward 'unifiedreward': concurrency must be at least 1, timeouts above 0, retries and backoff not "
                f"below 0, not {concurrency=}, {timeout=}, {connect_timeout=}, {retries=}, {backoff=}"
            )
        self._model, self._concurrency = model, concurrency
        self._question = load_question(question)
        self._warned = False
        self._server = ChatServer(
            base_url,
            api_key_variable,
            timeout=timeout,
            connect_timeout=connect_timeout,
            retries=retries,
            backoff=backoff,
            connections=concurrency,
        )
        self._server.check()

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `RewardError` when a picture's request fails for good; there is no silent score."""
        pairs = list(zip(to_pil(images), prompts, strict=True))
        answers = in_threads(lambda pair: self._ask(*pair), pairs, self._concurrency)
        values = [final_score(answer) for answer in answers]
        unparsable = np.array([value is None for value in values], dtype=np.float64)
        if not self._warned and unparsable.any():
            self._warned = True
            first = answers[values.index(None)]
            warnings.warn(f"reward 'unifiedreward': an answer without a score: {shortened(first)!r}", stacklevel=2)
        scores = [NOT_APPLICABLE if value is None else value / 5 for value in values]
        return {"unifiedreward": np.array(scores, dtype=np.float64), "unifiedreward_unparsable": unparsable}

    def _ask(self, image: Image.Image, prompt: str) -> str:
        return self._server.ask(self._model, data_url(image), self._question.replace("{prompt}", prompt))
