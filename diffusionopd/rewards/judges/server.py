"""A vision-language model behind an OpenAI-compatible server: what is asked, in what form, and what is done in trouble.

Any server will do that lists its models at `/models` and answers `/chat/completions` (vLLM, sglang, a paid service).
"""

import base64
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from diffusionopd.config_schema import is_number
from diffusionopd.rewards.base import RewardError, RewardUnavailableError, Scores, not_whole
from diffusionopd.rewards.images import Images, each_uint8

LONGEST_PAUSE = 60  # seconds; a server may ask for hours in Retry-After
_TEMPORARY = (429, *range(500, 600))  # statuses that may be other ones soon
MOST_TOKENS = 20  # alternatives to the first token; the most that OpenAI's interface and vLLM's default give


@dataclass(frozen=True)
class Answer:
    """What the model says, without its thoughts; with `Question.probabilities` what it might have said first.

    `first`: token -> probability, of the most probable ones.
    """

    text: str
    first: Mapping[str, float] = field(default_factory=dict)

    def word(self) -> str:
        """The first word, in lower case and without what is around it; "" if there is none."""
        found = re.search(r"\w+", self.text)
        return found[0].lower() if found else ""


@dataclass(frozen=True)
class Question:
    """What is asked about an image; `read` makes a value of an answer, None of one that cannot be used."""

    text: str
    read: Callable[[Answer], Any]
    system: str = ""
    image_first: bool = True
    max_tokens: int = 4096  # as in UnifiedReward's local inference; its official client leaves it to the server
    probabilities: bool = False


def data_url(pixels: np.ndarray, side: int = 0) -> str:
    """A uint8 `[H, W, 3]` image as a PNG in a data URL, at its own size, or `side` pixels a side (bicubic)."""
    image, stream = Image.fromarray(pixels), io.BytesIO()
    (image.resize((side, side)) if side else image).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


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


@dataclass(eq=False)
class JudgeServer:
    """The connection to a judge, with the options that each scorer has that asks one.

    A subclass is a scorer: it has `asked`, the questions about one image, and `row`, what their answers score.

    base_url: see `api_root`.
    model: the name under which the server has the model.
    api_key_variable: the environment variable with the key; no key is sent if it is not set.
    timeout: seconds without a byte from the server after which a request has failed.
    connect_timeout: seconds for the connection, and for the first answer.
    retries: how often a request is repeated after a failure, a 429 or a 5xx.
    backoff: repetition n waits `backoff * 2**(n-1)` seconds, the first none; Retry-After goes before it.
    concurrency: requests under way at once, of each process.
    attempts: how often a question is asked until its answer can be read.
    extra: further fields of each request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.
    """

    base_url: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    api_key_variable: str = "JUDGE_API_KEY"
    timeout: float = 60.0
    connect_timeout: float = 5.0
    retries: int = 3
    backoff: float = 1.0
    concurrency: int = 8
    attempts: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    name: ClassVar[str]
    """Of the reward."""
    start: ClassVar[str] = "vllm serve {model} --host 127.0.0.1 --port 8000"
    """The command that starts a server."""
    must_be_listed: ClassVar[bool] = True
    """Whether a server that names its models must name this one."""
    side: ClassVar[int] = 0
    """Pixels a side of the images as they are sent; 0 for their own size."""
    asks: ClassVar[str] = ""
    """The option that names the file with what is asked; "" if there is none."""

    def __post_init__(self) -> None:
        """See that the options can be used and that the server is there.

        Raises:
            RewardError: they cannot, or the server does not list its models, or not this one.
        """
        if found := self.problems(**{each.name: getattr(self, each.name) for each in fields(self)}):
            raise RewardError(f"reward '{self.name}': {'; '.join(found)}")
        self._warned = False
        self._root, self._key = api_root(self.base_url), read_key(self.api_key_variable)
        self._session = requests.Session()
        here = urlsplit(self._root).hostname in ("127.0.0.1", "localhost", "::1")
        self._session.trust_env = not here  # a proxy of the environment is for other machines, not for this one
        if self._key:
            self._session.headers["Authorization"] = f"Bearer {self._key}"
            if not here and self._root.startswith("http:"):
                warnings.warn(f"the API key goes unencrypted to {self._root}", stacklevel=4)
        retry = Retry(
            total=self.retries,
            backoff_factor=self.backoff,
            status_forcelist=_TEMPORARY,
            allowed_methods={"POST"},
            raise_on_status=False,
            retry_after_max=LONGEST_PAUSE,
        )
        self._session.mount(self._root + "/chat", HTTPAdapter(pool_maxsize=self.concurrency, max_retries=retry))
        # Once only, so that a server that is not there is seen soon.
        self._check_model(self._request("GET", "/models", self.connect_timeout))

    @classmethod
    def problems(cls, **options: Any) -> list[str]:
        """What is wrong with options, found without asking a server; those left out are the defaults."""
        given: dict[str, Any] = {each.name: each.default for each in fields(cls)} | options
        found = not_whole({"concurrency": 1, "attempts": 1, "retries": 0}, **given)
        found += [
            f"{name} must be seconds above 0, not {name}={given[name]!r}"
            for name in ("timeout", "connect_timeout")
            if not is_number(given[name]) or given[name] <= 0
        ]
        if not is_number(given["backoff"]) or given["backoff"] < 0:
            found.append(f"backoff must be seconds of at least 0, not backoff={given['backoff']!r}")
        if not isinstance(given["model"], str) or not given["model"]:
            found.append("model must be the name under which the server has the model")
        if "extra" in options and not isinstance(options["extra"], Mapping):
            found.append("extra must be {field: value}")
        for read, value in ((api_root, given["base_url"]), (read_key, given["api_key_variable"])):
            try:
                read(str(value))
            except RewardError as error:
                found.append(str(error))
        return found

    @classmethod
    def files(cls, options: Mapping[str, Any]) -> list[str]:
        """The files that the scores depend on."""
        return [options.get(cls.asks, getattr(cls, cls.asks))] if cls.asks else []

    def asked(self, prompt: str, metadata: Mapping[str, Any]) -> list[Question]:
        """What is asked about an image of a prompt. Raises `UnfitPromptError` for one that lacks what it takes."""
        raise NotImplementedError

    def row(self, prompt: str, metadata: Mapping[str, Any], values: Sequence[Any]) -> dict[str, float]:
        """The scores of one image by name, from what its questions read in their answers."""
        raise NotImplementedError

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`; all questions about all images are asked side by side.

        Raises:
            UnfitPromptError: as `asked`, first of all.
            RewardError: a request fails for good; there is no silent score.
        """
        pairs = list(zip(prompts, metadata, strict=True))
        questions = [self.asked(*pair) for pair in pairs]
        urls = [data_url(pixels, self.side) for pixels in each_uint8(images)]
        values = iter(self._read([(url, each) for url, own in zip(urls, questions, strict=True) for each in own]))
        rows = [self.row(*pair, list(islice(values, len(own)))) for pair, own in zip(pairs, questions, strict=True)]
        return {key: np.array([row[key] for row in rows], np.float64) for key in (rows[0] if rows else [self.name])}

    def _read(self, asked: Sequence[tuple[str, Question]]) -> list[Any]:
        """What answers to questions about images say, in order; the first one that could not be read is shown once."""
        # Its threads are daemons, unlike a ThreadPoolExecutor's: a server that hangs does not delay the exit.
        with ThreadPool(min(self.concurrency, len(asked) or 1)) as pool:
            # The first error ends it; what has not begun is left out.
            found = list(pool.imap(lambda each: self._ask(*each), asked))
        unreadable = next((answer for answer, value in found if value is None), None)
        if unreadable and not self._warned:
            self._warned = True
            said = shortened(unreadable.text)
            warnings.warn(f"reward '{self.name}': an answer without a score: {said!r}", stacklevel=3)
        return [value for _, value in found]

    def _ask(self, image: str, question: Question) -> tuple[Answer, Any]:
        """The answer to a question about the image of a data URL, greedily decoded, and what is read in it.

        It is the last answer if none of the attempts can be read.
        """
        for _ in range(self.attempts):
            answer = self._ask_once(image, question)
            if (value := question.read(answer)) is not None:
                break
        return answer, value

    def _ask_once(self, image: str, question: Question) -> Answer:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": question.text},
        ]
        messages = [{"role": "user", "content": parts if question.image_first else parts[::-1]}]
        if question.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": question.system}]})
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": question.max_tokens}
        if question.probabilities:
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": MOST_TOKENS}
        answer = self._request("POST", "/chat/completions", self.timeout, json=body | dict(self.extra))
        try:
            choice = answer.json()["choices"][0]
            text = choice["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise self._error("gave an answer that is no chat completion", answer.text) from error
        first = self._first_tokens(choice, answer.text) if question.probabilities else {}
        # Thoughts that max_tokens cuts off end nowhere, and no answer follows.
        return Answer(re.sub(r"(?s)^.*</think>\s*|<think>.*", "", text), first)

    def _first_tokens(self, choice: Any, text: str) -> dict[str, float]:
        """Token -> probability, of what the first token of a completion could have been."""
        try:
            listed = choice["logprobs"]["content"][0]["top_logprobs"]
            found: dict[str, float] = {}
            for each in listed:  # two tokens may be the same text, in part of a character
                if not (p := math.exp(each["logprob"])) <= 1.001:  # nor is NaN
                    raise ValueError(f"a logprob is {each['logprob']}")
                found[each["token"]] = found.get(each["token"], 0.0) + p
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            remedy = "; this score is made of them: use a server that does (vLLM, sglang)"
            raise self._error("gives no probabilities of tokens (logprobs)", text, remedy) from error
        return found

    def _check_model(self, listed: requests.Response) -> None:
        """`RewardError` if the server names its models and this one is not among them."""
        if not self.must_be_listed:
            return
        try:
            names = [str(each["id"]) for each in listed.json()["data"]]
        except (ValueError, LookupError, TypeError):
            return  # no list that could be read; the first answer will tell
        if names and self.model not in names:
            shown = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
            raise RewardError(
                f"reward '{self.name}': the server {self._root} has no model {self.model!r}, but {shortened(shown)}: "
                f"name it with {self.name}.model"
            )

    def _request(self, method: str, path: str, seconds: float, **body: Any) -> requests.Response:
        """An answer with status 200, for which the server has these seconds."""
        try:
            # A redirection would take images and prompts to a machine that nobody named.
            response = self._session.request(
                method, self._root + path, timeout=(self.connect_timeout, seconds), allow_redirects=False, **body
            )
        except requests.RequestException as error:
            what, remedy = f"does not answer {method} {path}", f". To start one: {self.start.format(model=self.model)}"
            raise self._error(what, str(error), remedy, RewardUnavailableError) from error
        if response.status_code in (401, 403):
            remedy = f". The key belongs into the environment variable {self.api_key_variable}"
            raise self._error(f"wants another key (HTTP {response.status_code})", response.text, remedy)
        if response.status_code != 200:
            kind = RewardUnavailableError if response.status_code in _TEMPORARY else RewardError
            raise self._error(f"answers {method} {path} with HTTP {response.status_code}", response.text, kind=kind)
        return response

    def _error(self, what: str, detail: str, remedy: str = "", kind: type[RewardError] = RewardError) -> RewardError:
        """The detail comes from outside, and without the key: a server may quote the one it refuses."""
        hidden = detail.replace(self._key, "***") if self._key else detail
        return kind(f"the reward server {self._root} {what}: {shortened(hidden)}{remedy}")
