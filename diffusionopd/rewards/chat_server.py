"""A client of OpenAI-compatible vision servers that repeats requests after passing failures, within time limits."""

import json
import os
import time
import warnings
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from diffusionopd.rewards.base import RewardError, RewardUnavailableError

MAX_TOKENS = 4096  # of an answer, as in UnifiedReward's local inference; its official client leaves it to the server
_TEMPORARY = (429, *range(500, 600))  # statuses that may be other ones soon
LARGEST_ANSWER = 2**22  # bytes
LONGEST_PAUSE = 60.0  # seconds; a server may ask for hours in Retry-After
_HERE = ("127.0.0.1", "localhost", "::1")


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
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise RewardError(f"base_url must look like http://127.0.0.1:17140, not {base_url!r}")
    return base_url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def shortened(text: str, length: int = 300) -> str:
    """The text for a terminal: one line of ``length`` characters, none of them for control, which moves its cursor."""
    text = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * length])
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + " ..."


class _BoundedRetry(Retry):
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
        start: str = "",
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        retries: int = 3,
        backoff: float = 1.0,
        connections: int = 8,
    ):
        """Read the key and prepare connections; nothing is sent yet.

        Args:
            base_url: see `api_root`.
            key_variable: the environment variable with the key; no key is sent if it is not set.
            start: the command that starts such a server, for messages.
            timeout: seconds without a byte from the server, or for all of its answer once that has begun, after which a
                request has failed.
            connect_timeout: seconds for the connection, and for an answer to `check`.
            retries: how often a question is repeated after a failure, a 429 or a 5xx.
            backoff: repetition n waits `backoff * 2**(n-1)` seconds, the first none; Retry-After goes before it.
            connections: kept open.

        Raises:
            RewardError: an address or a key that cannot be one.
        """
        self.root, self._start = api_root(base_url), start
        self._key_variable, self._timeout = key_variable, (connect_timeout, timeout)
        if key_variable and not key_variable.isidentifier():  # the message does not quote it: it may be the key itself
            raise RewardError("api_key_variable must name an environment variable")
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise RewardError(f"the environment variable {key_variable} holds characters that no API key can have")
        self._session = requests.Session()
        here = urlsplit(self.root).hostname in _HERE
        self._session.trust_env = not here  # a proxy of the environment is for other machines, not for this one
        if self._key:
            self._session.auth = self._authorise
            if not here and self.root.startswith("http:"):
                warnings.warn(f"the API key goes unencrypted to {self.root}", stacklevel=3)
        retry = _BoundedRetry(
            total=retries,
            backoff_factor=backoff,
            status_forcelist=_TEMPORARY,
            allowed_methods={"POST"},
            raise_on_status=False,
        )
        self._session.mount(self.root + "/chat", HTTPAdapter(pool_maxsize=connections, max_retries=retry))

    def check(self) -> None:
        """Raises `RewardError` unless the server lists its models; asks once only, so that a dead one is seen soon."""
        self._request("GET", "/models", self._timeout[0])

    def ask(self, model: str, image_url: str, question: str) -> str:
        """The answer to an image and a question, greedily decoded.

        Raises:
            RewardUnavailableError: no answer after all retries, or not all of it within the timeout.
            RewardError: a refusal, or something that is no chat completion.
        """
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        answer = self._request("POST", "/chat/completions", self._timeout[1], json=body)
        try:
            said = json.loads(answer)["choices"][0]["message"]["content"] or ""
            if not isinstance(said, str):
                raise TypeError("its content is no text")
            return said
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._error("gave an answer that is no chat completion", answer.decode("utf-8", "replace")) from error

    def _request(self, method: str, path: str, seconds: float, **body: Any) -> bytes:
        """The content of an answer with status 200."""
        # A redirection would take images and prompts to a machine that nobody named.
        options = {"timeout": (self._timeout[0], seconds), "allow_redirects": False, "stream": True, **body}
        try:
            with self._session.request(method, self.root + path, **options) as response:
                content = self._content(response, seconds)
        except requests.RequestException as error:
            raise self._error(
                f"does not answer {method} {path}", str(error), f". To start one: {self._start}", RewardUnavailableError
            ) from error
        status, text = response.status_code, content.decode("utf-8", "replace")
        if status in (401, 403):
            remedy = f". The key belongs into the environment variable {self._key_variable}"
            raise self._error(f"wants another key (HTTP {status})", text, remedy)
        if status != 200:
            kind = RewardUnavailableError if status in _TEMPORARY else RewardError
            raise self._error(f"answers {method} {path} with HTTP {status}", text, kind=kind)
        return content

    @staticmethod
    def _content(response: requests.Response, seconds: float) -> bytes:
        """The body, read as it comes: a server that trickles never lets the timeout between two bytes pass."""
        parts, deadline = [], time.monotonic() + seconds
        for part in response.iter_content(chunk_size=1):
            parts.append(part)
            if time.monotonic() > deadline:
                raise requests.Timeout(f"the answer is not complete after {seconds:g} seconds")
            if len(parts) > LARGEST_ANSWER:
                raise requests.RequestException(f"the answer has more than {LARGEST_ANSWER:,} bytes")
        return b"".join(parts)

    def _authorise(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _error(self, what: str, detail: str, remedy: str = "", kind: type[RewardError] = RewardError) -> RewardError:
        """The detail comes from outside, and without the key: a server may quote the one it refuses."""
        hidden = detail.replace(self._key, "***") if self._key else detail
        return kind(f"the reward server {self.root} {what}: {shortened(hidden)}{remedy}")
