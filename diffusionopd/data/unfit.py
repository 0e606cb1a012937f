"""Prompts that rewards cannot score: found before anything loads, and named by file and line when met later."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusionopd.data.prompts import Prompt
from diffusionopd.rewards import RewardUnavailableError, UnfitPromptError, check_prompts

_SHOWN = 3


def unfit_lines(
    prompts: Sequence[Prompt], rewards: Iterable[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[str]:
    """One line for each prompt that some of the rewards could not score: where it stands, its text, what it lacks.

    ``options``: of the rewards, by name.
    """
    texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
    found = check_prompts(rewards, texts, metadata, options)
    return [f"{_place(prompts[index])} {_short(what, 240)}" for index, what in found.items()]


def way_out(error: Exception, prompts: Sequence[Prompt], go_on: str, repaired: str) -> str:
    """What to do about an error of a reward on some prompts.

    ``go_on``, ``repaired``: how to continue, with the prompt files as they are, and with some lines changed.
    """
    if isinstance(error, RewardUnavailableError):
        return f"go on with {go_on}"
    repair = f"repair or remove {met_at(error, prompts)}, and go on with {repaired}"
    return repair if isinstance(error, UnfitPromptError) else f"go on with {go_on}; if it fails again, {repair}"


def met_at(error: Exception, prompts: Iterable[Prompt]) -> str:
    """Those of the prompts that an error of a reward is about: the one that it names, or any of them."""
    own = [prompt for prompt in prompts if not isinstance(error, UnfitPromptError) or prompt.text == error.prompt]
    places = [*dict.fromkeys(map(_place, own))]
    return " or ".join(places[:_SHOWN]) + (f" or {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")


def _place(prompt: Prompt) -> str:
    text = repr(_short(prompt.text, 80))
    return f"{prompt.source}: {text}" if prompt.source else text


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
