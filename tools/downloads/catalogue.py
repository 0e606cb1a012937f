"""What can be downloaded: `catalogue.toml`, read into what one name on the command line stands for."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GITHUB = "https://raw.githubusercontent.com/"
HUB = "hub:"
"""`hub:owner/name/path` is a file of a model repository on the Hugging Face hub; `transfer.resolve` makes it a URL."""


@dataclass(frozen=True)
class File:
    """One file: where it comes from and where it belongs."""

    path: str  # relative to the repository's root
    urls: tuple[str, ...]  # the first that has it is taken
    sha256: str = ""  # of the file at `path`; only its first digits where no more are published
    size: int = 0  # bytes of the file at `path`, where known
    convert: str = ""  # what is made of the source, see `convert.CONVERSIONS`
    also: tuple[str, ...] = ()  # further sources that it is made of


@dataclass(frozen=True)
class Repository:
    """The files of a hub repository that are needed; they go into the hub's own cache."""

    name: str
    patterns: tuple[str, ...]
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """What one name on the command line stands for."""

    parts: tuple[File | Repository, ...]
    note: str  # source and licence
    named: bool = False  # whether it is loaded only where it is asked for by name


def _read(content: Mapping[str, Any]) -> dict[str, dict[str, Item]]:
    repositories = {
        name: Repository(entry["name"], tuple(entry["patterns"]), tuple(entry.get("ignore", ())))
        for name, entry in content["repositories"].items()
    }

    def addresses(urls: Sequence[str]) -> tuple[str, ...]:
        return tuple(url.format_map(content["sources"]) for url in urls)

    def item(entry: Mapping[str, Any]) -> Item:
        files = [
            File(**file | {key: addresses(file.get(key, ())) for key in ("urls", "also")})
            for file in entry.get("files", ())
        ]
        return Item(
            (*files, *(repositories[name] for name in entry.get("repositories", ()))),
            entry["note"],
            entry.get("named", False),
        )

    return {
        kind: {name: item(entry) for name, entry in content[kind].items()} for kind in ("datasets", "rewards", "models")
    }


CATALOGUE = _read(tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8")))
"""datasets, rewards or models -> name on the command line -> what it stands for."""
