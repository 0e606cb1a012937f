"""Group-relative advantages against numpy, one prompt at a time."""

import numpy as np
import pytest
import torch

from diffusionopd.algorithms.advantages import group_advantages
from diffusionopd.rewards import NOT_APPLICABLE

NO = NOT_APPLICABLE
SCALES = pytest.mark.parametrize("global_std", [False, True])


def advantages(*rows, **options):
    values, share = group_advantages(torch.tensor(rows, dtype=torch.float64), **options)
    assert values.dtype == torch.float64
    return values.numpy(), share


def by_prompt(rows, global_std):
    """The published definition with numpy's mean and (population) std, a prompt at a time."""
    known = [[reward for reward in row if reward != NO] for row in rows]
    std = [np.std(np.concatenate(known)) if global_std else np.std(own) for own in known]
    return [
        [0.0 if reward == NO else (reward - np.mean(own)) / (s + 1e-4) for reward in row]
        for row, own, s in zip(rows, known, std, strict=True)
    ]


@SCALES
def test_advantages_are_their_definition(global_std):
    """Also where some rewards do not apply, which are in no statistic."""
    for rows in (
        [[0.1, 0.9, 0.3, 0.7], [0.4, 0.3, 0.7, 0.5], [0.2, 1.0, 0.2 + 1e-6, 0.2]],
        [[0.1, 0.9, NO, 0.3], [0.4, NO, NO, 0.7]],
    ):
        values, share = advantages(*rows, global_std=global_std)
        np.testing.assert_allclose(values, by_prompt(rows, global_std))
        assert share == 0.0


@SCALES
def test_a_group_of_equal_rewards_gets_exactly_nothing(global_std):
    """0.1 + 0.1 + 0.1 is not 3 * 0.1 in binary: rounding is not to be left, however small the deviation of all is."""
    values, share = advantages([0.1, 0.1, 0.1], [0.2, 0.8, NO], [NO, 0.6, NO], global_std=global_std)
    assert not values[[0, 2]].any() and values[1, 0] < 0 < values[1, 1]
    assert share == pytest.approx(2 / 3)
    values, share = advantages([0.3] * 3, [NO] * 3, [0.1] * 3, global_std=global_std)
    assert not values.any() and share == 1.0, "of the groups to which the reward applies"
    values, share = advantages([NO] * 2, global_std=global_std)
    assert not values.any() and share == 0.0
