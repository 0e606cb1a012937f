"""Processes that do not train the same thing stop before they train: configuration, versions, files and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusionopd
from diffusionopd.config_schema import comparable
from diffusionopd.data.prompts import Prompt
from diffusionopd.distributed import by_rank, gather_over_processes
from diffusionopd.files import sha256
from diffusionopd.training import checkpoint
from diffusionopd.training.digests import prompt_digests, versions
from diffusionopd.training.resume import Resume, RunError

_LONGEST = 60  # characters of a value in a message

Facts = Mapping[str, Any]
"""Name -> value, such as ``{"version of torch": "2.13.0"}``; the names are the same on every process or not."""


def agree(facts: Facts) -> None:
    """Raise RunError on every process, naming what differs and on which ranks, unless all have the same ``facts``."""
    given = gather_over_processes([{name: repr(value) for name, value in facts.items()}])
    found = []
    for name in sorted(set().union(*given)):
        values = [own.get(name, "absent") for own in given]
        if len(set(values)) > 1:
            shown = [value if len(value) <= _LONGEST else value[:_LONGEST] + "..." for value in values]
            found.append(f"{name} ({by_rank(shown)})")
    if found:
        raise RunError(
            f"the processes do not agree, nothing was trained: {', '.join(found)}. Start every process with the same "
            "command, files and packages (on several machines: the same folders on each)."
        )


def setup_facts(config: Mapping[str, Any]) -> Facts:
    """What must agree before anything is done with it: the configuration, and the code that reads it."""
    source = hashlib.sha256()
    for file in sorted(Path(diffusionopd.__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    code = versions() | {"diffusionopd": source.hexdigest()[:12]}
    return _flat(comparable(config)) | {f"version of {name}": version for name, version in code.items()}


def data_facts(resume: Resume, train: Mapping[str, Iterable[Prompt]], test: Mapping[str, Iterable[Prompt]]) -> Facts:
    """The checkpoint that is resumed, and the prompts by task."""
    folder = resume.folder
    resumed = f"{folder.name} {sha256(folder / checkpoint.MANIFEST)[:12]}" if folder else "none"
    tests = {name.replace("prompts", "test prompts"): digest for name, digest in prompt_digests(test).items()}
    return {"the checkpoint to resume from": resumed} | prompt_digests(train) | tests


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings and lists as ``{"train.teachers.0.name": value}``."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}
