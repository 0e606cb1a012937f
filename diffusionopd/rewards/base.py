"""What every scorer is: the protocol, its error, and the value that says "does not apply"."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusionopd.files import located, looked_in
from diffusionopd.rewards.images import Images

NOT_APPLICABLE = -10.0
"""Score of an image to which a reward does not apply (upstream's value); left out of every mean."""

Scores = dict[str, np.ndarray]
"""Name of a score -> float64 array of length B."""


@dataclass(frozen=True)
class Weighted:
    """A figure of a test set: the mean of the score `of` over samples that count as `by` says, another of their scores.

    With a share in `of` and its number of questions in `by`, it is the share of all questions.
    """

    of: str
    by: str


Combined = Mapping[str, Sequence[str] | Weighted]
"""Name of a figure of a test set -> the scores whose means are averaged, or `Weighted`: a scorer's `combined`."""


class RewardError(ValueError):
    """A reward that is unknown, cannot be built here, or gave scores of the wrong form."""


class UnfitPromptError(RewardError):
    """A prompt that a reward cannot score, whatever the image.

    `what` says what is wrong (a predicate of the prompt), `prompt` is its text.
    """

    def __init__(self, what: str, prompt: str, reward: str = ""):
        self.what, self.prompt = what, prompt
        place = f"reward '{reward}': " if reward else ""
        super().__init__(f"{place}the prompt {prompt!r} {what}")


class RewardUnavailableError(RewardError):
    """A reward that is temporarily unavailable (asking again may help): a server does not answer, or is busy."""


@runtime_checkable
class Scorer(Protocol):
    """Gives every image one number or several."""

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """Score B images.

        Args:
            images: uint8 `[B, H, W, 3]`, as evaluation and training give them; `[B, 3, H, W]` tensors, uint8 or float
                in [0, 1], and B PIL images as well, once `images.to_uint8` has converted them.
            prompts: the B prompts.
            metadata: what the prompt file says about each prompt beside its text; `{}` where it says nothing.

        Returns:
            float64 arrays of length B by score name. The reward's own name is always among them.
        """
        ...


def unfit(
    read: Callable[[str, Mapping[str, Any]], object], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[int, str]:
    """Index of a prompt -> what is wrong with it, a predicate such as "has no text in quotes"; all of them at once.

    A scorer's class may have a static `check(prompts, metadata)` that says this, such as `partial(unfit, read)`. It is
    asked before any weights load and whether or not the packages are there that scoring needs.

    Args:
        read: of one prompt and its metadata; may raise `UnfitPromptError`.
    """
    found = {}
    for index, one in enumerate(zip(prompts, metadata, strict=True)):
        try:
            read(*one)
        except UnfitPromptError as error:
            found[index] = error.what
    return found


def not_whole(least: Mapping[str, int], /, **options: Any) -> list[str]:
    """Which of the options (those left out are defaults) are not whole numbers of at least so much."""
    return [
        f"{name} must be a whole number of at least {low}, not {name}={options[name]!r}"
        for name, low in least.items()
        if name in options and (type(options[name]) is not int or options[name] < low)
    ]


def fetch_command(reward: str) -> str:
    """What fetches the files of a reward."""
    return f"python -m tools.download rewards {reward}"


@contextmanager
def importing(what: str, remedy: str) -> Iterator[None]:
    """A package that is missing inside the block is a `RewardError`: `what` cannot be imported, and the `remedy`."""
    try:
        yield
    except ImportError as error:
        raise RewardError(f"{what} cannot be imported: {error}. {remedy}") from error


def find_packages(*names: str) -> None:
    """Raises `ImportError`, as importing it would, for a package that is not here; imports none."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}")


FOLDER = "reward_ckpts/"
"""Where the official files of rewards are."""


def official_file(reward: str, path: str) -> Path:
    """The place of a file of a reward. Raises `RewardError`, with the command that fetches it, if it is missing."""
    place = Path(located(path))
    if not place.is_file():
        where, fetch = looked_in(path), fetch_command(reward)
        raise RewardError(f"{path}, which reward '{reward}' needs, does not exist{where}. To fetch it: {fetch}")
    return place
