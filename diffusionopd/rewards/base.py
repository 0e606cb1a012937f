"""What every scorer is: the protocol, its error, and the value that says "does not apply"."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusionopd.rewards.images import Images

NOT_APPLICABLE = -10.0
"""Score of a picture to which a reward does not apply (upstream's value); left out of every mean."""

Scores = dict[str, np.ndarray]
"""Name of a score -> float64 array of length B."""


class RewardError(ValueError):
    """A reward that is unknown, cannot be built here, or gave scores of the wrong form."""


class RewardUnavailableError(RewardError):
    """A reward that cannot be had now but may be later: a server that does not answer, or says that it cannot."""


@runtime_checkable
class Scorer(Protocol):
    """Gives every picture one number or several."""

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """Score B pictures.

        Args:
            images: `[B, 3, H, W]` uint8, or float in [0, 1]; or B PIL pictures.
            prompts: the B prompts.
            metadata: what the prompt file says about each prompt beside its text; `{}` where it says nothing.

        Returns:
            float64 arrays of length B by score name. The reward's own name is always among them.
        """
        ...


def checked_scores(name: str, scores: Mapping[str, Any], count: int) -> Scores:
    """The scores as float64 arrays, once they have the form the protocol promises.

    Raises:
        RewardError: a score of the wrong length, or not finite. A broken scorer must not end up in a mean.
    """
    result = {}
    for key, values in scores.items():
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (count,):
            raise RewardError(f"reward '{name}': score '{key}' has shape {array.shape} for {count} pictures")
        if not np.isfinite(array).all():
            first = int(np.flatnonzero(~np.isfinite(array))[0])
            raise RewardError(f"reward '{name}': score '{key}' of picture {first} of the batch is {array[first]}")
        result[key] = array
    return result
