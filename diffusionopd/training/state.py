"""What a checkpoint holds beside the LoRA, and how a run takes it up again."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionopd.algorithms.base import Learner
from diffusionopd.algorithms.optim import Ema
from diffusionopd.training import checkpoint


class RunError(ValueError):
    """A run that must not start; the message says why and what to do."""


def save_state(
    folder: Path, learner: Learner, ema: Ema | None, completed: int, num_processes: int, origin: dict[str, Any]
) -> None:
    """Write everything that the next round depends on into ``folder``; ``origin`` is what a resume compares with."""
    optimizer = learner.optimizer
    tensors: dict[str, Tensor] = {f"student.{i}": p for i, p in enumerate(optimizer.parameters)}
    tensors |= {f"ema.{i}": p for i, p in enumerate(ema.shadow if ema else [])}
    tensors |= optimizer.state_tensors() | learner.state_tensors()
    scalars = {
        "round": completed,
        "num_processes": num_processes,
        "scaler": optimizer.state_scalars(),
        "versions": versions(),
        **origin,
    }
    checkpoint.save_state(folder, tensors, scalars)


def load_state(folder: Path, learner: Learner, ema: Ema | None) -> None:
    """Restore what :func:`save_state` wrote. RunError for a student of other shapes, or a state of something else."""
    tensors, scalars = checkpoint.load_state(folder)
    try:
        _restore(folder, tensors, scalars, learner, ema)
    except RunError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise RunError(
            f"{folder} is not the state of such a run ({error!r}); resume from another checkpoint"
        ) from error


def _restore(
    folder: Path, tensors: dict[str, Tensor], scalars: dict[str, Any], learner: Learner, ema: Ema | None
) -> None:
    optimizer = learner.optimizer
    student, average = _numbered(tensors, "student"), _numbered(tensors, "ema")
    if [student[i].shape for i in range(len(student))] != [p.shape for p in optimizer.parameters]:
        raise RunError(f"{folder} holds a student of another rank, target set or base; it cannot be resumed here")
    with torch.no_grad():
        for i, parameter in enumerate(optimizer.parameters):
            parameter.copy_(student[i])
    if ema is not None:
        # A run that had no EMA until now starts its average from the student.
        ema.load([average.get(i, student[i]) for i in range(len(student))])
    optimizer.load_state({k: v for k, v in tensors.items() if k.startswith("optimizer.")}, scalars["scaler"])
    learner.load_state(tensors)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"section.key": value}``; what is no plain value becomes text."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, int | float | str | bool) or value is None
            result[f"{prefix}{key}"] = value if plain else str(value)
    return result


def _numbered(tensors: dict[str, Tensor], part: str) -> dict[int, Tensor]:
    return {int(key.split(".")[1]): tensor for key, tensor in tensors.items() if key.split(".")[0] == part}


def versions() -> dict[str, str]:
    """The versions on which a run's numbers depend."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
