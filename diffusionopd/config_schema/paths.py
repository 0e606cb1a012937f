"""What a configuration points to: folders, prompt files, models and adapters. Nothing is downloaded or written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from diffusionopd.config_schema.keys import unset
from diffusionopd.config_schema.problems import Problems
from diffusionopd.files import located, looked_in

_PLACEHOLDER = re.compile(r"<[^>]*>|\.\.\.|(^|/)(path[/_]to|your[-_]|todo\b|placeholder)", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w. +()-]+)*")


def with_origin(source: str) -> str:
    """``source`` for messages, with a word when it is no path here and so is looked up on the hub."""
    return f"{source} (hub)" if not Path(source).exists() else source


def gap(source: str | None) -> str:
    """Why ``source`` is no path or hub id at all; empty if it may be one."""
    if source is None or unset(source):
        return "is not set"
    is_one = _PLACEHOLDER.search(source) and not os.path.exists(located(source))
    return f"is {source!r}, a placeholder" if is_one else ""


def check_model(key: str, model: str, problems: Problems, *, or_file: bool = False) -> None:
    """A pipeline is a hub id or a diffusers folder that is there; or, where it may be, a single .safetensors file."""
    remedy = "Give a hub id (organisation/name) or a local diffusers pipeline folder"
    remedy += ", or a single .safetensors file." if or_file else "."
    if what := gap(model):
        problems.add(key, what, remedy)
    elif or_file and model.endswith(".safetensors") and not Path(model).is_dir():
        if not Path(model).exists() and not (is_hub_id(model) and model.count("/") > 1):
            problems.add(key, f"is {model}, which does not exist here", remedy)
    elif Path(model).exists():
        if not (Path(model) / "model_index.json").is_file():
            problems.add(key, f"is {model}, which has no model_index.json", remedy)
    elif not is_hub_id(model) or model.count("/") != 1:
        problems.add(key, f"is {model}, which does not exist{looked_in(model)}", remedy)


def check_adapter(key: str, source: str, problems: Problems) -> None:
    """A LoRA is a folder or file that is there, or a hub id; what is in it is not looked at."""
    remedy = "Give a LoRA folder, a .safetensors file or a hub id (organisation/name[/folder or file][@revision])."
    if what := gap(source):
        problems.add(key, what, remedy)
        return
    place = source.partition("@")[0]
    is_file = place.endswith(".safetensors")
    if not Path(source).exists() and not (is_hub_id(place) and place.count("/") > is_file):
        problems.add(key, f"is {source}, which does not exist{looked_in(source)}", remedy)


def check_writable(key: str, folder: Path, problems: Problems) -> None:
    """A folder exists and can be written, or can be made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        what = "not writable" if existing.is_dir() else "a file"
        problems.add(key, f"needs the folder {folder}, but {existing} is {what}", "Name another folder.")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` can only be meant for the hub: ``owner/name[/folder or file]``, with no such folder here."""
    first = source.split("/")[0]
    return bool(_HUB_ID.fullmatch(source)) and not first.startswith(".") and not Path(located(first)).exists()
