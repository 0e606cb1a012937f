"""Folders that are to be written: found out by writing, before anything expensive."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class FolderError(ValueError):
    """A folder that cannot be written; the message names it, the reason and the remedy."""


@contextmanager
def writing(where: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Turn an error of the disk inside the block into FolderError: ``what`` lies at ``where``, and ``remedy``."""
    try:
        yield
    except OSError as error:
        raise FolderError(f"the {what} {where} cannot be written: {error}. {remedy}") from error


def ensure_writable(folder: str | Path, what: str, remedy: str) -> None:
    """Make ``folder`` and write, force to the disk and remove a small file in it. Arguments and error as of `writing`.

    Permissions alone do not tell: a read-only or full disk and a network drive's own rules are found by writing only.
    """
    folder = Path(folder)
    probe = folder / f".writable-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with writing(folder, what, remedy):
            folder.mkdir(parents=True, exist_ok=True)
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
