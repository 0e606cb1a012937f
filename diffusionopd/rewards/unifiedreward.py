"""UnifiedReward (arXiv:2503.05236): a vision-language model behind a server says how good an image of a caption is.

The protocol is that of the official client (`sglang_inference.py`, github.com/CodeGoat24/UnifiedReward): the image at
512x512, then the question, temperature 0; the number after "Final Score:" over 5.
"""

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, Scores
from diffusionopd.rewards.chat_server import ChatServer, shortened
from diffusionopd.rewards.images import Images, each_uint8

QUESTION = "reward_ckpts/unifiedreward_question.txt"
"""The official question: UTF-8 text in which `{prompt}` stands for the caption. No other brace has a meaning."""

OWN_QUESTION = (
    "The picture was made for the caption below. Judge it by two things: how closely it follows the caption (which "
    "objects are there, how many, with what attributes, and how they relate), and how good it is as a picture (sharp, "
    "detailed, true in colour, pleasing). Write your overall judgement as a number from 1 (bad) to 5 (excellent) after "
    '"Final Score:".\nCaption: [{prompt}]'
)
"""What is asked without that file."""

START = (
    "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --served-model-name "
    "UnifiedReward-7b-v1.5 --port 17140 --chat-template chatml-llava --mem-fraction-static 0.85"
)
"""The command that starts the server of the defaults; sglang is best installed in an environment of its own."""

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


def data_url(pixels: np.ndarray) -> str:
    """A uint8 `[H, W, 3]` image at 512x512 (bicubic) as a PNG in a data URL."""
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE)).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def load_question(path: str) -> str:
    """The question of a file, without line breaks at its end; without the file `OWN_QUESTION`, with a warning.

    Raises:
        RewardError: a file without `{prompt}`.
    """
    fetch = "python -m tools.download rewards unifiedreward"
    if not Path(path).is_file():
        warnings.warn(
            f"reward 'unifiedreward': without {path} it asks in words of its own, and its scores cannot be compared "
            f"with published ones. To fetch the official question: {fetch}",
            stacklevel=3,
        )
        return OWN_QUESTION
    question = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    if "{prompt}" not in question:
        raise RewardError(f"{path} has no {{prompt}} where the caption belongs. To fetch it again: {fetch}")
    return question


class UnifiedReward:
    """`unifiedreward`: caption alignment and image quality, 0.2 to 1; `NOT_APPLICABLE` for an answer without a score.

    `unifiedreward_unparsable` beside it is 1 for such an answer and 0 otherwise, so its mean is their share. With other
    options for server, model and question any vision-language model that ends its answers alike can be the judge; a
    subclass may have a `name` and a `parse` of its own.
    """

    name = "unifiedreward"

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
            base_url, api_key_variable, timeout, connect_timeout, retries, backoff: as for `ChatServer`.
            model: the name under which the server has the model.
            concurrency: requests under way at once, of each process.
            question: its file.

        Raises:
            RewardError: the server does not list its models, a value that none of these can have, or a file that is not
                the question.
        """
        if concurrency < 1 or retries < 0 or backoff < 0 or not (timeout > 0 and connect_timeout > 0):
            raise RewardError(
                f"reward '{self.name}': concurrency must be at least 1, timeouts above 0, retries and backoff not "
                f"below 0, not {concurrency=}, {timeout=}, {connect_timeout=}, {retries=}, {backoff=}"
            )
        self._model, self._concurrency, self._warned = model, concurrency, False
        self._question = load_question(question)
        self._server = ChatServer(
            base_url,
            api_key_variable,
            start=START,
            timeout=timeout,
            connect_timeout=connect_timeout,
            retries=retries,
            backoff=backoff,
            connections=concurrency,
        )
        self._server.check()

    def parse(self, answer: str) -> float | None:
        """The score in [0, 1] that an answer states; None if it states none."""
        value = final_score(answer)
        return None if value is None else value / 5

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`. Raises `RewardError` when an image's request fails for good; there is no silent score."""
        pairs = list(zip(each_uint8(images), prompts, strict=True))
        # Its threads are daemons, unlike a ThreadPoolExecutor's: a server that hangs does not delay the exit.
        with ThreadPool(min(self._concurrency, len(pairs) or 1)) as pool:
            answers = list(pool.imap(self._ask, pairs))  # the first error ends it; what has not begun is left out
        values = [self.parse(answer) for answer in answers]
        unparsable = np.array([value is None for value in values], dtype=np.float64)
        if not self._warned and unparsable.any():
            self._warned = True
            first = answers[values.index(None)]
            warnings.warn(f"reward '{self.name}': an answer without a score: {shortened(first)!r}", stacklevel=2)
        scores = np.array([NOT_APPLICABLE if value is None else value for value in values], dtype=np.float64)
        return {self.name: scores, f"{self.name}_unparsable": unparsable}

    def _ask(self, pair: tuple[np.ndarray, str]) -> str:
        return self._server.ask(self._model, data_url(pair[0]), self._question.replace("{prompt}", pair[1]))
