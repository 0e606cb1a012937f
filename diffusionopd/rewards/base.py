"""What every scorer is: the protocol, its error, and the value that says "does not apply"."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusionopd.rewards.images import Images

NOT_APPLICABLE = -10.0
"""Score of an image to which a reward does not apply (upstream's value); left out of every mean."""

Scores = dict[str, np.ndarray]
"""Name of a score -> float64 array of length B."""


class RewardError(ValueError):
    """A reward that is unknown, cannot be built here, or gave scores of the wrong form."""


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
