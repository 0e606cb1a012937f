"""Processes that do not train the same thing stop before they train: configuration, versions, files and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusionopd
from diffusionopd.distributed import gather_over_processes, world_size
from diffusionopd.training.resume import RunError, versions

_LONGEST = 60  # characters of a value in a message

Facts = Mapping[str, Mapping[str, Any]]
"""Group -> name -> JSON value, such as ``{"versions": {"torch": "2.13.0"}}``."""


def agree(facts: Facts) -> None:
    """Raise RunError on every process, naming what differs and on which ranks, unless all have the same ``facts``.

    The groups are the same on every process, what is in them need not be. One exchange of a digest a group; the values
    themselves are exchanged only when they differ. Does nothing for one process.
    """
    if world_size() == 1:
        return
    everyone = gather_over_processes([{name: _digest(group) for name, group in facts.items()}], "comparing processes")
    differing = [name for name in facts if any(digests[name] != everyone[0][name] for digests in everyone)]
    if not differing:
        return
    given = gather_over_processes([{name: dict(facts[name]) for name in differing}], "finding what differs")
    found = [text for name in differing for text in _differences(name, [own[name] for own in given])]
    raise RunError(
        "the processes do not agree, nothing was trained: " + "; ".join(found) + ". Start every process with the same "
        "command, files and packages (on several machines: the same folders on each)."
    )


def setup_facts(config: Mapping[str, Any]) -> Facts:
    """What must agree before anything is done with it: the configuration, and the code that reads it."""
    source = hashlib.sha256()
    for file in sorted(Path(diffusionopd.__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    return {"configuration": _flat(config), "version": {**versions(), "diffusionopd": source.hexdigest()[:12]}}


def _digest(group: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(group, sort_keys=True, default=str).encode()).hexdigest()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings and lists as ``{"train.teachers.0.name": value}``."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


def _differences(group: str, given: list[dict[str, Any]]) -> list[str]:
    """``group name: value on rank 0, other value on ranks 1, 2`` for each name whose value is not everyone's."""
    texts = []
    for name in sorted(set().union(*given)):
        ranks: dict[str, list[str]] = {}
        for rank, values in enumerate(given):
            ranks.setdefault(repr(values[name]) if name in values else "absent", []).append(str(rank))
        if len(ranks) > 1:
            on = [f"{_short(value)} on rank{'s' * (len(own) > 1)} {', '.join(own)}" for value, own in ranks.items()]
            texts.append(f"{group} {name}: {', '.join(on)}")
    return texts


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else value[:_LONGEST] + "..."
