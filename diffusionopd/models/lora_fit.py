"""A LoRA on a base model: its layers are found among the modules by name and shape, before the model's weights load."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from diffusionopd.models.loading import ModelInfo, family_of
from diffusionopd.models.lora_files import AdapterError, LoraWeights, load_lora, refuse


def linear_layers(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Linear layers by their original names, also inside injected ones -> the shapes of their matrices."""
    return {
        name.removesuffix(".base_layer"): tuple(module.weight.shape)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def ends_in(name: str, end: str) -> bool:
    """Whether whole parts of a module's name are its ``end``."""
    return name == end or name.endswith(f".{end}")


def find_targets(transformer: nn.Module, ends: Sequence[str]) -> dict[str, set[str]]:
    """Ends of names -> the linear layers that have them. Raises AdapterError for an end that none has."""
    layers = linear_layers(transformer)
    found = {end: {name for name in layers if ends_in(name, end)} for end in ends}
    refuse("target modules", {"no linear layer's name ends so": [end for end, own in found.items() if not own]})
    return found


def fit(weights: LoraWeights, transformer: nn.Module) -> LoraWeights:
    """The LoRA by the names of ``transformer``'s modules, whose parameters may be on the meta device.

    Raises AdapterError when it does not fit: modules that the base does not have, modules its own config names but that
    have no tensors, two layers for one module, shapes of another base, or a module that was never trained (but for
    those without influence on the output: :meth:`Backbone.inert_of`).
    """
    linear = linear_layers(transformer)
    parts: list[tuple[str, str, Tensor]] = []  # module, the layer of the file that it is in, its rows of B
    family = family_of(transformer)
    foreign = family.lora_layers(linear) if family else {}
    inert = family.inert_of(transformer) if family else set()
    own = {name.replace(".", "_"): name for name in linear}
    for name, b in weights.b.items():
        key = name.replace(".", "_")
        split = foreign.get(key)
        parts += [(m, name, rows) for m, rows in (split(b) if split else {own.get(key, name): b}).items()]
    source = {module: name for module, name, _ in parts}
    fitted = replace(
        weights,
        a={module: weights.a[name] for module, name in source.items()},
        b={module: rows.contiguous() for module, _, rows in parts},
        alpha={module: weights.alpha[name] for module, name in source.items()},
    )
    shapes = {name: (fitted.b[name].shape[0], a.shape[1]) for name, a in fitted.a.items()}
    hint = "" if shapes.keys() & linear.keys() else ", nor any other of this LoRA, which is of another kind of model"
    missing = "modules that its config names have no tensors, and would silently stay untrained (save it again)"
    untrained = "lora_B is all zero (never trained, or lost when it was saved)"
    problems = {
        f"the base model has no such modules{hint}": shapes.keys() - linear.keys(),
        missing: _targets(weights, linear) - shapes.keys(),
        "two layers for one module": [m for m, n in Counter(module for module, *_ in parts).items() if n > 1],
        "shapes of another base model": [
            f"{n} (LoRA {shape}, base {linear[n]})" for n, shape in shapes.items() if linear.get(n, shape) != shape
        ],
        untrained: {n for n, b in fitted.b.items() if not b.any()} - inert,
    }
    refuse(weights.source, problems)
    return fitted


def find_all(
    sources: Mapping[str, str | LoraWeights], base: str, model: ModelInfo | None
) -> tuple[dict[str, LoraWeights], dict[str, str], list[str]]:
    """Read and fit LoRAs, by any names: those that can be used, what is wrong with the others, and notes.

    ``model`` is what is known of ``base`` without its weights; None: whether a LoRA fits it is not looked at. Warns of
    a LoRA that says it was trained on another model.
    """
    found, wrong, notes = {}, {}, []
    transformer = model.empty_transformer() if model and sources else None
    # Of these alone: text encoders come from models of their own.
    known = [model.configs[part] for part in ("index", "transformer")] if model else []
    origins = [str(config.get("_name_or_path") or "") for config in known]
    for name, source in sources.items():
        try:
            weights = load_lora(source) if isinstance(source, str) else source
            found[name] = weights if transformer is None else fit(weights, transformer)
        except AdapterError as error:
            wrong[name] = str(error)
            continue
        differs = is_of_another_base(weights.base, [base, *origins])
        said = f"{weights.source} was trained on {weights.base}, by its own words, and the base here is {base}"
        if differs:
            warnings.warn(f"{said}: on another model it is another function, even if its shapes fit", stacklevel=2)
        elif differs is None:
            notes.append(f"{said}: whether that is the same model is not known")
    return found, wrong, notes


def is_of_another_base(trained_on: str, origins: Sequence[str]) -> bool | None:
    """Whether a LoRA's base is another model than that with ``origins``, its hub id, folder and the like; None where
    that cannot be told.

    Models of the hub are compared by the last part of their names, so that a copy in another organisation is the same.
    A folder may be called anything: that it is called like the model says that it is that model, another name says
    nothing. A base that is known as a folder of another machine says nothing at all.
    """
    theirs = _hub_name(trained_on)
    if not theirs or theirs in {_short(Path(origin).name) for origin in origins} | set(map(_hub_name, origins)):
        return False
    return True if any(map(_hub_name, origins)) else None


def _hub_name(origin: str) -> str:
    """The last part of a hub id, or of the hub id in a path of the hub's cache; empty for another path."""
    if cached := re.search(r"models--[^/]+?--([^/]+)", origin):
        return _short(cached[1])
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", origin) and not Path(origin).exists()
    return _short(origin.split("/")[1]) if is_id else ""


def _short(name: str) -> str:
    return name.lower().removesuffix("-diffusers")


def _targets(weights: LoraWeights, names: Collection[str]) -> set[str]:
    """The modules that a LoRA's own configuration selects, by PEFT's rule."""
    if weights.config is None or not weights.config.target_modules:
        return set()
    try:
        return {name for name in names if check_target_module_exists(weights.config, name)}
    except Exception as error:  # patterns that are no regular expressions, layers that are no numbers
        raise AdapterError(f"{weights.source}: the modules in its config cannot be read: {error!r}") from error
