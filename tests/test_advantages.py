"""Group-relative advantages against numpy, one prompt at a time."""

import numpy as np
import pytest
import torch

from diffusionopd.algorithms.advantages import clip_advantages, group_advantages
from diffusionopd.rewards import NOT_APPLICABLE

REWARDS = [0.1, 0.9, 0.4, 0.3, 0.3, 0.7, 0.2, 1.0]
GROUPS = [7, 7, 3, 3, 7, 3, 5, 5]


def advantages(rewards=REWARDS, groups=GROUPS, **options):
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), **options)


def by_prompt(rewards, groups, scale, epsilon=1e-4):
    """The published definition with numpy's mean and (population) std, a prompt at a time."""
    rewards, groups = np.array(rewards), np.array(groups)
    result = np.empty(len(rewards))
    for number in np.unique(groups):
        own = rewards[groups == number]
        std = {"prompt": np.std(own), "global": np.std(rewards), "none": 1 - epsilon}[scale]
        result[groups == number] = (own - np.mean(own)) / (std + epsilon)
    return result


SCALES = pytest.mark.parametrize("scale", ["prompt", "global", "none"])


@SCALES
def test_advantages_are_their_definition(scale):
    """In whatever order samples come, and so however they were spread over processes."""
    found = advantages(scale=scale)
    assert found.values.dtype == torch.float64
    np.testing.assert_allclose(found.values.numpy(), by_prompt(REWARDS, GROUPS, scale))
    for number, mean, std in zip([3, 5, 7], found.group_mean.tolist(), found.group_std.tolist(), strict=True):
        own = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == number]
        assert (mean, std) == pytest.approx((np.mean(own), np.std(own)))
    assert (found.zero_variance_share, found.not_applicable) == (0.0, 0)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = advantages([REWARDS[i] for i in order], [GROUPS[i] for i in order], scale=scale)
    torch.testing.assert_close(shuffled.values, found.values[order])


def test_epsilon_bounds_the_advantages_of_a_group_that_hardly_differs():
    found = advantages([0.5, 0.5 + 1e-6], [0, 0], epsilon=1e-2)
    np.testing.assert_allclose(found.values.numpy(), np.array([-5e-7, 5e-7]) / (5e-7 + 1e-2), rtol=1e-6)


@SCALES
def test_a_group_of_equal_rewards_gets_exactly_nothing(scale):
    """0.1 + 0.1 + 0.1 is not 3 * 0.1 in binary: without care, rounding would be left, and epsilon could make it big."""
    found = advantages([0.1, 0.1, 0.1, 0.2, 0.8, 0.6], [0, 0, 0, 1, 1, 2], scale=scale, epsilon=1e-30)
    assert found.values[[0, 1, 2, 5]].tolist() == [0.0] * 4
    assert found.values[3] < 0 < found.values[4]
    assert found.zero_variance_share == pytest.approx(2 / 3)
    assert found.group_std[[0, 2]].tolist() == [0.0, 0.0]
    found = advantages([0.3] * 4, [0, 0, 1, 1], scale=scale, epsilon=0.0)
    assert not found.values.any() and found.zero_variance_share == 1.0


@SCALES
def test_rewards_that_do_not_apply_are_left_out_of_every_statistic(scale):
    rewards, groups = [*REWARDS[:4], NOT_APPLICABLE, *REWARDS[4:], *[NOT_APPLICABLE] * 2], [*GROUPS[:4], 3, *GROUPS[4:]]
    found, without = advantages(rewards, [*groups, 9, 9], scale=scale), advantages(scale=scale)
    assert torch.equal(found.values[[0, 1, 2, 3, 5, 6, 7, 8]], without.values) and not found.values[[4, 9, 10]].any()
    assert torch.equal(found.group_mean, without.group_mean) and torch.equal(found.group_std, without.group_std)
    assert (found.not_applicable, found.zero_variance_share) == (3, 0.0)
    found = advantages([NOT_APPLICABLE] * 2, [0, 0], scale=scale)
    assert found.values.tolist() == [0.0, 0.0]
    assert (found.zero_variance_share, found.not_applicable, len(found.group_mean)) == (0.0, 2, 0)


def test_what_is_no_set_of_rewards_is_refused():
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=rf"sample 4 \(group 7\) is {value}"):
            advantages([*REWARDS[:4], value, *REWARDS[5:]])
    with pytest.raises(ValueError, match=r"\(8,\) and \(7,\)"):
        advantages(groups=GROUPS[:7])
    with pytest.raises(ValueError, match=r"batch.*global"):
        advantages(scale="batch")


def test_clipping_is_symmetric():
    values = torch.tensor([-9.0, -1.0, 0.0, 4.9, 5.1])
    assert clip_advantages(values, 5.0).tolist() == pytest.approx([-5.0, -1.0, 0.0, 4.9, 5.0])
