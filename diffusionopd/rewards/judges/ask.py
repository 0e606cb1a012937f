"""What several judges do alike: fill in what is asked, read yes or no, and average."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusionopd.rewards.base import NOT_APPLICABLE, UnfitPromptError
from diffusionopd.rewards.judges.server import Answer

_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


def filled(template: str, prompt: str, metadata: Mapping[str, Any]) -> str:
    """The template with `{prompt}` and `{key}` of the metadata filled in, once; other braces have no meaning.

    Raises:
        UnfitPromptError: the metadata lacks a key.
    """
    values = {**metadata, "prompt": prompt}  # as it was drawn: a task's trigger is not in the metadata
    if missing := sorted({name for name in _PLACE.findall(template) if name not in values}):
        raise UnfitPromptError(f"has no {', '.join(map(repr, missing))}, which the judge's question names", prompt)
    return _PLACE.sub(lambda place: str(values[place[1]]), template)


def yes_or_no(answer: Answer) -> bool | None:
    """Whether the first word is yes; None if it is neither yes nor no."""
    return {"yes": True, "no": False}.get(answer.word())


def mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the values; `NOT_APPLICABLE` without any."""
    return float(np.mean(values)) if len(values) else NOT_APPLICABLE
