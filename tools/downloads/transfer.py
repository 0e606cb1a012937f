"""One file over HTTP into a partial file: resumed after cuts, here or in an earlier run."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

from tools.downloads.catalogue import GITHUB, HUB
from tools.downloads.errors import DownloadError, Refused, redacted

CHUNK = 2**16  # bytes; what has arrived of a chunk is lost in a cut
TIMEOUT = (10, 60)  # seconds to connect, and between two packets
ATTEMPTS = 5  # connections in a row that bring nothing before it is given up
SPARE = 64 * 2**20  # bytes to leave free on the disk
LARGEST = 16 * 2**30  # bytes of a file whose size is not published: the largest such has 4 GB


@dataclass(frozen=True)
class Facts:
    """What the server says of a file: its size in bytes (0 if it does not) and, on the hub, its SHA-256 (else "")."""

    size: int
    sha256: str


def resolve(url: str) -> str:
    """The address to ask: `HF_ENDPOINT` in place of the hub, `DIFFUSIONOPD_MIRROR` in front of GitHub's."""
    if url.startswith(HUB):
        owner, name, path = url.removeprefix(HUB).split("/", 2)
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{owner}/{name}/resolve/main/{path}"
    if url.startswith(GITHUB) and (mirror := os.environ.get("DIFFUSIONOPD_MIRROR")):
        return f"{mirror.rstrip('/')}/{url}"
    return url


def ask(url: str) -> Facts:
    """What the server says of a file, without loading it. Raises as `receive`."""
    try:
        with _open(url, 0) as response:
            _check_status(response, url)
            return _facts(response, 0)
    except (requests.RequestException, _Interrupted) as error:
        reason = error if isinstance(error, _Interrupted) else type(error).__name__
        raise DownloadError(f"{redacted(url)} cannot be asked ({reason})") from None


def receive(url: str, partial: Path, pause: float = 1.0, largest: int = LARGEST) -> Facts:
    """Load `url` into `partial`, going on behind the bytes that are there already.

    Args:
        pause: seconds before the second attempt; doubled for each further one that brings nothing.
        largest: bytes that the file may have; a server that sends more does not send the file.

    Raises:
        Refused: the server does not have the file, or does not give it.
        DownloadError: something else came, no space, or `ATTEMPTS` attempts in a row brought nothing. What has arrived
            stays in `partial`.
    """
    idle, most = 0, _size(partial)
    while True:
        try:
            return _receive_once(url, partial, largest)
        except (requests.RequestException, _Interrupted) as error:
            idle = 0 if _size(partial) > most else idle + 1
            most = max(most, _size(partial))
            if idle == ATTEMPTS:
                reason = error if isinstance(error, _Interrupted) else type(error).__name__
                raise DownloadError(
                    f"{redacted(url)}: given up after {ATTEMPTS} attempts ({reason}). What has arrived is kept; the "
                    "same command goes on from there"
                ) from None
        time.sleep(pause * 2 ** max(0, idle - 1))


class _Interrupted(Exception):
    """Worth another attempt."""


def _receive_once(url: str, partial: Path, largest: int) -> Facts:
    start = _size(partial)
    with _open(url, start) as response:
        if response.status_code == 416:  # nothing behind these bytes: all are there, or they are not of this file
            total = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
            if total and int(total[1]) == start:
                return Facts(start, _linked_sha256(response))
            partial.unlink(missing_ok=True)
            raise _Interrupted("the partial file does not fit")
        _check_status(response, url)
        if response.status_code == 200:  # everything: a server that knows no ranges
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            partial.unlink(missing_ok=True)
            raise _Interrupted("another part of the file came than was asked for")
        facts = _facts(response, start)
        _check_size(url, partial, facts.size, largest)
        _check_space(partial, facts.size - start)
        _write(response, partial, start, facts.size, largest)
        _check_size(url, partial, _size(partial), largest)
    if facts.size and _size(partial) != facts.size:
        raise _Interrupted(f"{_size(partial)} of {facts.size} bytes arrived")
    return facts


def _open(url: str, start: int) -> requests.Response:
    # Unpacked on the way, a file would have neither the announced size nor bytes to continue from.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:  # also of a redirection
        raise DownloadError(f"{redacted(url)} is or leads to no http address ({type(error).__name__})") from None
    if url.startswith("https://") and not all(hop.url.startswith("https://") for hop in (*response.history, response)):
        response.close()
        raise DownloadError(f"{redacted(url)} leads away from https; try without proxies and mirrors")
    return response


def _check_status(response: requests.Response, url: str) -> None:
    status, shown = response.status_code, redacted(url)
    if status in (404, 410):
        raise Refused(f"{shown} is not there ({status})")
    if status in (401, 403):
        raise Refused(f"{shown}: access refused ({status}); open the page in a browser, or try another network")
    if status in (408, 429) or status >= 500:
        raise _Interrupted(f"status {status}")
    if status not in (200, 206):
        raise DownloadError(f"{shown}: unexpected answer ({status})")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise DownloadError(f"{shown} gave a web page instead of the file: a login page of the network, or a mirror's")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{shown} came packed although it was asked for as it is; try without proxies and mirrors")


def _facts(response: requests.Response, start: int) -> Facts:
    length = response.headers.get("Content-Length", "")
    return Facts(start + int(length) if length.isdigit() else 0, _linked_sha256(response))


def _linked_sha256(response: requests.Response) -> str:
    """The digest that the hub states, in its own answer, before it redirects to the storage."""
    for answer in (*response.history, response):
        etag = answer.headers.get("X-Linked-Etag", "").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", etag):
            return etag
    return ""


def _check_space(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if free < needed + SPARE:
        raise DownloadError(
            f"no space for {partial.with_suffix('')}: {needed / 2**20:.0f} MiB are to come and {free / 2**20:.0f} are "
            "free; make room, or name a folder on another disk with --root"
        )


def _check_size(url: str, partial: Path, size: int, largest: int) -> None:
    if size > largest:
        partial.unlink(missing_ok=True)
        raise DownloadError(
            f"{redacted(url)} sends more than the {largest} bytes that the file may have; nothing is kept"
        )


def _write(response: requests.Response, partial: Path, start: int, total: int, largest: int) -> None:
    """Append to the partial file, or fill it anew; ends with the first chunk beyond `largest` bytes."""
    bar = tqdm(
        desc=partial.stem[:40], total=total or None, initial=start, unit="B", unit_scale=True, disable=None, leave=False
    )
    try:
        with bar, partial.open("ab" if start else "wb") as file:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > largest:  # announced by no Content-Length
                    break
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"the disk is full: {partial.name} is kept as far as it came") from None
        raise


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
