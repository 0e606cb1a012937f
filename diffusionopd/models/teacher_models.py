"""Teachers that are no LoRAs of the base: transformers of other weights, fine-tuned in full or larger, beside it.

They see the base's latents, times and text embeddings, so no VAE and no text encoder of theirs is ever loaded. What has
to agree for that is read from configurations, before any weights load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from diffusionopd.models.backbone import Backbone
from diffusionopd.models.loading import ModelInfo, loading, part_class, refusal
from diffusionopd.models.pipeline_files import (
    CONFIGS,
    Part,
    default_config,
    fetch_weights,
    find_checkpoint,
    find_folder,
    is_checkpoint,
    part_digest,
    weight_problems,
)
from diffusionopd.models.schedules import is_of_flow_matching

_WHAT = "the teacher's model"
_reading = partial(loading, what=_WHAT, here="")
_FORMS = "Give a pipeline folder, its transformer folder, a .safetensors file or a hub id (a LoRA goes to lora_path)"


@dataclass(frozen=True)
class TeacherModel(ModelInfo):
    """A transformer that fits beside the base; ``configs`` are the base's, but for its own ``transformer`` and, of a
    pipeline, ``index``."""

    part: Part

    @property
    def _variant(self) -> str | None:
        """The plain weights, else those that are there."""
        return next(iter(sorted(self.part.variants())), None) if self.part.absent(None) else None

    def size(self) -> tuple[int, int]:
        """How many parameters and other values it has."""
        empty = self.empty_transformer()
        return sum(t.numel() for t in empty.parameters()), sum(t.numel() for t in empty.buffers())

    def digest(self) -> str:
        """A short hash of its weight files."""
        digest = hashlib.sha256()
        files = [self.part.checkpoint] if self.part.checkpoint else []
        for file in files or [self.part.folder / name for name in self.part.files(self._variant)]:
            part_digest(digest, file.name, file)
        return digest.hexdigest()[:16]

    def load(self, base: Backbone, *, waits: bool = False) -> Backbone:
        """The transformer with its weights as a backbone beside the base's; ``waits``: it stays in the host's memory.

        Raises BackboneError.
        """
        with _reading(self.model):
            transformer = self.part.load(self._variant, base.dtype)
        return base.beside(transformer, index=self.configs["index"], waits=waits)


class HostWeights:
    """Frozen weights that wait in the host's memory, pinned beside a GPU, and are on the device while they are used."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """``module`` is on the CPU, with all that will ever be on it."""
        tensors = [*module.parameters(), *module.buffers()]
        self._device = device
        self._kept = [(t, t.data.pin_memory() if device.type == "cuda" else t.data) for t in tensors]
        self.go()

    def come(self) -> None:
        """Have them on the device."""
        for tensor, host in self._kept:
            tensor.data = host.to(self._device, non_blocking=True)

    def go(self) -> None:
        """Free the device: nothing is copied, since they have not changed."""
        for tensor, host in self._kept:
            tensor.data = host


def read_teacher_model(source: str, base: ModelInfo, *, download: bool = True) -> TeacherModel | None:
    """A transformer of other weights than ``base``, whose folder must be here, and what its small files say.

    ``source``: a diffusers pipeline folder, a transformer folder, a single .safetensors file, or the hub id of a
    pipeline or file. Without ``download`` None is returned for what is not here.

    Raises:
        BackboneError: naming everything that is wrong with it, and every difference that keeps it from seeing the
            base's latents, times and embeddings.
    """
    with _reading(source):
        place = _pipeline_or_file(source, download)
        if place is None:
            return None
        found, root = _find_part(place, base), place if place.is_dir() else None
        configs = {**base.configs, "transformer": dict(found.empty().config)}
        if (place / "model_index.json").is_file():  # where a pipeline may say that it is distilled
            configs["index"] = diffusers.DiffusionPipeline.load_config(place)
        model = TeacherModel(source, base.family, configs, found, root=base.root)
        listing: Collection[str] | None = ()
        if root and not Path(source).exists():
            listing = fetch_weights(source, root, [found], None) if download else None
            if listing and (variants := sorted(found.variants(listing))):
                listing = fetch_weights(source, root, [found], variants[0])
        problems = weight_problems([found], model._variant, listing)
        problems += _differences(model, base, root)
        if unsupported := base.family.unsupported(model.configs):
            problems.append(unsupported)
        if problems:
            raise refusal(source, problems, _WHAT)
    return model


def _pipeline_or_file(source: str, download: bool) -> Path | None:
    if is_checkpoint(source):
        return find_checkpoint(source, None, download)
    if Path(source).is_dir() or source.count("/") == 1:
        return find_folder(source, None, CONFIGS if download else None)
    raise ValueError(f"there is no such folder or file. {_FORMS}")


def _find_part(place: Path, base: ModelInfo) -> Part:
    """The transformer at a place: of a pipeline, by itself, or in a single file. ValueError if there is none."""
    if place.is_file():
        return _in_file(place, base)
    index, config = place / "model_index.json", place / "config.json"
    if index.is_file():
        kind, folder = part_class(diffusers.DiffusionPipeline.load_config(place), "transformer"), place / "transformer"
    elif config.is_file():
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
        kind, folder = part_class({"transformer": ["diffusers", name]}, "transformer"), place
    else:
        raise ValueError(f"{place} has neither model_index.json nor config.json. {_FORMS}")
    if kind.__name__ not in (wanted := base.family.MODELS["transformer"]):
        raise ValueError(f"its transformer is {kind.__name__}; beside this base it must be {' or '.join(wanted)}")
    return Part("transformer", kind, folder)


def _in_file(file: Path, base: ModelInfo) -> Part:
    """A single file says no configuration: the base's if it fits, else that which diffusers takes it for."""
    kind, wrong = part_class(base.configs["index"], "transformer"), ["its configuration is not here"]
    for root in (base.root, find_folder(default_config(file))):
        if root is None or not (root / "transformer" / "config.json").is_file():
            continue
        part = Part("transformer", kind, root / "transformer", file)
        try:
            tensors = part.tensors(None)
            more = tensors.keys() - part.empty().state_dict().keys()
            problem = part.misfits(tensors) or ("it has more layers than that" if more else "")
        except ValueError as error:
            problem = str(error)
        if not problem:
            return part
        wrong.append(problem)
    raise ValueError(
        f"it has not the shape of the base's transformer ({wrong[-1]}), and a file says no other. Give it as a folder "
        "with its config.json, written by save_pretrained"
    )


def _differences(model: TeacherModel, base: ModelInfo, root: Path | None) -> list[str]:
    """What differs from the base of what both must share, as far as the other pipeline at ``root`` says."""
    found = []
    for part, keys in {**base.family.SHARED, "scheduler": ("num_train_timesteps",)}.items():
        ours, theirs = (_config(folder, part) for folder in (base.root, root))
        if part == "transformer":
            empty: Any = base.empty_transformer()
            ours, theirs = empty.config, model.configs[part]
        for key in keys:
            mine, other = (json.loads(json.dumps(config.get(key))) for config in (ours, theirs))
            if mine != other and None not in (mine, other):
                found.append(f"its {part} has {key} {other}, the base's {mine}")
        if part == "scheduler" and theirs and not is_of_flow_matching(str(theirs.get("_class_name")), theirs):
            found.append(f"its scheduler {theirs.get('_class_name')} is not one of flow matching")
    if found:
        found[-1] += ". A teacher must see the latents, times and text embeddings of the student's base"
    return found


def _config(root: Path | None, part: str) -> Mapping[str, Any]:
    """The configuration of a part of a pipeline, empty if that is not there; of a model of text and images, its text
    model's too."""
    for name in ("config.json", "scheduler_config.json"):
        if root is not None and (file := root / part / name).is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            return {**config, **config.get("text_config", {})}
    return {}
