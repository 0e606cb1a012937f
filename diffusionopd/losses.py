"""Every loss as a pure function of tensors: distillation at one visited state, flow matching, NFT, GRPO.

Every loss is one value per sample, ``[B]``, a mean over the latent's dimensions (the paper sums; the mean keeps the
scale independent of the resolution). ``v_student`` carries the gradient; states, teachers, advantages and the
velocities ``v_old`` (of the policy that sampled) and ``v_ref`` (of the base model) are constants. All start from the
difference of two velocities: near the old policy, where training happens, means and log-densities agree in most of
their digits, and float32 would lose by subtracting them a part of what the published clip ranges (down to 2e-6) let
through: about 1e-7 at the first steps, which the surrogate's sum over a latent would multiply by its size.
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


def extrapolated(v_ref: Tensor, v_teacher: Tensor, strength: float) -> Tensor:
    """The target ``v_ref + lambda (v_T - v_ref)``: the teacher at 1, softened below, beyond the teacher above.

    Its step is exact for every kernel here, since their variance does not depend on the velocity: the Gaussian in
    proportion to ``N_T^lambda N_ref^(1 - lambda)`` has mean ``lambda mu_T + (1 - lambda) mu_ref`` and their variance.
    Tensors ``[B, ...]``.
    """
    return v_teacher if strength == 1.0 else v_ref + strength * velocity_difference(v_teacher, v_ref)


def policy_gradient_loss(
    transition: Transition,
    x: Tensor,
    x_next: Tensor,
    v_student: Tensor,
    v_old: Tensor,
    v_teacher: Tensor,
    clip_range: float,
    baseline: bool = False,
) -> Tensor:
    """The PPO-style surrogate of paper §3.3, the baseline of the closed-form KL: ``[B]``.

    ``x_next`` was sampled from the old student's step at ``x``. It is :func:`grpo_loss`, the advantage minus the KL as
    that sample shows it, ``A = sum_dims [log p_teacher(x_next) - log p_old(x_next)]``: with the sample's noise
    ``eps`` and ``d = (mu_teacher - mu_old) / std``, ``sum(eps d) - sum(d^2) / 2``. At ratio 1 the expected gradient is
    that of the mean-reduced KL; around it fluctuates the score-function noise ``KL eps/std dmu`` that the closed form
    has not. (An advantage without the sample's own part, ``-KL(x) = -sum(d^2) / 2``, would have gradient 0 in
    expectation: ``baseline`` subtracts it, which leaves the expectation and takes that noise away.)

    All tensors ``[B, ...]``. Raises ValueError for a deterministic step, which has no density.
    """
    eps, move = _noise_and_move(transition, x, x_next, v_teacher, v_old)
    d = move / transition.std
    advantage = (eps * d if baseline else eps * d - 0.5 * d.square()).flatten(1).sum(1)
    loss, _ = grpo_loss(transition, x, x_next, v_student, v_old, advantage, clip_range, clip_range)
    return loss


def flow_matching_loss(v_student: Tensor, noise: Tensor, x0: Tensor) -> Tensor:
    """Half the squared error of the velocity ``noise - x0`` at ``x_t = (1 - t) x0 + t noise``: ``[B]``."""
    return 0.5 * per_sample_mean((v_student - (noise - x0)).square())


# --- DiffusionNFT: on the forward process, without densities ----------------------------------------------------------


def nft_loss(
    v_student: Tensor, v_old: Tensor, x0: Tensor, x_t: Tensor, sigma: float | Tensor, optimality: Tensor, beta: float
) -> Tensor:
    """DiffusionNFT's loss (arXiv 2509.16117): ``(r E(v+) + (1 - r) E(v-)) / beta``, ``[B]``.

    ``v+ = v_old + beta (v - v_old)`` is fitted to the picture as far as it is good, its mirror image
    ``v- = v_old - beta (v - v_old)`` as far as it is bad. ``E(v) = mean (x_t - t v - x0)^2 / w`` is the error of the
    data estimate, self-normalised: ``w`` is its mean absolute value, detached, per sample and at least 1e-5.

    ``x0`` is the old policy's picture (latents), ``x_t = (1 - t) x0 + t noise``; tensors ``[B, ...]``. ``sigma`` is
    the time ``t``, one for all or ``[B]``; ``optimality`` is ``r`` in [0, 1], ``[B]``; ``beta > 0``.

    The objective of the paper and its code is the mean of this times the clip range of the advantage (5). With that
    factor, and ``r`` from :func:`optimality`, the gradient at ``v = v_old`` is the advantage times that of ``E(v)``,
    whatever ``beta`` and the clip range; for ``r = 1/2`` it is zero.
    """
    difference = velocity_difference(v_student, v_old.detach())
    t = _per_sample(sigma, difference)
    error_old = velocity_difference(x_t, x0) - t * v_old.detach().to(difference.dtype)
    shift = t * beta * difference
    r = _per_sample(optimality, difference).flatten()
    positive, negative = _self_normalized_error(error_old - shift), _self_normalized_error(error_old + shift)
    return (r * positive + (1 - r) * negative) / beta


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """How likely a sample counts as good, ``clip(A / clip / 2 + 1/2, 0, 1)`` (arXiv 2509.16117; clip 5): ``[B]``."""
    return (advantage / clip / 2 + 0.5).clamp(0, 1)


def reference_penalty(v_student: Tensor, v_ref: Tensor) -> Tensor:
    """DiffusionNFT's pull towards the base model, ``mean (v - v_ref)^2``: ``[B]``. Its published weight is 1e-4."""
    return per_sample_mean(velocity_difference(v_student, v_ref.detach()).square())


def old_policy_decay(step: int, start: int, slope: float, maximum: float) -> float:
    """The share ``d`` that the old policy keeps after ``step`` steps: ``old <- d old + (1 - d) new``.

    ``min(slope * (step - start), maximum)``, and 0 before ``start``: the old policy is then the student's copy.
    Published with DiffusionNFT as (start, slope, maximum): (0, 0.001, 0.5), GenEval's, and (75, 0.0075, 0.999), OCR's.
    """
    return min(slope * max(step - start, 0), maximum)


# --- Flow-GRPO and GRPO-Guard: on the densities of the sampled steps --------------------------------------------------


def grpo_loss(
    transition: Transition,
    x: Tensor,
    x_next: Tensor,
    v_student: Tensor,
    v_old: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's clipped surrogate (arXiv 2505.05470) for one step; returns the loss and the detached ratio, ``[B]``.

    ``max(-A q, -A clip(q, 1 - clip_low, 1 + clip_high))``. The ratio ``q`` is the exponential of the log-density
    difference of student and old policy at ``x_next``, **averaged** over dimensions. With the sample's noise
    ``eps = (x_next - mu_old) / std`` and ``delta = b (v - v_old) / std`` it is ``mean(eps delta) - mean(delta^2) / 2``,
    whose expectation is below 0 off policy: the ratio is biased under 1, the more so the smaller ``std``.

    ``x_next`` was sampled from the old policy's step at ``x``; these and the velocities are ``[B, ...]``, ``advantage``
    is ``[B]``. Raises ValueError for a deterministic step, which has no density.
    """
    eps, move = _noise_and_move(transition, x, x_next, v_student, v_old)
    delta = move / transition.std
    return _clipped_surrogate(per_sample_mean(eps * delta - 0.5 * delta.square()), advantage, clip_low, clip_high)


def grpo_guard_loss(
    transition: Transition,
    x: Tensor,
    x_next: Tensor,
    v_student: Tensor,
    v_old: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """GRPO-Guard's surrogate (arXiv 2510.22319), arguments and result as :func:`grpo_loss`.

    Two things are new. *Ratio normalisation*: with the step's std ``c`` and ``d = mean (mu - mu_old)^2``, the log-ratio
    becomes ``(logp - logp_old) c + d / (2 c)``. The quadratic parts cancel and ``mean(eps b (v - v_old))`` is left, in
    which it is computed: its expectation under the old policy is 0 and its spread no longer contains the std, so that
    one clip range cuts equally on both sides. *Gradient reweighting*: the loss is divided by the length of
    the step, ``-dt = sigma - sigma_next`` (the official ``train_sd3_GRPO_Guard.py`` of Flow-GRPO's repository divides
    the batch's policy loss by ``sqrt(-dt)^2``).

    What this does to a step's pull: on policy the gradient with respect to ``v`` is ``-A eps / D`` times ``b / std``
    without the guard, which grows more than twenty-fold from the second to the last of SD3's ten steps, and times
    ``b / (-dt)`` with it. For the flow SDE that is ``-(1 + eta^2 / 2)`` at every step (-1 at sigma 1).
    """
    eps, move = _noise_and_move(transition, x, x_next, v_student, v_old)
    loss, ratio = _clipped_surrogate(per_sample_mean(eps * move), advantage, clip_low, clip_high)
    return loss / (transition.sigma - transition.sigma_next), ratio


def kl_to_reference(transition: Transition, v_student: Tensor, v_ref: Tensor) -> Tensor:
    """KL of the student's step to the base model's at the same state, in closed form (:meth:`Transition.kl`): ``[B]``.

    The variance is the step's, ``g^2 (-dt)`` for the SDEs. Flow-GRPO's code divides by ``g^2`` alone: its KL, which its
    published weights belong to, is this one times ``-dt``.
    """
    return transition.kl(v_student, v_ref.detach())


def _noise_and_move(
    transition: Transition, x: Tensor, x_next: Tensor, v: Tensor, v_old: Tensor
) -> tuple[Tensor, Tensor]:
    """The old policy's noise ``(x_next - mu_old) / std`` and ``mu - mu_old = b (v - v_old)``, both ``[B, ...]``."""
    if transition.std == 0.0:
        raise ValueError("a policy gradient needs a step's density, which a deterministic one has not: set noise_level")
    v_old = v_old.detach()
    eps = (x_next.detach() - transition.mean(x.detach(), v_old)) / transition.std
    return eps, transition.b * velocity_difference(v, v_old)


def _clipped_surrogate(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic loss (arXiv 1707.06347): no gradient where the ratio has gone far enough the good way."""
    ratio, advantage = log_ratio.exp(), advantage.detach().to(log_ratio)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)), ratio.detach()


def _self_normalized_error(error: Tensor) -> Tensor:
    return per_sample_mean(error.square()) / per_sample_mean(error.detach().abs()).clamp_min(SMALLEST_NORMALIZER)


def _per_sample(value: float | Tensor, like: Tensor) -> Tensor:
    """A scalar or ``[B]`` as ``[1 or B, 1, ...]``, with the type and device of ``like``."""
    return torch.as_tensor(value).detach().to(like).reshape(-1, *[1] * (like.ndim - 1))
