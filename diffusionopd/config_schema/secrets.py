"""Secrets: kept out of configurations, whose values are saved, logged and printed, and out of messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffusionopd.config_schema.problems import ConfigError

_NAME = re.compile(r"(.*[_.-])?(api_?key|token|password|passwd|secret|authorization|credentials?)", re.IGNORECASE)
_VARIABLE = re.compile(r"(.*_)?(KEY|TOKEN|PASSWORD|PASSWD|SECRET)")
# Tokens of the Hugging Face hub, of OpenAI-compatible services and of GitHub, which begin in a form of their own.
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsur]_[A-Za-z0-9]{16,})")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY_OF_URL = re.compile(r"(://[^\s?'\")>]*)\?[^\s'\")>]+")  # where signatures stand
_SHORTEST = 6  # characters; a shorter value of a variable may be part of any word

REMEDY = (
    "Settings are saved and logged: put it into an environment variable instead, HF_TOKEN for the hub, WANDB_API_KEY "
    "for wandb, and for a scorer the one that its option api_key_variable names"
)


def redacted(text: object) -> str:
    """The text without secrets of the environment, tokens, and user names, passwords and queries of URLs."""
    result = str(text)
    for secret in sorted(_of_environment().values(), key=len, reverse=True):
        result = result.replace(secret, "***")
    return _QUERY_OF_URL.sub(r"\1", _USER_IN_URL.sub("", _TOKEN.sub("***", result)))


def check_no_secrets(config: Mapping[str, Any]) -> None:
    """Raise ConfigError, which names the places and no values, for a configuration that holds secrets."""
    if found := [f"{place} {what}. {REMEDY}." for place, what in find_secrets(config)]:
        raise ConfigError(found)


def find_secrets(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Where settings hold what must not be saved, and why it is taken for that; the values are left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = redacted(key)
            yield from find_secrets(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from find_secrets(inner, f"{place}[{index}]")
    elif isinstance(value, str) and value.strip():
        if _NAME.fullmatch(place):
            yield place, "holds a secret, by its name"
        elif names := [name for name, secret in _of_environment().items() if secret in value]:
            yield place, f"holds the value of the environment variable {names[0]}"
        elif _TOKEN.search(value):
            yield place, "holds an access token"
        elif _USER_IN_URL.search(value):
            yield place, "holds a URL with a user name or password"


def _of_environment() -> dict[str, str]:
    """The environment variables whose names say that they are secret, with their values."""
    named = {name: value.strip() for name, value in os.environ.items() if _VARIABLE.fullmatch(name)}
    return {name: value for name, value in named.items() if len(value) >= _SHORTEST}
