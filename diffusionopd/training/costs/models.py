"""Base models by their configurations alone: published ones, whose configurations are here, and any other."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from diffusionopd.models.backbone import FAMILIES, Backbone, ModelInfo, part_class, read_model
from diffusionopd.models.conditions import Conditions
from diffusionopd.models.teacher_models import read_teacher_model

_PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
PUBLISHED: dict[str, dict[str, Any]] = _PUBLISHED["transformers"]
"""Hub id -> its transformer's configuration. The models share the autoencoder, two CLIPs and T5 v1.1 XXL."""


@dataclass(frozen=True)
class Pipeline(ModelInfo):
    """The configurations of a base model; ``encoders`` has those of the text encoders by name."""

    encoders: Mapping[str, Any]

    def backbone(self, dtype: torch.dtype) -> Backbone:
        """Of tensors on the meta device, the transformer in ``dtype``."""
        index = self.configs["index"]
        with torch.device("meta"):
            transformer = part_class(index, "transformer").from_config(self.configs["transformer"])
            vae = part_class(index, "vae").from_config(self.configs["vae"])
        transformer = transformer.bfloat16() if dtype == torch.bfloat16 else transformer
        return self.family(transformer, vae, part_class(index, "scheduler")(), index=index, dtype=dtype, device="meta")

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
        index = _PUBLISHED["index"]
        configs = {"index": index, "transformer": PUBLISHED[model], "vae": _PUBLISHED["vae"], "scheduler": {}}
        encoders = {name: AutoConfig.for_model(**config) for name, config in _PUBLISHED["text_encoders"].items()}
        return Pipeline(model, None, pkgutil.resolve_name(FAMILIES[index["_class_name"]]), configs, encoders)
    info = read_model(model, **source)
    names = [name for name in info.configs if name in info.family.TEXT]
    encoders = {name: AutoConfig.for_model(**info.configs[name]) for name in names}
    return Pipeline(model, None, info.family, info.configs, encoders, root=info.root)


def with_model(pipeline: Pipeline, source: str) -> Pipeline:
    """A pipeline with the transformer of a teacher that has a model of its own. Raises BackboneError."""
    if source in PUBLISHED and not Path(source).is_dir():
        config: Any = PUBLISHED[source]
    else:
        model = read_teacher_model(source, pipeline)
        assert model is not None  # it may be downloaded
        config = model.configs["transformer"]
    return replace(pipeline, configs={**pipeline.configs, "transformer": config})
