"""Rewards by name: a registry, the scorers, and what combines them.

A scorer's module is imported when the scorer is built, and its optional packages with it, so that knowing a name costs
nothing. To add a reward: write a class with `score` (see `Scorer`) and name it in `REGISTRY`, or call `register`.
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, Scorer, Scores
from diffusionopd.rewards.composite import AVERAGE, Composite, check_weights, score_all, weighted_average
from diffusionopd.rewards.images import Images, to_pil, to_uint8
from diffusionopd.rewards.worker import RewardWorker

__all__ = [
    "AVERAGE",
    "KNOWN_REWARDS",
    "NOT_APPLICABLE",
    "REGISTRY",
    "Composite",
    "Images",
    "RewardError",
    "RewardWorker",
    "Scorer",
    "Scores",
    "build_composite",
    "build_scorer",
    "check_name",
    "check_weights",
    "register",
    "score_all",
    "to_pil",
    "to_uint8",
    "weighted_average",
]

REGISTRY: dict[str, str] = {
    "aesthetic": "diffusionopd.rewards.aesthetic:Aesthetic",
    "clipscore": "diffusionopd.rewards.clip:ClipScore",
    "jpeg_compressibility": "diffusionopd.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "diffusionopd.rewards.jpeg:JpegIncompressibility",
    "ocr": "diffusionopd.rewards.ocr:Ocr",
    "pickscore": "diffusionopd.rewards.clip:PickScore",
    "tiny_compose": "diffusionopd.tiny.scorers:TinyCompose",
    "tiny_ocr": "diffusionopd.tiny.scorers:TinyOcr",
    "tiny_scene": "diffusionopd.tiny.scorers:TinyScene",
}
"""Reward name -> "module:attribute" of its class."""

UPSTREAM_REWARDS = frozenset(
    ("geneval", "ocr", "pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unifiedreward")
)
"""The names that configs of the upstream release use, whether or not their scorer is there."""

KNOWN_REWARDS = UPSTREAM_REWARDS | REGISTRY.keys()
"""Every name a config may use."""

EXTRAS: dict[str, str] = {"ocr": "ocr", "tiny_compose": "tiny", "tiny_ocr": "tiny", "tiny_scene": "tiny"}
"""Reward name -> the extra of this package that installs what the scorer imports."""


def register(name: str, target: str) -> None:
    """Add a reward of one's own: `register("sharpness", "my_package.rewards:Sharpness")`."""
    REGISTRY[name] = target


def check_name(name: str) -> None:
    """Raises `RewardError` for a name that no config may use, with the nearest one that it may."""
    known = KNOWN_REWARDS | REGISTRY.keys()
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
    raise RewardError(f"unknown reward '{name}'; {hint}")


def build_scorer(name: str, device: str = "cpu", **options: Any) -> Scorer:
    """Import and construct the scorer of a reward.

    Args:
        name: a key of `REGISTRY`.
        device: where its model runs; handed on to scorers that have one.
        options: the scorer's own keyword arguments.

    Raises:
        RewardError: unknown name, no scorer of that name in this version, a package that is not installed (with the
            command that installs it), or an option that the scorer does not have.
    """
    check_name(name)
    if name not in REGISTRY:
        raise RewardError(
            f"reward '{name}' has no scorer in this version; available: {', '.join(sorted(REGISTRY))}. "
            "A scorer of your own can be added with diffusionopd.rewards.register (docs/rewards.md)"
        )
    module, attribute = REGISTRY[name].split(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
        return factory(**_arguments(name, factory, device, options))
    except ImportError as error:
        raise RewardError(f"reward '{name}' cannot be imported: {error}. Its packages: {_install(name)}") from error


def _install(name: str) -> str:
    return f"pip install -e '.[{EXTRAS[name]}]'" if name in EXTRAS else "install it with pip"


def _arguments(name: str, factory: Any, device: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, checked, with the device for those scorers that take one."""
    signature = inspect.signature(factory)
    arguments = dict(options)
    if "device" in signature.parameters:
        arguments["device"] = device
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise RewardError(f"reward '{name}': {error}; its options are {', '.join(signature.parameters)}") from error
    return arguments


def build_composite(
    weights: Mapping[str, float], device: str = "cpu", options: Mapping[str, Mapping[str, Any]] | None = None
) -> Composite:
    """The weighted composite of several rewards, `{"pickscore": 1.0, "clipscore": 1.0}`.

    Args:
        weights: reward name -> weight.
        device: where the models run.
        options: reward name -> that scorer's own keyword arguments.

    Raises:
        RewardError: as `build_scorer`; weights that are no weights.
    """
    check_weights(weights)
    given = options or {}
    return Composite(weights, {name: build_scorer(name, device, **given.get(name, {})) for name in weights})
