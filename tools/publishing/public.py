"""What may leave this machine: values without secrets and without its paths."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from diffusionopd.config_schema import find_secrets, redacted

# An absolute path inside a text, as in "mmdet:/home/me/config.py"; in "https://host/a" a second slash follows.
_LOCAL = re.compile(r"(?:(?<=^)|(?<=[\s:=,;'\"(\[]))(?:file://)?(?:~[\w-]*)?(?:/(?!/)[^\s:,;'\")\]]+)+")
_ELSEWHERE = ".../"
"""Stands for the folders of a path; a configuration with it is refused as a placeholder."""


def public(value: Any, place: str = "") -> Any:
    """A JSON value without secrets and absolute local paths, of which only the last name stays."""
    if isinstance(value, Mapping):
        return {redacted(name): public(inner, f"{place}.{name}" if place else name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner, f"{place}[{index}]") for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    if any(find_secrets(value, place)):
        return "***"
    if value.startswith(("/", "~")):  # the whole text is one, also with blanks
        return _shortened(redacted(value))
    return _LOCAL.sub(lambda found: _shortened(found[0]), redacted(value))


def _shortened(path: str) -> str:
    return _ELSEWHERE + PurePosixPath(path).name
