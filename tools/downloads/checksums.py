"""SHA-256 digests of files, recorded beside them in `SHA256SUMS`, which `sha256sum -c` reads too."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

SUMS = "SHA256SUMS"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded(path: Path) -> str:
    """The digest recorded for a file, or "" if there is none."""
    return _read(path.with_name(SUMS)).get(path.name, "")


def record(path: Path, sha256: str) -> None:
    """Enter a file's digest, in place of an earlier one."""
    sums = path.with_name(SUMS)
    entries = _read(sums) | {path.name: sha256}
    replace_atomically(sums, "".join(f"{digest}  {name}\n" for name, digest in sorted(entries.items())).encode())


def replace_atomically(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_bytes(content)
    move_into_place(partial, path)


def move_into_place(partial: Path, path: Path) -> None:
    """Rename a finished file once its content is safely on the disk, and see to it that the name is too."""
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(sums: Path) -> dict[str, str]:
    """File name -> digest; lines of another form are left out."""
    if not sums.is_file():
        return {}
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    matches = (re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines)
    return {match[2]: match[1] for match in matches if match}
