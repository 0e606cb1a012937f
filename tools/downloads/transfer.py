"""One file over HTTP or from the Hugging Face hub, resumed after cuts, here or in an earlier run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import requests
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from tqdm import tqdm

from diffusionopd.config_schema import redacted
from tools.downloads.catalogue import GITHUB, HUB, Repository

CHUNK = 2**16  # bytes; what has arrived of a chunk is lost in a cut
TIMEOUT = (10, 60)  # seconds to connect, and between two packets
ATTEMPTS = 5  # connections in a row that bring nothing before it is given up
LARGEST = 16 * 2**30  # bytes of a file whose size is not published: the largest such has 4 GB
# Unpacked on the way, a file would have neither the announced size nor bytes to continue from.
AS_IT_IS = {"Accept-Encoding": "identity"}


class DownloadError(ValueError):
    """Raised when something could not be downloaded; its message has no secrets."""

    def __init__(self, message: object) -> None:
        super().__init__(redacted(message))


class Refused(DownloadError):
    """Raised when the source does not give the file; another one may."""


def resolve(url: str) -> str:
    """The address to ask: `HF_ENDPOINT` in place of the hub, `DIFFUSIONOPD_MIRROR` in front of GitHub's."""
    if url.startswith(HUB):
        repository, path = _hub_file(url)
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{endpoint.rstrip('/')}/{repository}/resolve/main/{path}"
    if url.startswith(GITHUB) and (mirror := os.environ.get("DIFFUSIONOPD_MIRROR")):
        return f"{mirror.rstrip('/')}/{url}"
    return url


# ---- The hub ---------------------------------------------------------------------------------------------------------


def _hub_file(url: str) -> tuple[str, str]:
    """Repository and path of `hub:owner/name/path`."""
    owner, name, path = url.removeprefix(HUB).split("/", 2)
    return f"{owner}/{name}", path


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    page = f"https://huggingface.co/{name}"
    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError):  # the second is also what a refused token looks like
        remedy = f"accept the licence at {page}, then run `hf auth login` or set HF_TOKEN"
        raise Refused(f"{name} is not accessible: {remedy}") from None
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
    repository, path = _hub_file(url)
    with _hub_errors(repository):
        return Path(huggingface_hub.hf_hub_download(repository, path, local_dir=folder))


def stated(url: str) -> tuple[int, str]:
    """What the source says of a file without loading it: its size in bytes and its SHA-256; 0 and "" if it does not.

    Raises `Refused` where it does not give the file, `DownloadError` where it does not answer.
    """
    if url.startswith(HUB):
        with _hub_errors(_hub_file(url)[0]):
            found = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(*_hub_file(url)))
        return found.size or 0, found.etag if re.fullmatch(r"[0-9a-f]{64}", found.etag or "") else ""
    address = resolve(url)
    try:
        response = requests.head(address, headers=AS_IT_IS, timeout=TIMEOUT, allow_redirects=True)
        _check_given(response, address)
        response.raise_for_status()
    except requests.RequestException as error:
        raise DownloadError(f"{address} cannot be asked ({type(error).__name__})") from None
    return int(response.headers.get("Content-Length", 0)), ""


# ---- HTTP ------------------------------------------------------------------------------------------------------------


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
        size = _size(partial)
        try:
            return _receive_once(url, partial, size, largest)
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:  # also of a redirection
            raise DownloadError(f"{url} is or leads to no http address ({type(error).__name__})") from None
        except requests.RequestException as error:
            idle = 0 if _size(partial) > size else idle + 1
            if idle == ATTEMPTS:
                reason = error.response.status_code if error.response is not None else type(error).__name__
                raise DownloadError(
                    f"{url}: given up after {ATTEMPTS} attempts ({reason}). What has arrived is kept; the same command "
                    "goes on from there"
                ) from None
            time.sleep(pause * 2 ** max(0, idle - 1))


def _check_given(answer: requests.Response, url: str) -> None:
    if answer.status_code in (401, 403, 404, 410):
        raise Refused(f"{url} is refused or not there ({answer.status_code}); try a browser or another network")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive_once(url: str, partial: Path, start: int, largest: int) -> None:
    def stay_on_https(answer: requests.Response, *args: Any, **options: Any) -> None:
        if url.startswith("https://") and not answer.url.startswith("https://"):
            raise DownloadError(f"{url} leads away from https; try without proxies and mirrors")

    headers = AS_IT_IS | ({"Range": f"bytes={start}-"} if start else {})
    hooks = {"response": stay_on_https}
    with requests.get(url, headers=headers, timeout=TIMEOUT, stream=True, hooks=hooks) as answer:
        there = answer.headers.get("Content-Range", "")
        _check_given(answer, url)
        if answer.status_code == 416 and there == f"bytes */{start}":  # nothing is left to load
            return
        if answer.status_code == 416:
            partial.unlink()
        answer.raise_for_status()
        if "text/html" in answer.headers.get("Content-Type", "") or "Content-Encoding" in answer.headers:
            raise DownloadError(f"{url} gave a web page or packed data; try without proxies and mirrors")
        goes_on = answer.status_code == 206 and there.startswith(f"bytes {start}-")
        total = int(answer.headers.get("Content-Length", 0)) + (start if goes_on else 0)
        bar = tqdm(total=total, initial=start if goes_on else 0, unit="B", unit_scale=True, disable=None)
        with bar, partial.open("ab" if goes_on else "wb") as file:
            for chunk in answer.iter_content(CHUNK):
                if max(total, file.tell() + len(chunk)) > largest:
                    partial.unlink()
                    raise DownloadError(f"{url} sends more than the {largest} bytes that the file may have")
                bar.update(file.write(chunk))
