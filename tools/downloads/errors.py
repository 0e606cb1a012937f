"""The errors of a download; their messages are `redacted`."""

from __future__ import annotations

from diffusionopd.config_schema import redacted

__all__ = ["DownloadError", "Refused", "redacted"]


class DownloadError(ValueError):
    """Something could not be downloaded; the message says what, why and the remedy."""


class Refused(DownloadError):
    """The source does not give the file, or has it no more; another one may."""
