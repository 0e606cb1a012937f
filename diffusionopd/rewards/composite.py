"""Several rewards at once, and their weighted mean."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusionopd.rewards.base import NOT_APPLICABLE, RewardError, Scorer, Scores, checked_scores
from diffusionopd.rewards.images import Images

AVERAGE = "avg"


def weighted_average(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """`sum_i w_i r_i / sum_i w_i`, over the parts that apply to a picture.

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
    if not weights:
        raise RewardError('a composite reward needs at least one part, such as {"pickscore": 1.0}')
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise RewardError(f"weight of reward '{name}' must be a number of at least 0, not {weight!r}")
    if not any(weights.values()):
        raise RewardError(f"all weights are 0: {', '.join(weights)}")


class Composite:
    """A scorer made of others: every part's scores and their weighted mean, `avg`.

    A part with weight 0 is scored and reported but does not count.
    """

    def __init__(self, weights: Mapping[str, float], scorers: Mapping[str, Scorer]):
        """Args: weights and scorers by reward name, with the same names. Raises `RewardError` for bad weights."""
        check_weights(weights)
        if set(weights) != set(scorers):
            raise RewardError(f"weights for {sorted(weights)} but scorers for {sorted(scorers)}")
        self.weights = dict(weights)
        self.scorers = dict(scorers)

    def score(self, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """As `Scorer.score`, with `avg` last."""
        scores = score_all(self.scorers, images, prompts, metadata)
        scores[AVERAGE] = weighted_average(scores, self.weights)
        return scores


def score_all(
    scorers: Mapping[str, Scorer], images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Scores:
    """The scores of several rewards on the same pictures, side by side.

    Raises:
        RewardError: a scorer fails, leaves out its own score, gives a malformed one, or two give a score of one name.
    """
    result: Scores = {}
    for name, scorer in scorers.items():
        part = checked_scores(name, _scored(name, scorer, images, prompts, metadata), len(prompts))
        if name not in part:
            raise RewardError(f"reward '{name}' gave {sorted(part)}, but no score under its own name")
        doubled = sorted(part.keys() & (result.keys() | {AVERAGE}))
        if doubled:
            raise RewardError(f"reward '{name}' gives a score that another reward gives too: {', '.join(doubled)}")
        result.update(part)
    return result


def _scored(
    name: str, scorer: Scorer, images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Scores:
    try:
        return scorer.score(images, prompts, metadata)
    except RewardError:
        raise
    except Exception as error:  # a scorer raises whatever its libraries raise
        raise RewardError(f"reward '{name}' failed: {error!r}") from error
