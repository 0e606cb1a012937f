"""A client of OpenAI-compatible chat servers that repeats what may pass, and never waits for ever."""

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

MAX_TOKENS = 4096  # of an answer, as in the official local inference; the official client leaves it to the server
_PASSING = (429, *range(500, 600))  # statuses that may be other ones soon
LARGEST_ANSWER = 2**22  # bytes
LONGEST_PAUSE = 60.0  # seconds; a server may ask for hours in Retry-After

SERVE = (
    "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --served-model-name "
    "UnifiedReward-7b-v1.5 --port 17140 --chat-template chatml-llava --mem-fraction-static 0.85"
)
"""Starts the server of the defaults; sglang is best installed in an environment of its own."""


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


def shortened(text: str, length: int = 300) -> str:
    """The text for a terminal: one line of ``length`` characters, none of them for control, which moves its cursor."""
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
            status_forcelist=_PASSING,
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
            RewardUnavailableError: no answer after all retries, or not all of it within the timeout.
            RewardError: a refusal, or something that is no chat completion.
        """
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        answer = self._request("POST", "/chat/completions", timeout=self._timeout, json=body)
        try:
            said = json.loads(answer)["choices"][0]["message"]["content"] or ""
            if not isinstance(said, str):
                raise TypeError("its content is no text")
            return said
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._error("gave an answer that is no chat completion", answer.decode("utf-8", "replace")) from error

    def _request(self, method: str, path: str, **options: Any) -> bytes:
        """The content of an answer with status 200."""
        try:
            # A redirection would take pictures and prompts to a machine that nobody named.
            options |= {"allow_redirects": False, "stream": True}
            with self._session.request(method, self.root + path, **options) as response:
                content = self._content(response, options["timeout"][1])
        except requests.RequestException as error:
            what, remedy = f"does not answer {method} {path}", f". To start one: {SERVE}"
            raise self._error(what, str(error), remedy, RewardUnavailableError) from error
        status, text = response.status_code, content.decode("utf-8", "replace")
        if status in (401, 403):
            remedy = f". The key belongs into the environment variable {self._key_variable}"
            raise self._error(f"wants another key (HTTP {status})", text, remedy)
        if status != 200:
            passes = RewardUnavailableError if status in _PASSING else RewardError
            raise self._error(f"answers {method} {path} with HTTP {status}", text, kind=passes)
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
        return kind(f"reward 'unifiedreward': the server {self.root} {what}: {shortened(hidden)}{remedy}")
