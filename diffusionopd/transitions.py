"""One denoising step as a Gaussian whose mean is affine in the velocity: ``x' ~ N(a x + b v, std^2 I)``.

Notation: flow matching on latents ``x`` at time ``t = sigma`` in [0, 1] with velocity ``v``; the data estimate is
``x0 = x - t v`` and the noise estimate ``x + (1 - t) v``. A step goes from ``t`` down to ``t' = sigma_next`` with
``dt = t' - t < 0``; ``eta`` is the noise level. Each function below returns the scalars ``(a, b, std)`` of one
published sampler as Python floats (float64), so that nothing is lost before they multiply a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KERNELS = ("ode", "flow_sde", "dance_sde", "cps", "ddim")


@dataclass(frozen=True)
class Transition:
    """The Gaussian kernel ``N(a x + b v, std^2 I)`` of one step from ``sigma`` to ``sigma_next``.

    ``std == 0`` is a deterministic (ODE) step. Tensors are ``[B, ...]``; half precision is computed in float32.
    """

    a: float
    b: float
    std: float
    sigma: float = math.nan
    sigma_next: float = math.nan

    def mean(self, x: Tensor, velocity: Tensor) -> Tensor:
        """``mu = a x + b v``, in at least float32."""
        return self.a * _at_least_float32(x) + self.b * _at_least_float32(velocity)

    def sample(self, x: Tensor, velocity: Tensor, noise: Tensor | None = None) -> Tensor:
        """The next state ``mu + std * noise``; ``noise`` is standard normal of x's shape, unused when ``std == 0``."""
        mean = self.mean(x, velocity)
        if self.std == 0.0:
            return mean
        if noise is None:
            raise ValueError(f"a step with std {self.std:.4g} needs noise of shape {tuple(x.shape)}")
        return mean + self.std * noise

    def log_prob(self, x_next: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
        """Log-density of ``x_next``, averaged over all but the batch dimension: ``[B]``.

        Raises ValueError for a deterministic step, which has no density.
        """
        if self.std == 0.0:
            raise ValueError("a deterministic step (std 0) has no density; use a kernel with noise_level > 0")
        z = (_at_least_float32(x_next) - self.mean(x, velocity)) / self.std
        return per_sample_mean(-0.5 * z.square() - math.log(self.std) - 0.5 * math.log(2 * math.pi))

    def kl(self, v_student: Tensor, v_teacher: Tensor) -> Tensor:
        """KL between the student's and the teacher's kernel at the same state (eq. 11), mean over dimensions: ``[B]``.

        Both share ``a``, ``x`` and ``std``, so it is ``b^2 / (2 std^2) * ||v_S - v_T||^2``. For a deterministic step
        the paper's limit (eq. 12) is taken: ``b^2 / 2 * ||v_S - v_T||^2``, half the squared distance of the means.
        """
        return self.kl_weight * per_sample_mean((self.b * velocity_difference(v_student, v_teacher)).square())

    @property
    def kl_weight(self) -> float:
        """What multiplies ``||mu_S - mu_T||^2``: ``1 / (2 std^2)``, and 1/2 for a deterministic step."""
        return 0.5 if self.std == 0.0 else 0.5 / self.std**2


def transition(
    kernel: str, sigma: float, sigma_next: float, noise_level: float = 0.0, sigma_max: float | None = None
) -> Transition:
    """The step ``sigma -> sigma_next`` of ``kernel``, one of :data:`KERNELS`.

    ``noise_level`` is the sampler's eta. ``sigma_max`` is the schedule's second value: the flow SDE needs it for its
    first step alone (the one whose ``sigma`` is above it), where ``sigma`` is 1 or nearly so and would divide by zero.

    Raises ValueError for an unknown kernel, for values outside ``0 <= sigma_next < sigma <= 1`` and for a noise level
    that the kernel does not define (negative; above 1 for ``cps`` and ``ddim``).
    """
    sigma, sigma_next, noise_level = float(sigma), float(sigma_next), float(noise_level)
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
    if not 0.0 <= sigma_next < sigma <= 1.0:
        raise ValueError(f"a step needs 0 <= sigma_next < sigma <= 1, not {sigma} -> {sigma_next}")
    if not (math.isfinite(noise_level) and noise_level >= 0.0):
        raise ValueError(f"noise_level must be a finite number >= 0, not {noise_level}")
    if kernel in ("cps", "ddim") and noise_level > 1.0:
        raise ValueError(f"kernel {kernel} is defined for noise_level in [0, 1], not {noise_level}")
    if kernel == "ode" or noise_level == 0.0:
        # Without noise every kernel here is the Euler step of the probability-flow ODE.
        a, b, std = 1.0, sigma_next - sigma, 0.0
    elif kernel == "flow_sde":
        a, b, std = _flow_sde(sigma, sigma_next, noise_level, sigma_max)
    elif kernel == "dance_sde":
        a, b, std = _sde(sigma, sigma_next, noise_level)
    elif kernel == "cps":
        a, b, std = _cps(sigma, sigma_next, noise_level)
    else:
        a, b, std = _ddim(sigma, sigma_next, noise_level)
    return Transition(a, b, std, sigma, sigma_next)


def schedule(kernel: str, sigmas: Sequence[float] | Tensor, noise_level: float = 0.0) -> list[Transition]:
    """The transitions of a whole trajectory. ``sigmas``: ``N + 1`` decreasing values from at most 1 down to 0."""
    values = [float(s) for s in sigmas]
    return [transition(kernel, s, t, noise_level, values[1]) for s, t in zip(values, values[1:], strict=False)]


def _sde(t: float, t_next: float, g: float) -> tuple[float, float, float]:
    """Reverse SDE with constant diffusion ``g`` over the step (paper eq. 5-9; with g = eta: DanceGRPO, 2505.07818).

    ``mu = x + v dt + g^2/2 (x - (1 - t) x0) / t^2 dt`` and ``std = g sqrt(-dt)``.
    """
    dt = t_next - t
    return 1 + g**2 / (2 * t) * dt, (1 + g**2 * (1 - t) / (2 * t)) * dt, g * math.sqrt(-dt)


def _flow_sde(t: float, t_next: float, eta: float, sigma_max: float | None) -> tuple[float, float, float]:
    """Flow-GRPO's SDE (arXiv 2505.05470): ``g = eta sqrt(t / (1 - t))``, the first step with ``sigma_max`` in 1 - t."""
    if t == 1.0 and (sigma_max is None or not 0.0 <= sigma_max < 1.0):
        raise ValueError(f"flow_sde at sigma 1 needs sigma_max, the schedule's next sigma, below 1; got {sigma_max}")
    below_one = t if sigma_max is None else min(t, float(sigma_max))
    return _sde(t, t_next, eta * math.sqrt(t / (1 - below_one)))


def _cps(t: float, t_next: float, eta: float) -> tuple[float, float, float]:
    """Flow-CPS (arXiv 2509.05952): ``mu = (1 - t') x0 + t' cos(eta pi/2) noise``, ``std = t' sin(eta pi/2)``."""
    angle = eta * math.pi / 2
    return *_from_estimates(t, 1 - t_next, t_next * math.cos(angle)), t_next * math.sin(angle)


def _ddim(t: float, t_next: float, eta: float) -> tuple[float, float, float]:
    """DDIM(eta) (arXiv 2010.02502) on the flow path: ``mu = (1 - t') x0 + sqrt(t'^2 - std^2) noise``."""
    signal_ratio = t_next * (1 - t) / (t * (1 - t_next))
    std = eta * t_next * math.sqrt(max(0.0, 1 - signal_ratio**2))
    return *_from_estimates(t, 1 - t_next, math.sqrt(t_next**2 - std**2)), std


def _from_estimates(t: float, weight_x0: float, weight_noise: float) -> tuple[float, float]:
    """``(a, b)`` of ``weight_x0 * (x - t v) + weight_noise * (x + (1 - t) v)``."""
    return weight_x0 + weight_noise, -weight_x0 * t + weight_noise * (1 - t)


class DpmSolver2:
    """DPM-Solver++(2M) (arXiv 2211.01095) on the flow path, as a next-state rule for rollouts.

    With ``lambda = log((1 - t) / t)`` the update is ``x' = t'/t x + (t - t')/t D`` where ``D`` extrapolates the data
    estimates of this and the previous step. It is first order (Euler) where lambda is infinite: after ``t = 1`` and at
    ``t' = 0``. It is deterministic and keeps one state's memory, so one instance serves one trajectory.
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, float] | None = None

    def step(self, transition: Transition, x: Tensor, velocity: Tensor) -> Tensor:
        """The next state from ``x`` and the velocity there, both ``[B, ...]``; call once a step, in order."""
        t, t_next = transition.sigma, transition.sigma_next
        x, velocity = _at_least_float32(x), _at_least_float32(velocity)
        x0 = x - t * velocity
        h = _log_snr(t_next) - _log_snr(t)
        estimate = x0
        if self._previous is not None and math.isfinite(h):
            x0_before, h_before = self._previous
            estimate = x0 + 0.5 * h / h_before * (x0 - x0_before)
        self._previous = (x0, h)
        return t_next / t * x + (t - t_next) / t * estimate


def _log_snr(t: float) -> float:
    """``log((1 - t) / t)``, minus infinity at t = 1 and plus infinity at t = 0."""
    if t == 1.0:
        return -math.inf
    return math.inf if t == 0.0 else math.log((1 - t) / t)


def per_sample_mean(values: Tensor) -> Tensor:
    """Mean over all but the batch dimension: ``[B, ...] -> [B]``."""
    return values.flatten(1).mean(1)


def velocity_difference(v_student: Tensor, v_teacher: Tensor) -> Tensor:
    """``v_S - v_T`` in at least float32. Losses start from it: two nearly equal means would cancel digits."""
    return _at_least_float32(v_student) - _at_least_float32(v_teacher)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
