"""Files of the catalogue: received beside their place, verified, and only then moved there.

Their digests are recorded beside them in `SHA256SUMS`, which `sha256sum -c` reads too.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from diffusionopd.files import force_to_disk, sha256, write_atomically
from tools.downloads.catalogue import HUB, File
from tools.downloads.convert import CONVERSIONS
from tools.downloads.transfer import LARGEST, DownloadError, Refused, receive, receive_from_hub, resolve, stated

SUMS = "SHA256SUMS"


def fetch(file: File, root: Path, force: bool = False, pause: float = 1.0) -> bool:
    """See to it that a file is in its place under `root`, complete. Returns whether it had to be loaded.

    What is there is checked against the digest of the catalogue, the one recorded when it was loaded, or what its
    server says of it. A file that differs is never replaced unasked: it may be someone's own.

    Args:
        force: load and replace the file, whatever is there.
        pause: see `transfer.receive`.

    Raises:
        DownloadError: another file is there; or no source has it, or sends something else.
    """
    path = root / file.path
    for url in file.urls:
        try:
            if path.exists() and not force:
                verify(file, path, url)
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            _load(url, file, path, pause)
            return True
        except Refused as error:
            refused = error
        except OSError as error:
            raise DownloadError(f"{path} cannot be written: {error.strerror or type(error).__name__}") from None
    raise refused


def verify(file: File, path: Path, url: str) -> None:
    """Check a file that is there, by its source at `url` where nothing else is known of it, and record its digest.

    Raises DownloadError if it is not what it should be.
    """
    actual, size = sha256(path), path.stat().st_size
    expected, expected_size = recorded(path) or file.sha256, 0  # the catalogue has beginnings of some
    if not expected and file.convert:  # of what is made of a source, that says nothing
        raise DownloadError(f"nothing is known to compare {path} with. --force makes it again")
    if not expected:
        expected_size, expected = stated(url)
    if not (actual.startswith(expected) and actual.startswith(file.sha256)) or (
        expected_size and expected_size != size
    ):
        raise DownloadError(
            f"{path} has {size} bytes and SHA-256 {actual[:12]}… where {expected_size or 'a file'} and "
            f"{expected[:12]}… are expected. If it is your own, move it away; if damaged, load it again with --force"
        )
    if recorded(path) != actual:
        record(path, actual)


def _load(url: str, file: File, path: Path, pause: float) -> None:
    """Load, verify and put into place. What does not verify is removed; what was not verified yet stays."""
    place = path.with_name(f"{path.name}.part")  # a file, or the hub client's folder
    if url.startswith(HUB):
        partial, expected = receive_from_hub(url, place), stated(url)[1]
    else:
        partial, expected = place, file.sha256
        receive(resolve(url), partial, pause, file.size if file.size and not file.convert else LARGEST)
    more = [path.with_name(f"{path.name}.{number}.part") for number, _ in enumerate(file.also)]
    for another, to in zip(file.also, more, strict=True):
        receive(resolve(another), to, pause)
    made = path.with_name(f"{path.name}.made.part") if file.convert else partial
    keep = False
    try:
        if file.convert:
            made.write_bytes(CONVERSIONS[file.convert]([each.read_bytes() for each in (partial, *more)]))
        actual = sha256(made)
        if not actual.startswith(expected):
            raise DownloadError(
                f"what was sent for {path} is not the published file (SHA-256 {actual[:12]}… instead of "
                f"{expected[:12]}…). Nothing of it is kept; try again, or without mirrors and proxies"
            )
        force_to_disk(made)
        os.replace(made, path)
        record(path, actual)
    except (OSError, KeyboardInterrupt):  # nothing is known against it
        keep = True
        raise
    finally:
        if not keep:
            for each in (partial, *more, made):
                each.unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)


# ---- Digests ---------------------------------------------------------------------------------------------------------


def recorded(path: Path) -> str:
    """The digest recorded for a file, or "" if there is none."""
    return _sums(path).get(path.name, "")


def record(path: Path, digest: str) -> None:
    """Enter a file's SHA-256, in place of an earlier one."""
    entries = sorted((_sums(path) | {path.name: digest}).items())
    write_atomically(path.with_name(SUMS), "".join(f"{digest}  {name}\n" for name, digest in entries))


def _sums(path: Path) -> dict[str, str]:
    """File name -> digest; lines of another form are left out."""
    sums = path.with_name(SUMS)
    text = sums.read_text(encoding="utf-8", errors="replace") if sums.is_file() else ""
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64}) [ *](.+)$", text, re.MULTILINE)}
