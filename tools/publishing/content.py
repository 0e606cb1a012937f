"""The files that are published of a student, as bytes: nothing else leaves the run folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save

from diffusionopd.config_schema import flatten, read
from diffusionopd.files import located
from diffusionopd.models.loading import BackboneError, ModelInfo, read_model
from diffusionopd.models.lora_files import (
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoraWeights,
    load_lora,
)
from diffusionopd.models.settings import BaseSettings
from diffusionopd.training import checkpoint
from diffusionopd.training.keys import SCHEMA, with_paths
from diffusionopd.training.resume import read_run_config
from tools.publishing.public import public
from tools.report.collect import read_metrics

CARD, PICTURE, CONFIG, METRICS, PEFT = "README.md", "samples.png", "config.json", "metrics.jsonl", "lora"
_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(/.+\.safetensors)?")
_BASE = "base_model_name_or_path"  # where a LoRA says what it was trained on


class PublishError(ValueError):
    """Raised for what cannot be published; says what is missing and what to do."""


@dataclass(frozen=True)
class Student:
    """A saved student.

    Attributes:
        folder: its checkpoint, which holds both formats of it.
        config: as it was saved, nested.
        values: flat, with the defaults of keys that are newer than it.
        rounds: of training.
        base_model: the base on the hub, as configurations name it; None where only a local one is known.
        model: what the base's files say; None where they cannot be had.
    """

    folder: Path
    config: Mapping[str, Any]
    values: Mapping[str, Any]
    rounds: int
    lora: LoraWeights = field(repr=False)
    base_model: str | None = None
    model: ModelInfo | None = field(default=None, repr=False)

    @property
    def run(self) -> Path:
        """Where its metrics, samples and evaluations are."""
        return run_of(self.folder)

    @property
    def strengths(self) -> list[float]:
        """By what tools that read no configuration, such as ComfyUI, must multiply it: one number, or a module's."""
        power = 0.5 if self.lora.rslora else 1.0
        return sorted({alpha / len(self.lora.a[name]) ** power for name, alpha in self.lora.alpha.items()})


def run_of(folder: Path) -> Path:
    """The run folder of a checkpoint that still is in one; else the checkpoint itself."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def find_student(path: str, base_model: str | None = None) -> Student:
    """The student in a run folder (its newest checkpoint) or in a checkpoint.

    Args:
        base_model: hub id of the base, in place of what the configuration names.

    Raises:
        PublishError, CheckpointError, ConfigError, AdapterError: nothing there, or damaged.
    """
    folder = checkpoint.find_lora(located(path)).resolve()
    needed = (CONFIG, "state", f"{PEFT}/{PEFT_CONFIG}", f"diffusers/{DIFFUSERS_WEIGHTS}")
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise PublishError(f"{folder} has no {', '.join(missing)}: name a run folder, or one of its checkpoints")
    checkpoint.verify(folder)
    config = read_run_config(folder / CONFIG)
    values, state = SCHEMA.defaults() | flatten(config), checkpoint.load_scalars(folder / "state")
    model = str(values["pretrained.model"] or "")
    if base_model is None and _ON_HUB.fullmatch(model) and not Path(located(model.split("/")[0])).exists():
        base_model = model
    try:
        info = read_model(**read(BaseSettings, SCHEMA.defaults() | flatten(with_paths(config))).source)
    except BackboneError:
        info = None
    return Student(folder, config, values, int(state["round"]), load_lora(folder), base_model, info)


def publication(student: Student, card: str) -> dict[str, bytes]:
    """All that is published: name -> content. Tensors are those of the checkpoint."""
    peft, files = student.folder / PEFT, {CARD: card.encode()}
    files[DIFFUSERS_WEIGHTS] = _without_paths(student.folder / "diffusers" / DIFFUSERS_WEIGHTS, student.base_model)
    described = json.loads((peft / PEFT_CONFIG).read_text(encoding="utf-8"))
    files[f"{PEFT}/{PEFT_CONFIG}"] = _json(public(described | {_BASE: student.base_model}))
    files[f"{PEFT}/{PEFT_WEIGHTS}"] = _without_paths(peft / PEFT_WEIGHTS, student.base_model)
    files[CONFIG] = _json(public(student.config))
    if (student.run / METRICS).is_file():
        rows = [row for row in read_metrics(student.run) if row["round"] <= student.rounds]
        files[METRICS] = "".join(json.dumps(public(row)) + "\n" for row in rows).encode()
    if picture := picture_of(student):
        files[PICTURE] = picture.read_bytes()
    return files


def picture_of(student: Student) -> Path | None:
    """The newest grid of images that the training sampled up to the student's round."""
    grids = sorted((student.run / "samples").glob("round-*.png"))
    return next((grid for grid in reversed(grids) if int(grid.stem.split("-")[1]) <= student.rounds), None)


def _without_paths(file: Path, base_model: str | None) -> bytes:
    """The file's tensors, and its header with the public name of the base."""
    with safe_open(file, "pt") as handle:
        header = dict(handle.metadata() or {})
    for key, text in header.items():
        if text.startswith("{"):
            described = json.loads(text)
            described |= {name: base_model for name in described if name.removeprefix(DIFFUSERS_PREFIX) == _BASE}
            header[key] = json.dumps(public(described), indent=2, sort_keys=True)
    return save(load_file(file), header)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
