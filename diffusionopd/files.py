"""Where paths lead, atomic writes, digests, early checks: the one place for what the project does to files."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
PROJECT = _ROOT if (_ROOT / "scripts" / "train_opd.py").is_file() else None
"""The checkout that this package is in, with scripts, configurations and the tiny world; None for a copy elsewhere."""


class FolderError(ValueError):
    """Raised where a folder or file that is to be written cannot be; names it, the reason and the remedy."""


def user_path(text: str) -> str:
    """``text`` with a leading ``~`` or ``~name`` replaced by that home, as a shell does where it sees one.

    FolderError for a user without a home, rather than a folder named ``~name``.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise FolderError(f"{text}: there is no such home folder; write the path in full, or ./{text} for that name")
    return path


def path_flag(text: str) -> Path:
    """`user_path` as the type of a command-line flag."""
    return Path(user_path(text))


def located(text: str) -> str:
    """Where something to read is: in the current folder, else, such as ``assets/tiny/model``, in the project's.

    What is in neither stays as it is (it may be on the hub). FolderError as of `user_path`.
    """
    path = user_path(text)
    if path[:1] in ("", ".", os.sep) or PROJECT is None or os.path.exists(path):
        return path
    own = os.path.join(PROJECT, path)
    return own if os.path.exists(own) else path


def looked_in(path: str | Path) -> str:
    """`` in FOLDER`` for messages about a path that is not there: where `located` looked; empty if it is absolute."""
    if os.path.isabs(path):
        return ""
    folders = dict.fromkeys([os.getcwd(), str(PROJECT)] if PROJECT and not str(path).startswith(".") else [os.getcwd()])
    return f" in {' or '.join(folders)}"


def write_atomically(path: str | Path, content: bytes | str, *, fsync: bool = False) -> Path:
    """Write all of ``content`` (text as UTF-8) to ``path`` or nothing, making missing folders; returns the path.

    A reader sees the old file or the new one. With ``fsync`` the new one also survives a loss of power from here on.
    An OSError leaves what was there before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if fsync:
            force_to_disk(partial)
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    if fsync:
        force_to_disk(path.parent)
    return path


def write_json(path: str | Path, value: Any, *, fsync: bool = False) -> Path:
    """`write_atomically` of ``value`` as indented JSON. TypeError or ValueError for what JSON cannot hold."""
    return write_atomically(path, json.dumps(value, indent=2) + "\n", fsync=fsync)


def set_aside(path: str | Path) -> Path | None:
    """Rename a file to the first free ``<name>.<n>``; None if it is not there or empty."""
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        return None
    free = next(aside for n in count(1) if not (aside := path.with_name(f"{path.name}.{n}")).exists())
    return path.rename(free)


def sha256(path: str | Path) -> str:
    """The digest of a file's content in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def force_to_disk(path: str | Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(where: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Turn an error of the disk inside the block into FolderError: ``what`` lies at ``where``, and ``remedy``."""
    try:
        yield
    except OSError as error:
        raise FolderError(f"the {what} {where} cannot be written: {error}. {remedy}") from error


def ensure_writable(folder: str | Path, what: str, remedy: str) -> None:
    """Make ``folder`` and write and remove a small file in it. Arguments and error as of `writing`.

    Permissions alone do not tell: a read-only or full disk and a network drive's own rules are found by writing only.
    """
    probe = Path(folder) / f".writable-{uuid.uuid4().hex[:8]}"
    with writing(folder, what, remedy):
        try:
            write_atomically(probe, bytes(4096), fsync=True)
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
