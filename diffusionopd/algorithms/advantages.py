"""Group-relative advantages: how much better a picture's reward is than those of the same prompt's other pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionopd.rewards import NOT_APPLICABLE

SCALES = ("prompt", "global", "none")


@dataclass(frozen=True)
class Advantages:
    """Advantages of N samples, and what the rewards of their G groups look like.

    Groups without any applicable reward are in none of the figures.
    """

    values: Tensor
    """``[N]`` float64; 0 for a sample of a group without variance and where the reward does not apply."""
    group_mean: Tensor
    """``[G]`` float64: mean reward of each group, in the order of the groups' numbers."""
    group_std: Tensor
    """``[G]`` float64: population standard deviation of each group's rewards, exactly 0 where all are equal."""
    zero_variance_share: float
    """Share of groups whose rewards are all equal: they teach nothing. 0 when there are no groups."""
    not_applicable: int
    """Samples that the reward does not apply to."""


def group_advantages(rewards: Tensor, groups: Tensor, scale: str = "prompt", epsilon: float = 1e-4) -> Advantages:
    """``(reward - mean of its group) / (std + epsilon)`` (GRPO, arXiv 2402.03300).

    ``scale`` names the std: ``prompt`` is that of the sample's own group; ``global`` that of all rewards, so that
    prompts on which the pictures differ little also count little; ``none`` only centres. As in the code of Flow-GRPO
    and DiffusionNFT (``sample.global_std`` False and True), the std is the population's (divided by N), ``global`` is
    taken before centring, and epsilon is 1e-4. Without per-prompt tracking (``per_prompt_stat_tracking`` False)
    everything is one group.

    ``rewards`` ``[N]`` and ``groups`` ``[N]`` (integers, equal for the pictures of one prompt) are those of **all**
    processes: means and deviations of a part would depend on how samples are spread. Rewards equal to
    ``NOT_APPLICABLE`` are left out of every statistic.

    Raises ValueError for an unknown scale, for shapes that do not fit and for a reward that is not finite, with its
    sample.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown advantage scale {scale!r}: choose one of {', '.join(SCALES)}")
    rewards = rewards.double()
    _check(rewards, groups)
    applies = rewards != NOT_APPLICABLE
    kept = rewards[applies]
    numbers, group = torch.unique(groups[applies], return_inverse=True)
    mean, std = _group_statistics(kept, group, len(numbers))
    advantage = kept - mean[group]
    if scale == "prompt":
        advantage = advantage / (std[group] + epsilon)
    elif scale == "global" and len(kept):
        advantage = advantage / (kept.std(correction=0) + epsilon)
    values = torch.zeros_like(rewards)
    values[applies] = torch.where(std[group] > 0, advantage, 0.0)
    share = (std == 0).double().mean().item() if len(numbers) else 0.0
    return Advantages(values, mean, std, share, int((~applies).sum()))


def clip_advantages(values: Tensor, clip: float) -> Tensor:
    """Advantages limited to ``[-clip, clip]`` (``train.adv_clip_max``, published as 5)."""
    return values.clamp(-clip, clip)


def _check(rewards: Tensor, groups: Tensor) -> None:
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"one reward and one group a sample: got {tuple(rewards.shape)} and {tuple(groups.shape)}")
    broken = (~rewards.isfinite()).nonzero().flatten().tolist()
    if broken:
        first = broken[0]
        raise ValueError(
            f"reward of sample {first} (group {int(groups[first])}) is {rewards[first].item()}, and {len(broken)} of "
            f"{len(rewards)} are not finite: a scorer gives {NOT_APPLICABLE} where it does not apply"
        )


def _group_statistics(rewards: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and population std ``[count]`` of each group; equal rewards have a std of exactly 0, whatever rounding."""
    size = torch.bincount(group, minlength=count)
    zeros = rewards.new_zeros(count)
    mean = zeros.index_add(0, group, rewards) / size
    std = (zeros.index_add(0, group, (rewards - mean[group]).square()) / size).sqrt()
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    return mean, torch.where(lowest == highest, 0.0, std)
