"""The error of a download, and what its message must not hold."""

from __future__ import annotations

import os
import re

_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_IN_URLS = re.compile(r"(?<=://)[^/\s@]+@|\?[^\s'\")>]+")  # user and password; a query, where signatures stand


class DownloadError(ValueError):
    """Something could not be downloaded; the message says what, why and the remedy."""


class Refused(DownloadError):
    """The source does not give the file, or has it no more; another one may."""


def redacted(text: object) -> str:
    """The text without tokens of the environment, without user names, passwords and queries of URLs."""
    result = str(text)
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        result = result.replace(secret, "***")
    return _IN_URLS.sub("", result)
