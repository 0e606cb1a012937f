"""One file over HTTP or from the Hugging Face hub, resumed after cuts, here or in an earlier run."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import requests
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from pooch import HTTPDownloader

from diffusionopd.config_schema import redacted
from tools.downloads.catalogue import GITHUB, HUB, Repository

CHUNK = 2**16  # bytes; what has arrived of a chunk is lost in a cut
TIMEOUT = (10, 60)  # seconds to connect, and between two packets
ATTEMPTS = 5  # connections in a row that bring nothing before it is given up
LARGEST = 16 * 2**30  # bytes of a file whose size is not published: the largest such has 4 GB
# Unpacked on the way, a file would have neither the announced size nor bytes to continue from.
AS_IT_IS = {"Accept-Encoding": "identity"}


class DownloadError(ValueError):
    """Raised when something could not be downloaded: what, why and the remedy, without secrets."""

    def __init__(self, message: object) -> None:
        super().__init__(redacted(message))


class Refused(DownloadError):
    """Raised when the source does not give the file; another one may."""


def resolve(url: str) -> str:
    """The address to ask: `HF_ENDPOINT` in place of the hub, `DIFFUSIONOPD_MIRROR` in front of GitHub's."""
    if url.startswith(HUB):
        owner, name, path = url.removeprefix(HUB).split("/", 2)
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{owner}/{name}/resolve/main/{path}"
    if url.startswith(GITHUB) and (mirror := os.environ.get("DIFFUSIONOPD_MIRROR")):
        return f"{mirror.rstrip('/')}/{url}"
    return url


# ---- The hub ---------------------------------------------------------------------------------------------------------


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    page = f"https://huggingface.co/{name}"
    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError) as error:  # the second is also what a refused token looks like
        known = "asks for its licence to be accepted" if isinstance(error, GatedRepoError) else "is not accessible"
        remedy = f"accept the licence at {page}, then run `hf auth login` or set HF_TOKEN"
        raise Refused(f"{name} {known}: {remedy}") from None
    except EntryNotFoundError:
        raise Refused(f"{page} lacks the file") from None
    except Exception as error:  # the client lets errors of several libraries through
        first_line = next(iter(str(error).splitlines()), "")
        raise DownloadError(
            f"{name} cannot be loaded ({type(error).__name__}: {first_line}). Check the connection, HF_ENDPOINT and "
            "HF_HUB_OFFLINE; the same command goes on from what has arrived"
        ) from None


def snapshot(repository: Repository) -> None:
    """Load what is missing of a repository into the hub's cache. Raises DownloadError."""
    patterns = {"allow_patterns": list(repository.patterns), "ignore_patterns": list(repository.ignore)}
    with _hub_errors(repository.name):
        huggingface_hub.snapshot_download(repository.name, **patterns)


def receive_from_hub(url: str, folder: Path) -> Path:
    """Load `hub:owner/name/path` into a folder, going on with what is there; returns the file. Raises as `receive`."""
    owner, name, file = url.removeprefix(HUB).split("/", 2)
    with _hub_errors(f"{owner}/{name}"):
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{name}", file, local_dir=folder))


def stated(url: str) -> tuple[int, str]:
    """What the source says of a file without loading it: its size in bytes and its SHA-256; 0 and "" if it does not."""
    if url.startswith(HUB):
        owner, name, file = url.removeprefix(HUB).split("/", 2)
        with _hub_errors(f"{owner}/{name}"):
            found = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(f"{owner}/{name}", file))
        return found.size or 0, found.etag if re.fullmatch(r"[0-9a-f]{64}", found.etag or "") else ""
    address = resolve(url)
    try:
        response = requests.head(address, headers=AS_IT_IS, timeout=TIMEOUT, allow_redirects=True)
        response.raise_for_status()
    except requests.RequestException as error:
        raise DownloadError(f"{address} cannot be asked ({type(error).__name__})") from None
    return int(response.headers.get("Content-Length", 0)), ""


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class _Partial(io.FileIO):
    """A partial file that goes on behind the bytes that are there, and the check of an answer before it is written."""

    def __init__(self, path: Path, url: str, largest: int) -> None:
        super().__init__(path, "ab")
        self.url, self.largest = url, largest
        self.start, self.total = self.tell(), 0  # bytes there, and bytes of the file if the server says so

    def check(self, answer: requests.Response, *args: Any, **options: Any) -> None:
        """Raise for an answer that is not the rest of the file; start over where it is all of it. Requests' hook."""
        there, length = answer.headers.get("Content-Range", ""), int(answer.headers.get("Content-Length", 0))
        if self.url.startswith("https://") and not answer.url.startswith("https://"):
            raise DownloadError(f"{self.url} leads away from https; try without proxies and mirrors")
        if answer.status_code in (401, 403, 404, 410):
            raise Refused(
                f"{self.url} is refused or not there ({answer.status_code}); try a browser or another network"
            )
        if "text/html" in answer.headers.get("Content-Type", "") or "Content-Encoding" in answer.headers:
            raise DownloadError(f"{self.url} gave a web page or packed data; try without proxies and mirrors")
        fits = answer.status_code == 206 and there.startswith(f"bytes {self.start}-")
        complete = answer.status_code == 416 and there == f"bytes */{self.start}"
        if not (answer.is_redirect or fits or complete):  # all of it, or something else: nothing fits what is there
            self.truncate(0)
            self.start = 0
        if complete:
            raise _Complete
        answer.raise_for_status()
        if length and not answer.is_redirect:
            self.total = self.start + length
            self._check_size(self.total)

    def _check_size(self, size: int) -> None:
        if size > self.largest:
            self.truncate(0)
            raise DownloadError(f"{self.url} sends more than the {self.largest} bytes that the file may have")

    def write(self, chunk: Any) -> int:
        """Append."""
        self._check_size(self.tell() + len(chunk))
        return super().write(chunk)


class _Complete(Exception):
    """Nothing is left to load."""


def receive(url: str, partial: Path, pause: float = 1.0, largest: int = LARGEST) -> None:
    """Load `url` into `partial`, going on behind the bytes that are there already.

    Args:
        pause: seconds before the second attempt; doubled for each further one that brings nothing.
        largest: bytes that the file may have.

    Raises:
        Refused: the server does not have the file, or does not give it.
        DownloadError: something else came, or `ATTEMPTS` attempts in a row brought nothing. What has arrived stays in
            `partial`.
    """
    idle = 0
    while True:
        size = partial.stat().st_size if partial.exists() else 0
        try:
            return _receive_once(url, partial, largest)
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:  # also of a redirection
            raise DownloadError(f"{url} is or leads to no http address ({type(error).__name__})") from None
        except requests.RequestException as error:
            idle = 0 if partial.exists() and partial.stat().st_size > size else idle + 1
            if idle == ATTEMPTS:
                reason = error.response.status_code if error.response is not None else type(error).__name__
                raise DownloadError(
                    f"{url}: given up after {ATTEMPTS} attempts ({reason}). What has arrived is kept; the same command "
                    "goes on from there"
                ) from None
            time.sleep(pause * 2 ** max(0, idle - 1))


def _receive_once(url: str, partial: Path, largest: int) -> None:
    try:
        with _Partial(partial, url, largest) as file:
            headers = AS_IT_IS | ({"Range": f"bytes={file.start}-"} if file.start else {})
            options = {"timeout": TIMEOUT, "headers": headers, "hooks": {"response": file.check}}
            HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=CHUNK, **options)(url, file, None)
            if file.total and file.tell() != file.total:
                raise requests.ConnectionError(f"{file.tell()} of {file.total} bytes arrived")
    except _Complete:
        pass
    finally:
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()
