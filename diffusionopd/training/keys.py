"""All keys together: their schema, and a configuration with its paths, LoRAs and the base model's own values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffusionopd import config_schema
from diffusionopd.algorithms import ALGORITHMS, AlgorithmSettings
from diffusionopd.algorithms.optim import EmaSettings, OptimizerSettings
from diffusionopd.algorithms.settings import SamplerSettings
from diffusionopd.config_schema import (
    SECTIONS,
    ConfigError,
    Problems,
    Schema,
    flatten,
    keys_of,
    placed,
    read,
    to_plain,
    unwritable,
)
from diffusionopd.config_schema.paths import is_hub_id
from diffusionopd.config_schema.upstream import UpstreamSettings
from diffusionopd.data.batches import NoiseSettings
from diffusionopd.data.loras import read_loras
from diffusionopd.data.rounds import BatchSettings, fitted_round
from diffusionopd.data.tasks import FIELDS, TaskSettings
from diffusionopd.models.loading import BackboneError, read_model
from diffusionopd.models.settings import BaseSettings, LoraSettings, MemorySettings
from diffusionopd.training.settings import RunSettings, WatchSettings

COMMON = (
    RunSettings,
    WatchSettings,
    MemorySettings,
    BaseSettings,
    AlgorithmSettings,
    TaskSettings,
    BatchSettings,
    NoiseSettings,
    SamplerSettings,
    OptimizerSettings,
    LoraSettings,
    EmaSettings,
)


SCHEMA = Schema(*COMMON, *(group for cls in ALGORITHMS.values() for group in cls.groups), UpstreamSettings)


_COMMON_KEYS = frozenset(Schema(*COMMON).keys)


def base_config() -> ConfigDict:
    """A fresh copy of all defaults: what ``config/base.py`` returns."""
    return SCHEMA.config()


def load_config(source: str, overrides: Sequence[tuple[str, str | None]] = ()) -> ConfigDict:
    """:func:`diffusionopd.config_schema.load_config` with the keys of this project."""
    return config_schema.load_config(SCHEMA, source, overrides)


def with_paths(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, as nested dicts, with its paths, also its tasks', as they lead from here.

    ``~`` is a home folder. A relative path is one from the current folder; what is not there to read is looked for in
    the project's.
    """
    found = placed(to_plain(config), SCHEMA.keys)
    for name in SECTIONS:
        if isinstance(section := found.get(name), Mapping):
            own = {key.removeprefix(f"{name}."): declared for key, declared in SCHEMA.keys.items()}
            found[name] = placed(section, own)
    tasks = found["train"].get("teachers") if isinstance(found.get("train"), Mapping) else None
    if isinstance(tasks, list | tuple):
        found["train"]["teachers"] = [placed(task, FIELDS) if isinstance(task, Mapping) else task for task in tasks]
    return found


def with_loras(config: ConfigDict) -> ConfigDict:
    """The configuration with ``train.teachers`` in the place of ``loras``, and a round of them; itself without any.

    Raises ConfigError with all that is wrong with the LoRAs' table.
    """
    values = flatten(config)
    if not (given := values.get("loras")):
        return config
    problems = Problems()
    if problem := SCHEMA.keys["loras"].problem(given):
        problems.add("loras", *problem)
    if values.get("train.teachers"):
        problems.add("loras", "is set, and so is train.teachers", "Leave one of them out.")
    if problems.found:
        raise ConfigError(problems.found)
    values["train.teachers"] = read_loras(given)
    made = config.copy_and_resolve_references()
    made.loras, made.train.teachers = None, values["train.teachers"]
    counts = {key.name: key for key in keys_of(BatchSettings).values()}
    if all(name in values and not key.problem(values[name]) for name, key in counts.items()):
        made.update_from_flattened_dict(fitted_round(values))
    return made


def with_model_values(config: ConfigDict) -> ConfigDict:
    """The configuration with what it leaves to the base model: None takes the default of the model's family.

    The small files of a model on the hub are fetched for that; BackboneError where they cannot be. A configuration that
    is wrong is left as it is, for :func:`check` to report.
    """
    values = flatten(with_paths(config))
    left = SCHEMA.left_to_model(values)
    own = keys_of(BaseSettings).values()
    if not left or any(key.name not in values or key.problem(values[key.name]) for key in own):
        return config
    try:
        model = read_model(**read(BaseSettings, values).source)
    except BackboneError:
        if is_hub_id(values["pretrained.model"]):
            raise
        return config
    made = config.copy_and_resolve_references()
    made.update_from_flattened_dict({name: getattr(model.defaults, field) for name, field in left.items()})
    return made


def unsaved(values: Mapping[str, Any]) -> list[str]:
    """Keys without effect on this run that hold what cannot be saved: they are left at their defaults."""
    unused = (name for name in SCHEMA.keys if not is_used(name, values.get("train.algorithm", "")))
    return [name for name in unused if any(unwritable(values.get(name), name))]


def is_used(name: str, algorithm: str) -> bool:
    """Whether an algorithm reads a key."""
    cls = ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
    return name in _COMMON_KEYS or (cls is not None and name in Schema(*cls.groups).keys)


def ema_repeats(values: Mapping[str, Any]) -> int:
    """`train.ema_repeats` of a checked flat configuration, with the published number for 0."""
    batches = read(BatchSettings, values)
    in_step = batches.gradient_accumulation_steps * batches.batch_size // batches.train_batch_size
    published = in_step if ALGORITHMS[values["train.algorithm"]].ema_each_batch else 1
    return values["train.ema_repeats"] or max(1, published)
