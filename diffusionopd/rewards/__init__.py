"""Rewards by name: a registry, the scorers, and what combines them.

A scorer's module is imported when the scorer is built, and its optional packages with it, so that knowing a name costs
nothing. To add a reward: write a class with `score` (see `Scorer`) and name it in `REGISTRY`, or call `register`.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from diffusionopd.config_schema.problems import nearest
from diffusionopd.config_schema.secrets import REMEDY, find_secrets
from diffusionopd.files import located, sha256, user_path
from diffusionopd.rewards.base import (
    FOLDER,
    NOT_APPLICABLE,
    Combined,
    RewardError,
    RewardUnavailableError,
    Scorer,
    Scores,
    UnfitPromptError,
    Weighted,
    importing,
    official_file,
)
from diffusionopd.rewards.composite import AVERAGE, Composite, check_weights, score_all
from diffusionopd.rewards.images import Images, to_uint8
from diffusionopd.rewards.worker import RewardWorker, failed

__all__ = [
    "AVERAGE", "EXTRAS", "NOT_APPLICABLE", "REGISTRY", "RUNTIME_OPTIONS", "Combined", "Composite", "Images",
    "RewardError", "RewardUnavailableError", "RewardWorker", "Scorer", "Scores", "UnfitPromptError", "Weighted",
    "build_composite", "build_scorer", "build_scorers", "check_name", "check_options", "check_prompts", "digests",
    "failed", "register", "score_all", "to_uint8",
]  # fmt: skip

RUNTIME_OPTIONS = frozenset(
    "device batch_size base_url api_key_variable timeout connect_timeout retries backoff concurrency".split()
)
"""Options that say where a scorer runs or how long to wait for it, not what it scores."""
REGISTRY: dict[str, str] = {
    "aesthetic": "diffusionopd.rewards.aesthetic:Aesthetic",
    "clipscore": "diffusionopd.rewards.clip:ClipScore",
    "compbench_attribute": "diffusionopd.rewards.compbench.scorers:Attribute",
    "compbench_complex": "diffusionopd.rewards.compbench.scorers:Complex",
    "compbench_nonspatial": "diffusionopd.rewards.compbench.scorers:NonSpatial",
    "compbench_spatial": "diffusionopd.rewards.compbench.scorers:SpatialRelation",
    "dpgbench": "diffusionopd.rewards.judges.dpgbench:DpgBench",
    "geneval": "diffusionopd.rewards.geneval.scorer:GenEval",
    "geneval2": "diffusionopd.rewards.judges.geneval2:GenEval2",
    "hpsv2": "diffusionopd.rewards.hpsv2:Hpsv2",
    "hpsv3": "diffusionopd.rewards.hpsv3:Hpsv3",
    "imagereward": "diffusionopd.rewards.imagereward:ImageReward",
    "jpeg_compressibility": "diffusionopd.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "diffusionopd.rewards.jpeg:JpegIncompressibility",
    "judge": "diffusionopd.rewards.judges.judge:Judge",
    "ocr": "diffusionopd.rewards.ocr:Ocr",
    "pickscore": "diffusionopd.rewards.clip:PickScore",
    "tiny_compose": "diffusionopd.tiny.scorers:TinyCompose",
    "tiny_dull": "diffusionopd.tiny.scorers:TinyDull",
    "tiny_ocr": "diffusionopd.tiny.scorers:TinyOcr",
    "tiny_scene": "diffusionopd.tiny.scorers:TinyScene",
    "unifiedreward": "diffusionopd.rewards.unifiedreward:UnifiedReward",
    "wise": "diffusionopd.rewards.judges.wise:Wise",
    "wise_verified": "diffusionopd.rewards.judges.wise:WiseVerified",
}
"""Reward name -> "module:attribute" of its class."""

EXTRAS: dict[str, str] = {
    **{name: name for name in ("geneval", "hpsv2", "ocr")},
    **dict.fromkeys(("compbench_attribute", "compbench_complex", "compbench_spatial"), "compbench"),
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
            that is not there, or an option that the scorer does not have or that has a value that it cannot have.
    """
    factory = _factory(name, options or {})
    if found := _wrong_values(factory, options or {}):
        raise RewardError(f"reward '{name}': {'; '.join(found)}")
    own = {"device": device} if "device" in inspect.signature(factory).parameters else {}
    given = {o: user_path(v) if isinstance(v, str) and v.startswith("~") else v for o, v in (options or {}).items()}
    with _packages(name):
        return factory(**own | given)


def build_scorers(
    names: Iterable[str], device: str = "cpu", options: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Scorer]:
    """The scorers of several rewards by name, as `build_scorer`; `RewardError` that names all that cannot be had."""
    built, problems = {}, []
    for name in names:
        try:
            built[name] = build_scorer(name, device, (options or {}).get(name))
        except RewardError as error:
            problems.append(error)
    if problems:
        unavailable = all(isinstance(error, RewardUnavailableError) for error in problems)
        kind = RewardUnavailableError if unavailable else RewardError
        raise kind("\n".join(map(str, problems))) from problems[0]
    return built


def check_options(options: Mapping[str, Mapping[str, Any]], used: Iterable[str] = ()) -> None:
    """Options of rewards (`reward_options` of a configuration), before anything is loaded and without asking a server.

    Args:
        used: names of rewards that will be built, of which some cannot do without options.

    Raises:
        RewardError: what is wrong, all of it: an unknown reward, an option that its scorer does not have, a value that
            it cannot have, one that holds a secret, a file that is not what it should be, a package that is not there.
    """
    problems = [f"reward option {place} {what}. {REMEDY}" for place, what in find_secrets(options)]
    for name in dict.fromkeys([*options, *used]):
        given = options.get(name, {})
        if not isinstance(given, Mapping):
            problems.append(f"the options of reward '{name}' must be {{option: value}}, not {given!r}")
            continue
        try:
            factory = _factory(name, given)
        except RewardError as error:
            problems.append(str(error))
            continue
        problems += [f"reward '{name}': {what}" for what in _wrong_values(factory, given)]
    if problems:
        raise RewardError("\n".join(problems))


def check_prompts(
    names: Iterable[str],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[int, str]:
    """Which prompts some of the rewards could not score: index -> what is wrong, with the reward; nothing is loaded.

    Rewards whose class has no `check`, or that cannot be imported or have these options, find nothing wrong: building
    those says what is.
    """
    found: dict[int, str] = {}
    for name in names:
        given = (options or {}).get(name) or {}
        try:
            scorer = _factory(name, given)
            # A method of an object may be called check too, and be something else.
            if isinstance(inspect.getattr_static(scorer, "check", None), staticmethod | classmethod):
                unfit = scorer.check(prompts, metadata)
            elif hasattr(scorer, "check_with"):
                unfit = scorer.check_with(given, prompts, metadata)
            else:
                continue
        except RewardError:
            continue
        for index, what in unfit.items():
            found.setdefault(index, f"{what} (reward '{name}')")
    return dict(sorted(found.items()))


def digests(name: str, options: Mapping[str, Any]) -> list[str]:
    """SHA-256 of the files of a reward's options that its scores depend on; those that cannot be read are left out."""
    factory = _factory(name, options)
    files: list[str] = factory.files(options) if hasattr(factory, "files") else []
    return [sha256(path) for path in map(located, files) if Path(path).is_file()]


def lacking(name: str, options: Mapping[str, Any]) -> str:
    """What keeps a reward from being built here, as far as its packages and files tell without loading; or nothing."""
    try:
        factory = _factory(name, options)
        with _packages(name):
            getattr(factory, "packages", lambda _: None)(options)
        bound = inspect.signature(factory).bind_partial(**options)
        bound.apply_defaults()
        idle = factory.dispensable(options) if hasattr(factory, "dispensable") else ()
        for option, value in bound.arguments.items():
            if option not in idle and isinstance(value, str) and value.startswith(FOLDER):
                official_file(name, value)
    except RewardError as error:
        return str(error)
    return ""


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


def _wrong_values(factory: Any, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of options: by annotations `str` and `Literal`, then by the scorer's `problems`."""
    annotations = {name: each.annotation for name, each in inspect.signature(factory).parameters.items()}
    listed = {name: get_args(each) for name, each in annotations.items() if get_origin(each) is Literal}
    found = [
        f"{name} must be one of {', '.join(listed[name])}, not {name}={value!r}"
        for name, value in options.items()
        if value not in listed.get(name, [value])
    ]
    others = {n: value for n, value in options.items() if annotations.get(n) is str and not isinstance(value, str)}
    found += [f"{name} must be text, not {name}={value!r}" for name, value in others.items()]
    # Its own problems read those as text.
    return found if others else found + getattr(factory, "problems", lambda **_: [])(**options)


def _packages(name: str) -> AbstractContextManager[None]:
    """A package of a scorer that is missing inside the block is named with the command that installs it."""
    install = f"pip install -e '.[{EXTRAS[name]}]'" if name in EXTRAS else "install it with pip"
    return importing(f"reward '{name}'", f"Its packages: {install}")


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
    return Composite(weights, build_scorers(weights, device, options))
