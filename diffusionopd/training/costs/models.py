"""Base models by their configurations alone: published ones, whose configurations are here, and any other."""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.loading import FAMILIES, ModelInfo, part_class, read_model
from diffusionopd.models.teacher_models import read_teacher_model

_FILE = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
PUBLISHED: dict[str, dict[str, Any]] = {name: model.get("transformer", {}) for name, model in _FILE["models"].items()}
"""Hub id -> what its transformer's configuration has beside the defaults of its class."""
REWARDS: dict[str, dict[str, Any]] = _FILE["rewards"]
"""Reward -> the dtype that its models have by default, and their numbers of parameters."""


@dataclass(frozen=True)
class Pipeline(ModelInfo):
    """The configurations of a base model; ``encoders`` has those of the text encoders by name."""

    encoders: Mapping[str, Any]

    def backbone(self, dtype: torch.dtype) -> Backbone:
        """Of tensors on the meta device, the transformer in ``dtype``."""
        index = self.configs["index"]
        with torch.device("meta"):
            transformer, vae = _made(self.configs, "transformer"), _made(self.configs, "vae")
        scheduler = _made(self.configs, "scheduler")
        transformer = transformer.bfloat16() if dtype == torch.bfloat16 else transformer
        return self.family(transformer, vae, scheduler, index=index, dtype=dtype, device="meta")

    def conditions(self, rows: int, max_sequence_length: int, dtype: torch.dtype) -> Conditions:
        """What the transformer sees of so many prompts at their longest: zeros."""
        encoders = {name: config.to_dict() for name, config in self.encoders.items()}
        shapes = self.family.row_shapes(max_sequence_length, {**self.configs, **encoders})
        return Conditions({name: torch.zeros(rows, *shape, dtype=dtype) for name, shape in shapes.items()})

    def encoder_parameters(self) -> int:
        """Of all text encoders."""
        with torch.device("meta"):
            models = [getattr(transformers, self.configs["index"][name][1])(c) for name, c in self.encoders.items()]
        return sum(parameter.numel() for model in models for parameter in model.parameters())


def read_pipeline(model: str, **source: Any) -> Pipeline:
    """The configurations of a base model; arguments and error as of `read_model`."""
    if model in PUBLISHED and not Path(model).is_dir():
        return _published(model)
    info = read_model(model, **source)
    names = [name for name in info.configs if name in info.family.TEXT]
    encoders = {name: AutoConfig.for_model(**info.configs[name]) for name in names}
    return Pipeline(model, info.family, info.configs, encoders, root=info.root)


def _published(model: str) -> Pipeline:
    own, shared = _FILE["models"][model], _FILE["pipelines"][_FILE["models"][model]["pipeline"]]
    configs = {
        "index": {"_class_name": own["pipeline"], **shared["index"], **own.get("index", {})},
        "transformer": PUBLISHED[model],
        "vae": shared["vae"],
        "scheduler": {**shared.get("scheduler", {}), **own.get("scheduler", {})},
    }
    names = {**shared["text_encoders"], **own.get("text_encoders", {})}
    encoders = {name: AutoConfig.for_model(**_FILE["text_encoders"][encoder]) for name, encoder in names.items()}
    for part in ("transformer", "vae", "scheduler"):  # families also ask for what is left to the class
        configs[part] = _defaults(part_class(configs["index"], part)) | configs[part]
    return Pipeline(model, pkgutil.resolve_name(FAMILIES[own["pipeline"]]), configs, encoders)


def _defaults(kind: type) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters
    return {
        name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty
    }


def _made(configs: Mapping[str, Any], part: str) -> Any:
    return part_class(configs["index"], part).from_config(configs[part])


def with_model(pipeline: Pipeline, source: str) -> Pipeline:
    """A pipeline with the transformer of a teacher that has a model of its own. Raises BackboneError."""
    if source in PUBLISHED and not Path(source).is_dir():
        config: Any = PUBLISHED[source]
    else:
        model = read_teacher_model(source, pipeline)
        assert model is not None  # it may be downloaded
        config = model.configs["transformer"]
    return replace(pipeline, configs={**pipeline.configs, "transformer": config})
