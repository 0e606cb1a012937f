"""UnifiedReward (arXiv:2503.05236): a vision-language model behind a server says how good an image of a caption is.

The protocol is that of the official client (`sglang_inference.py`, github.com/CodeGoat24/UnifiedReward): the image at
512x512, then the question, temperature 0; the number after "Final Score:" over 5. Any OpenAI-compatible server will do.
"""

import base64
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from diffusionopd.files import located
from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, RewardUnavailableError, Scores
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
MAX_TOKENS = 4096  # of an answer, as in UnifiedReward's local inference; its official client leaves it to the server
LONGEST_PAUSE = 60  # seconds; a server may ask for hours in Retry-After
_TEMPORARY = (429, *range(500, 600))  # statuses that may be other ones soon

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
    fetch, path = "python -m tools.download rewards unifiedreward", located(path)
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


def api_root(base_url: str) -> str:
    """The address without a slash at its end; `/v1` is added to a bare `http://host:port`.

    Raises:
        RewardError: not an http(s) address, or one with a password, which would end up in logs.
    """
    if "@" in base_url or "?" in base_url:
        raise RewardError(
            "base_url holds a user, a password or a query, which would end up in logs; put the key into the "
            "environment variable that api_key_variable names"
        )
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(f"base_url must look like http://127.0.0.1:17140, not {base_url!r}")
    return base_url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def read_key(variable: str) -> str:
    """The API key in an environment variable, `""` if that is not set.

    Raises:
        RewardError: a name that cannot be a variable's, or a key that cannot be sent. Neither is quoted: it is secret.
    """
    if variable and not variable.isidentifier():
        raise RewardError("api_key_variable must name an environment variable")
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RewardError(f"the environment variable {variable} holds characters that no API key can have")
    return key


def shortened(text: str, length: int = 300) -> str:
    """The text for a terminal: one line of about `length` characters, without those that move its cursor."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= length else text[:length] + " ..."


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
            base_url: see `api_root`.
            model: the name under which the server has the model.
            api_key_variable: the environment variable with the key; no key is sent if it is not set.
            timeout: seconds without a byte from the server after which a request has failed.
            connect_timeout: seconds for the connection, and for the first answer.
            retries: how often a question is repeated after a failure, a 429 or a 5xx.
            backoff: repetition n waits `backoff * 2**(n-1)` seconds, the first none; Retry-After goes before it.
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
        self._root, self._key, self._key_variable = api_root(base_url), read_key(api_key_variable), api_key_variable
        self._timeouts = connect_timeout, timeout
        self._session = requests.Session()
        here = urlsplit(self._root).hostname in ("127.0.0.1", "localhost", "::1")
        self._session.trust_env = not here  # a proxy of the environment is for other machines, not for this one
        if self._key:
            self._session.headers["Authorization"] = f"Bearer {self._key}"
            if not here and self._root.startswith("http:"):
                warnings.warn(f"the API key goes unencrypted to {self._root}", stacklevel=2)
        retry = Retry(
            total=retries,
            backoff_factor=backoff,
            status_forcelist=_TEMPORARY,
            allowed_methods={"POST"},
            raise_on_status=False,
            retry_after_max=LONGEST_PAUSE,
        )
        self._session.mount(self._root + "/chat", HTTPAdapter(pool_maxsize=concurrency, max_retries=retry))
        self._request("GET", "/models", connect_timeout)  # once only, so that a server that is not there is seen soon

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
        """The answer to an image and its prompt, greedily decoded."""
        image = {"type": "image_url", "image_url": {"url": data_url(pair[0])}}
        text = {"type": "text", "text": self._question.replace("{prompt}", pair[1])}
        messages = [{"role": "user", "content": [image, text]}]
        body = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        answer = self._request("POST", "/chat/completions", self._timeouts[1], json=body)
        try:
            return answer.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise self._error("gave an answer that is no chat completion", answer.text) from error

    def _request(self, method: str, path: str, seconds: float, **body: Any) -> requests.Response:
        """An answer with status 200, for which the server has these seconds."""
        try:
            # A redirection would take images and prompts to a machine that nobody named.
            response = self._session.request(
                method, self._root + path, timeout=(self._timeouts[0], seconds), allow_redirects=False, **body
            )
        except requests.RequestException as error:
            what, remedy = f"does not answer {method} {path}", f". To start one: {START}"
            raise self._error(what, str(error), remedy, RewardUnavailableError) from error
        if response.status_code in (401, 403):
            remedy = f". The key belongs into the environment variable {self._key_variable}"
            raise self._error(f"wants another key (HTTP {response.status_code})", response.text, remedy)
        if response.status_code != 200:
            kind = RewardUnavailableError if response.status_code in _TEMPORARY else RewardError
            raise self._error(f"answers {method} {path} with HTTP {response.status_code}", response.text, kind=kind)
        return response

    def _error(self, what: str, detail: str, remedy: str = "", kind: type[RewardError] = RewardError) -> RewardError:
        """The detail comes from outside, and without the key: a server may quote the one it refuses."""
        hidden = detail.replace(self._key, "***") if self._key else detail
        return kind(f"the reward server {self._root} {what}: {shortened(hidden)}{remedy}")
