"""Prompt sets, scorer weights and models: what can be downloaded (`catalogue.py`), and how.

`transfer.py` receives a file or a repository, `files.py` verifies a file and puts it into place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tools.downloads.catalogue import CATALOGUE, File, Item, Repository
from tools.downloads.files import fetch
from tools.downloads.transfer import DownloadError, redacted, resolve, snapshot

__all__ = ["CATALOGUE", "DownloadError", "File", "Item", "Repository", "choose", "describe", "download"]


def choose(kind: str, names: Iterable[str], everything: bool = False) -> dict[str, Item]:
    """The items of these names; without any, those of the kind that need not be named, or ``everything``.

    Raises DownloadError for a name that there is not.
    """
    items, names = CATALOGUE[kind], list(names)
    unknown = [name for name in names if name not in items]
    if unknown:
        raise DownloadError(f"there is no {', '.join(unknown)} among {kind}; there are: {', '.join(items)}")
    return {name: items[name] for name in names or [n for n in items if everything or not items[n].named]}


def describe(items: Mapping[str, Item], root: Path) -> Iterator[str]:
    """Lines that say what each item is, where its parts come from and whether the files are there; asks no server."""
    for name, item in items.items():
        yield f"{name}: {item.note}{' (only by name)' if item.named else ''}"
        for part in item.parts:
            if isinstance(part, Repository):
                yield f"  hub cache <- {part.name} ({' '.join(part.patterns)})"
            else:
                state = "there" if (root / part.path).exists() else "missing"
                size = f", {part.size / 1e6:.1f} MB" if part.size else ""
                yield f"  {part.path} <- {redacted(resolve(part.urls[0]))} ({state}{size})"


def download(items: Mapping[str, Item], root: Path, force: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Load the parts of the items, each once; one that fails does not keep the others from being loaded.

    Yields:
        What the part is, what became of it, and whether all is well.
    """
    for part in dict.fromkeys(part for item in items.values() for part in item.parts):
        try:
            if isinstance(part, Repository):
                snapshot(part)
                yield part.name, "in the hub's cache", True
            else:
                yield part.path, "loaded" if fetch(part, root, force) else "there already, verified", True
        except DownloadError as error:
            yield part.name if isinstance(part, Repository) else part.path, str(error), False
