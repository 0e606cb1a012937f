"""Several rewards at once, and their weighted mean."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusionopd.config_schema import is_number
from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, Scorer, Scores, UnfitPromptError
from diffusionopd.rewards.images import Images

AVERAGE = "avg"


def weighted_average(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """`sum_i w_i r_i / sum_i w_i`, over the parts that apply to an image.

    Args:
        parts: reward name -> scores `[B]`.
        weights: reward name -> weight, not negative.

    Returns:
        `[B]` float64; `NOT_APPLICABLE` where no part with a weight applies.
    """
    scores = np.stack([parts[name] for name in weights])
    weight = np.array(list(weights.values()), dtype=np.float64)[:, None] * (scores != NOT_APPLICABLE)
    total = weight.sum(axis=0)
    mean = (weight * scores).sum(axis=0) / np.where(total > 0, total, 1.0)
    return np.where(total > 0, mean, NOT_APPLICABLE)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises `RewardError` unless there are weights, finite, none negative, and not all zero."""
    for name, weight in weights.items():
        if not is_number(weight) or weight < 0:
            raise RewardError(f"weight of reward '{name}' must be a number of at least 0, not {weight!r}")
    if not any(weights.values()):
        raise RewardError(f'a composite reward needs a weight above 0, such as {{"pickscore": 1.0}}, not {weights}')


class Composite:
    """A scorer made of others: every part's scores and their weighted mean, `avg`.

    A part with weight 0 is scored and reported but does not count.
    """

    def __init__(self, weights: Mapping[str, float], scorers: Mapping[str, Scorer]):
        """Args: weights (see `check_weights`) and scorers by reward name, with the same names."""
        self.weights, self.scorers = dict(weights), dict(scorers)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`, with `avg` last."""
        scores = score_all(self.scorers, images, prompts, metadata)
        scores[AVERAGE] = weighted_average(scores, self.weights)
        return scores


def score_all(
    scorers: Mapping[str, Scorer], images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Scores:
    """The scores of several rewards on the same images, side by side, each a finite float64 `[B]`.

    Raises:
        RewardError: a scorer fails, leaves out its own score, gives a malformed one, or two give a score of one name.
    """
    result: Scores = {}
    for name, scorer in scorers.items():
        try:
            scores = scorer.score(images, prompts, metadata)
        except UnfitPromptError as error:
            raise UnfitPromptError(error.what, error.prompt, name) from error
        except RewardError:
            raise
        except Exception as error:  # a scorer raises whatever its libraries raise
            raise RewardError(f"reward '{name}' failed: {error!r}") from error
        if name not in scores:
            raise RewardError(f"reward '{name}' gave {sorted(scores)}, but no score under its own name")
        if doubled := sorted(scores.keys() & (result.keys() | {AVERAGE})):
            raise RewardError(f"reward '{name}' gives a score that another reward gives too: {', '.join(doubled)}")
        result |= {key: _checked(name, key, values, len(prompts)) for key, values in scores.items()}
    return result


def _checked(name: str, key: str, values: Any, count: int) -> np.ndarray:
    """The values of a score, once they are what the protocol promises: a broken scorer must not end up in a mean."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,):
        raise RewardError(f"reward '{name}': score '{key}' has shape {array.shape} for {count} images")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise RewardError(f"reward '{name}': score '{key}' of image {first} of the batch is {array[first]}")
    return array
