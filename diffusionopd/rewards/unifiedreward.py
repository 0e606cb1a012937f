"""UnifiedReward (arXiv:2503.05236): a vision-language model behind a server says how good a picture of a caption is.

The protocol is that of the official client (`sglang_inference.py`, github.com/CodeGoat24/UnifiedReward): the picture at
512x512, then the question, temperature 0; the number after "Final Score:" over 5.
"""

import base64
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, Scores
from diffusionopd.rewards.images import Images, to_pil

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
MAX_TOKENS = 4096  # of an answer, as in the official local inference; the official client leaves it to the server
LONGEST_PAUSE = 60.0  # seconds; a server may ask for hours in Retry-After

SERVE = (
    "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --served-model-name "
    "UnifiedReward-7b-v1.5 --port 17140 --chat-template chatml-llava --mem-fraction-static 0.85"
)
"""Starts the server of the defaults; sglang is best installed in an environment of its own."""

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
            "with published ones. To fetch the official question: python scripts/download.py rewards unifiedreward",
            stacklevel=3,
        )
        return OWN_QUESTION
    question = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    if "{prompt}" not in question:
        raise RewardError(
            f"{path} has no {{prompt}} where the caption belongs. "
            "To fetch it again: python scripts/download.py rewards unifiedreward"
        )
    return question


def api_root(base_url: str) -> str:
    """The address without a slash at its end; `/v1` is added to a bare `http://host:port`.

    Raises:
        RewardError: not an http(s) address, or one with a password, which would end up in logs.
    """
    if "@" in base_url or "?" in base_url:
        raise RewardError(
            "reward 'unifiedreward': base_url holds a user, a password or a query, which would end up in logs; put the "
            "key into the environment variable that api_key_variable names"
        )
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise RewardError(f"reward 'unifiedreward': base_url must look like http://127.0.0.1:17140, not {base_url!r}")
    return base_url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def _shortened(text: str, length: int = 300) -> str:
    """For a terminal: on one line, without control characters, which could move its cursor."""
    text = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * length])
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + " ..."


class _PatientRetry(Retry):
    """Waits as the server asks for in Retry-After, but never longer than `LONGEST_PAUSE`."""

    def get_retry_after(self, response: Any) -> float | None:
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds, LONGEST_PAUSE)


class ChatServer:
    """An OpenAI-compatible chat server. Safe to use from several threads."""

    def __init__(
        self,
        base_url: str,
        key_variable: str = "",
        *,
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        retries: int = 3,
        backoff: float = 1.0,
        connections: int = 8,
    ):
        """Args as for `UnifiedReward`. Raises `RewardError` for an address or a key that cannot be one."""
        self.root = api_root(base_url)
        self._key_variable, self._timeout = key_variable, (connect_timeout, timeout)
        if key_variable and not key_variable.isidentifier():  # the message does not quote it: it may be the key itself
            raise RewardError("reward 'unifiedreward': api_key_variable must name an environment variable")
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise RewardError(f"the environment variable {key_variable} holds characters that no API key can have")
        self._session = requests.Session()
        # A proxy of the environment is for other machines, not for a server on this one.
        here = urlsplit(self.root).hostname in ("127.0.0.1", "localhost", "::1")
        self._session.trust_env = not here
        if self._key:
            self._session.auth = self._authorise
            if not here and self.root.startswith("http:"):
                warnings.warn(f"reward 'unifiedreward': the key goes unencrypted to {self.root}", stacklevel=3)
        retry = _PatientRetry(
            total=retries,
            backoff_factor=backoff,
            status_forcelist=(429, *range(500, 600)),
            allowed_methods={"POST"},
            raise_on_status=False,
        )
        self._session.mount(self.root + "/chat", HTTPAdapter(pool_maxsize=connections, max_retries=retry))

    def check(self) -> None:
        """Raises `RewardError` unless the server lists its models; asks once only, so that a dead one is seen soon."""
        self._request("GET", "/models", timeout=(self._timeout[0], self._timeout[0]))

    def ask(self, model: str, image_url: str, question: str) -> str:
        """The answer to a picture and a question, greedily decoded.

        Raises:
            RewardError: no answer after all retries, a refusal, or something that is no chat completion.
        """
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        response = self._request("POST", "/chat/completions", timeout=self._timeout, json=body)
        try:
            answer = response.json()["choices"][0]["message"]["content"] or ""
            if not isinstance(answer, str):
                raise TypeError("its content is no text")
            return answer
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._error("gave an answer that is no chat completion", response.text) from error

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            # A redirection would take pictures and prompts to a machine that nobody named.
            response = self._session.request(method, self.root + path, allow_redirects=False, **options)
        except requests.RequestException as error:
            raise self._error(f"does not answer {method} {path}", str(error), f". To start one: {SERVE}") from error
        if response.status_code in (401, 403):
            remedy = f". The key belongs into the environment variable {self._key_variable}"
            raise self._error(f"wants another key (HTTP {response.status_code})", response.text, remedy)
        if response.status_code != 200:
            raise self._error(f"answers {method} {path} with HTTP {response.status_code}", response.text)
        return response

    def _authorise(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _error(self, what: str, detail: str, remedy: str = "") -> RewardError:
        """The detail comes from outside, and without the key: a server may quote the one it refuses."""
        hidden = detail.replace(self._key, "***") if self._key else detail
        return RewardError(f"reward 'unifiedreward': the server {self.root} {what}: {_shortened(hidden)}{remedy}")


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
            timeout: seconds without a byte from the server after which a request has failed.
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
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="unifiedreward") as pool:
            answers = list(pool.map(lambda pair: self._ask(*pair), pairs))
        values = [final_score(answer) for answer in answers]
        unparsable = np.array([value is None for value in values], dtype=np.float64)
        if not self._warned and unparsable.any():
            self._warned = True
            first = answers[values.index(None)]
            warnings.warn(f"reward 'unifiedreward': an answer without a score: {_shortened(first)!r}", stacklevel=2)
        scores = [NOT_APPLICABLE if value is None else value / 5 for value in values]
        return {"unifiedreward": np.array(scores, dtype=np.float64), "unifiedreward_unparsable": unparsable}

    def _ask(self, image: Image.Image, prompt: str) -> str:
        return self._server.ask(self._model, data_url(image), self._question.replace("{prompt}", prompt))
