"""Files of the catalogue: received beside their place, verified, and only then moved there."""

from __future__ import annotations

from pathlib import Path

from tools.downloads.catalogue import File
from tools.downloads.checksums import move_into_place, record, recorded, replace_atomically, sha256_of
from tools.downloads.errors import DownloadError, Refused
from tools.downloads.extracts import EXTRACTS
from tools.downloads.transfer import LARGEST, Facts, ask, receive, resolve


def fetch(file: File, root: Path, force: bool = False, pause: float = 1.0) -> bool:
    """See to it that a file is in its place under `root`, whole. Returns whether it had to be loaded.

    What is there is checked against the digest of the catalogue, the one recorded when it was loaded, or what its
    server says of it. A file that differs is never replaced unasked: it may be someone's own.

    Args:
        force: load and replace the file, whatever is there.
        pause: see `receive`.

    Raises:
        DownloadError: another file is there; or no source has it, or sends something else.
    """
    path = root / file.path
    if path.exists() and not force:
        verify(file, path)
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = _load(file, path, pause)
        record(path, sha256)
    except OSError as error:
        raise DownloadError(f"{path} cannot be written: {error.strerror or type(error).__name__}") from None
    return True


def verify(file: File, path: Path) -> None:
    """Check a file that is there, and record its digest. Raises DownloadError if it is not what it should be."""
    actual = sha256_of(path)
    expected = file.sha256 or recorded(path)
    if not expected:
        facts = ask(resolve(file.urls[0]))
        expected = facts.sha256
        if facts.size and facts.size != path.stat().st_size:
            raise DownloadError(
                f"{path} has {path.stat().st_size} bytes where its source has {facts.size}. {_remedy(path)}"
            )
    if not actual.startswith(expected):
        raise DownloadError(f"{path} has SHA-256 {actual[:12]}… where {expected[:12]}… is expected. {_remedy(path)}")
    if recorded(path) != actual:
        record(path, actual)


def _remedy(path: Path) -> str:
    return f"If {path.name} is your own, move it away; if it is damaged, load it again with --force"


def _load(file: File, path: Path, pause: float) -> str:
    """Load, verify and put into place; returns the SHA-256. What does not verify is removed."""
    partial = path.with_name(f"{path.name}.part")
    facts = _from_first_source(file, partial, pause)
    if file.extract:
        source = partial.read_bytes()
        partial.unlink()
        replace_atomically(partial, EXTRACTS[file.extract](source))
        facts = Facts(0, "")  # the source's, not those of what is kept
    actual = sha256_of(partial)
    for expected in (file.sha256, facts.sha256):
        if not actual.startswith(expected):
            partial.unlink()
            raise DownloadError(
                f"what was sent for {path} is not the published file (SHA-256 {actual[:12]}… instead of "
                f"{expected[:12]}…). Nothing of it is kept; try again, or without mirrors and proxies"
            )
    move_into_place(partial, path)
    return actual


def _from_first_source(file: File, partial: Path, pause: float) -> Facts:
    """Receive from the first source that gives the file. Raises DownloadError; if none does, that of the last."""
    *others, last = (resolve(url) for url in file.urls)
    largest = file.size if file.size and not file.extract else LARGEST
    for url in others:
        try:
            return receive(url, partial, pause, largest)
        except Refused:
            partial.unlink(missing_ok=True)
    return receive(last, partial, pause, largest)
