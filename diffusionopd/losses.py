"""Losses as pure functions of tensors: what pulls the student's step to the teacher's at one visited state.

Every function returns one value a sample, ``[B]``, a mean over the latent's dimensions (the paper sums; the mean
keeps the scale independent of the resolution). ``v_student`` carries the gradient; states and teachers are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionopd.transitions import Transition, per_sample_mean, velocity_difference

TARGETS = ("mean", "velocity", "x0")
SMALLEST_NORMALIZER = 1e-5  # DiffusionNFT's floor of the self-normalised error (arXiv 2509.16117)


def distillation_loss(
    transition: Transition, v_student: Tensor, v_teacher: Tensor, target: str = "mean", self_normalize: bool = False
) -> Tensor:
    """Closed-form distillation loss ``[B]`` from the velocity difference (both ``[B, ...]``).

    ``target``: ``mean`` compares the means of the transition, eq. 11 (KL) for an SDE step and eq. 12 (half the squared
    distance) for an ODE step; ``velocity`` and ``x0`` are half the squared distance of the velocities and of the data
    estimates ``x - sigma v``, the same minimum with other weights across the steps. ``self_normalize`` divides by the
    detached mean absolute difference of the target, so that every sample pulls with about the same force.

    Raises ValueError for an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    factor = {"mean": transition.b, "velocity": 1.0, "x0": transition.sigma}[target]
    weight = transition.kl_weight if target == "mean" else 0.5
    difference = factor * velocity_difference(v_student, v_teacher)
    loss = weight * per_sample_mean(difference.square())
    if self_normalize:
        loss = loss / per_sample_mean(difference.detach().abs()).clamp_min(SMALLEST_NORMALIZER)
    return loss


def policy_gradient_loss(
    transition: Transition,
    x: Tensor,
    x_next: Tensor,
    v_student: Tensor,
    v_old: Tensor,
    v_teacher: Tensor,
    clip_range: float,
) -> Tensor:
    """The PPO-style surrogate of paper §3.3, the baseline of the closed-form KL: ``[B]``.

    ``x_next`` was sampled from the old student's step at ``x``. The advantage is minus the KL as that sample shows it,
    ``A = sum_dims [log p_teacher(x_next) - log p_old(x_next)]``, detached; the ratio is the exponential of the mean
    log-density difference over dimensions (the Flow-GRPO convention). At ratio 1 the expected gradient is that of the
    mean-reduced KL; around it fluctuates the score-function noise ``KL eps/std dmu`` that the closed form has not.
    (An advantage without the sample's own part, ``-KL(x)``, would have gradient 0 in expectation.)

    All tensors ``[B, ...]``. Raises ValueError for a deterministic step, which has no density.
    """
    log_old = transition.log_prob(x_next, x, v_old.detach())
    advantage = (transition.log_prob(x_next, x, v_teacher) - log_old).detach() * x[0].numel()
    ratio = torch.exp(transition.log_prob(x_next, x, v_student) - log_old)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)
