"""Rewards by name: a registry, the scorers, and what combines them.

A scorer's module is imported when the scorer is built, and its optional packages with it, so that knowing a name costs
nothing. To add a reward: write a class with `score` (see `Scorer`) and name it in `REGISTRY`, or call `register`.
"""

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusionopd.config_schema.problems import nearest
from diffusionopd.config_schema.secrets import REMEDY, find_secrets
from diffusionopd.files import user_path
from diffusionopd.rewards.base import (
    NOT_APPLICABLE,
    PromptChecker,
    RewardError,
    RewardUnavailableError,
    Scorer,
    Scores,
    UnfitPromptError,
)
from diffusionopd.rewards.composite import AVERAGE, Composite, check_weights, score_all
from diffusionopd.rewards.images import Images, to_uint8
from diffusionopd.rewards.worker import RewardWorker, failed

__all__ = [
    "AVERAGE", "EXTRAS", "NOT_APPLICABLE", "REGISTRY", "Composite", "Images", "PromptChecker", "RewardError",
    "RewardUnavailableError", "RewardWorker", "Scorer", "Scores", "UnfitPromptError", "build_composite", "build_scorer",
    "check_name", "check_options", "check_prompts", "failed", "register", "score_all", "to_uint8",
]  # fmt: skip

REGISTRY: dict[str, str] = {
    "aesthetic": "diffusionopd.rewards.aesthetic:Aesthetic",
    "clipscore": "diffusionopd.rewards.clip:ClipScore",
    "geneval": "diffusionopd.rewards.geneval.scorer:GenEval",
    "hpsv2": "diffusionopd.rewards.hpsv2:Hpsv2",
    "imagereward": "diffusionopd.rewards.imagereward:ImageReward",
    "jpeg_compressibility": "diffusionopd.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "diffusionopd.rewards.jpeg:JpegIncompressibility",
    "ocr": "diffusionopd.rewards.ocr:Ocr",
    "pickscore": "diffusionopd.rewards.clip:PickScore",
    "tiny_compose": "diffusionopd.tiny.scorers:TinyCompose",
    "tiny_dull": "diffusionopd.tiny.scorers:TinyDull",
    "tiny_ocr": "diffusionopd.tiny.scorers:TinyOcr",
    "tiny_scene": "diffusionopd.tiny.scorers:TinyScene",
    "unifiedreward": "diffusionopd.rewards.unifiedreward:UnifiedReward",
}
"""Reward name -> "module:attribute" of its class."""

EXTRAS: dict[str, str] = {
    **{name: name for name in ("geneval", "hpsv2", "ocr")},
    **dict.fromkeys(("tiny_compose", "tiny_dull", "tiny_ocr", "tiny_scene"), "tiny"),
}
"""Reward name -> the extra of this package that installs what the scorer imports."""


def register(name: str, target: str) -> None:
    """Add a reward of one's own: `register("sharpness", "my_package.rewards:Sharpness")`."""
    REGISTRY[name] = target


def check_name(name: str) -> None:
    """Raises `RewardError` for a name that no config may use, with the nearest one that it may."""
    if name not in REGISTRY:
        hint = nearest(name, REGISTRY) or f" Known: {', '.join(sorted(REGISTRY))}"
        raise RewardError(f"unknown reward '{name}'.{hint}")


def build_scorer(name: str, device: str = "cpu", options: Mapping[str, Any] | None = None) -> Scorer:
    """Import and construct the scorer of a reward.

    Args:
        name: a key of `REGISTRY`.
        device: where its model runs, unless the options say otherwise; handed on to scorers that have one.
        options: the scorer's own keyword arguments, a device of its own among them.

    Raises:
        RewardError: unknown name, a package that is not installed (with the command that installs it), a file or server
            that is not there, or an option that the scorer does not have.
    """
    factory = _factory(name, options or {})
    own = {"device": device} if "device" in inspect.signature(factory).parameters else {}
    given = {o: user_path(v) if isinstance(v, str) and v.startswith("~") else v for o, v in (options or {}).items()}
    with _packages(name):
        return factory(**own | given)


def check_options(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Options of rewards (`reward_options` of a configuration), before anything is loaded: names and keys only.

    Raises:
        RewardError: an unknown reward, an option that its scorer does not have, or one that holds a secret, a package
            that is not installed.
    """
    for place, what in find_secrets(options):
        raise RewardError(f"reward option {place} {what}. {REMEDY}")
    for name, given in options.items():
        if not isinstance(given, Mapping):
            raise RewardError(f"the options of reward '{name}' must be {{option: value}}, not {given!r}")
        _factory(name, given)


def check_prompts(
    names: Iterable[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[int, str]:
    """Which prompts some of the rewards could not score: index -> what is wrong, with the reward; nothing is loaded.

    Rewards whose class has no `check`, or cannot be imported here, find nothing wrong: building those says what is.
    """
    found: dict[int, str] = {}
    for name in names:
        try:
            scorer = _factory(name, {})
        except RewardError:
            continue
        # A method of an object may be called check too, and be something else.
        if isinstance(inspect.getattr_static(scorer, "check", None), staticmethod | classmethod):
            for index, what in scorer.check(prompts, metadata).items():
                found.setdefault(index, f"{what} (reward '{name}')")
    return dict(sorted(found.items()))


def _factory(name: str, options: Mapping[str, Any]) -> Any:
    """The class of a scorer, once it is known to have these options."""
    check_name(name)
    module, attribute = REGISTRY[name].split(":")
    with _packages(name):
        factory = getattr(importlib.import_module(module), attribute)
    signature = inspect.signature(factory)
    try:
        signature.bind_partial(**options)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise RewardError(f"reward '{name}': {error}; its options: {known}") from error
    return factory


@contextmanager
def _packages(name: str) -> Iterator[None]:
    """A package that is missing inside the block is named with the command that installs it."""
    try:
        yield
    except ImportError as error:
        install = f"pip install -e '.[{EXTRAS[name]}]'" if name in EXTRAS else "install it with pip"
        raise RewardError(f"reward '{name}' cannot be imported: {error}. Its packages: {install}") from error


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
    return Composite(weights, {name: build_scorer(name, device, given.get(name)) for name in weights})
