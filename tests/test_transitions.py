"""Transitions against the published formulas, spelled out in float64 with the data and noise estimates."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusionopd.transitions import KERNELS, DpmSolver2, schedule, transition

SHAPE = (3, 4, 5, 6)
NOISE_LEVELS = {
    "ode": (0.0,),
    "flow_sde": (0.0, 0.1, 0.7, 1.2),
    "dance_sde": (0.0, 0.1, 0.3, 0.7),
    "cps": (0.0, 0.1, 0.7, 1.0),
    "ddim": (0.0, 0.1, 0.7, 1.0),
}
CASES = [(kernel, eta) for kernel, levels in NOISE_LEVELS.items() for eta in levels]


def shifted_sigmas(steps, shift=3.0):
    """1 = t_0 > ... > t_N = 0 with SD3's timestep shift, in Python floats."""
    line = [1 - i / steps for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in line]


def normal(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def long_form(kernel, x, v, t, t_next, eta, t_second):
    """(mean, std) of a step, from the data estimate, the noise estimate and the score."""
    dt = t_next - t
    x0, noise = x - t * v, x + (1 - t) * v
    if kernel == "ode":
        return (1 - t_next) * x0 + t_next * noise, 0.0
    if kernel in ("flow_sde", "dance_sde"):
        below_one = t_second if t == 1.0 else t
        g = eta if kernel == "dance_sde" else eta * math.sqrt(t / (1 - below_one))
        score = -(x - (1 - t) * x0) / t**2
        return x + (v - 0.5 * g**2 * score) * dt, g * math.sqrt(-dt)
    if kernel == "cps":
        std = t_next * math.sin(eta * math.pi / 2)
        return (1 - t_next) * x0 + t_next * math.cos(eta * math.pi / 2) * noise, std
    # DDIM's own equation 16, on the variance-preserving path, which is this path divided by hypot(1 - t, t).
    norm_next = math.hypot(1 - t_next, t_next)
    abar, abar_next = (1 - t) ** 2 / math.hypot(1 - t, t) ** 2, (1 - t_next) ** 2 / norm_next**2
    std = eta * math.sqrt((1 - abar_next) / (1 - abar)) * math.sqrt(1 - abar / abar_next)
    mean = math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next - std**2) * noise
    return norm_next * mean, norm_next * std


@pytest.mark.parametrize(("kernel", "eta"), CASES)
def test_every_step_of_a_schedule_equals_the_long_form(kernel, eta):
    x, v, noise = normal(0), normal(1), normal(2)
    for sigmas in (shifted_sigmas(10), shifted_sigmas(40)):
        steps = schedule(kernel, torch.tensor(sigmas, dtype=torch.float64), eta)
        for step, (t, t_next) in zip(steps, pairwise(sigmas), strict=True):
            mean, std = long_form(kernel, x, v, t, t_next, eta, sigmas[1])
            torch.testing.assert_close(step.mean(x, v), mean, rtol=1e-11, atol=1e-12)
            assert step.std == pytest.approx(std, rel=1e-12, abs=1e-15) and (std or step.std == 0.0)
            torch.testing.assert_close(step.sample(x, v, noise), mean + std * noise, rtol=1e-11, atol=1e-12)
            assert (step.sigma, step.sigma_next) == (t, t_next)


@pytest.mark.parametrize(("kernel", "eta"), [case for case in CASES if case[1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_density_and_kl_equal_torch_distributions(kernel, eta, dtype):
    sigmas = shifted_sigmas(10)
    x, v_student, v_teacher = normal(0).to(dtype), normal(1).to(dtype), normal(2).to(dtype)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    for t, t_next in pairwise(sigmas):
        step = transition(kernel, t, t_next, eta, sigmas[1])
        if step.std == 0.0:
            continue
        student, teacher = (
            Normal(*long_form(kernel, x.double(), v.double(), t, t_next, eta, sigmas[1]))
            for v in (v_student, v_teacher)
        )
        x_next = student.mean + step.std * normal(3)
        if dtype == torch.float64 or step.std > 0.05:  # float32 cannot hold x_next - mean relative to a tiny std
            log_prob = step.log_prob(x_next.to(dtype), x, v_student).double()
            torch.testing.assert_close(log_prob, student.log_prob(x_next).mean(dim=(1, 2, 3)), **tolerance)
        expected = kl_divergence(student, teacher).mean(dim=(1, 2, 3))
        torch.testing.assert_close(step.kl(v_student, v_teacher).double(), expected, **tolerance)


def test_float32_kl_keeps_digits_that_subtracting_means_would_lose():
    v_student, x = normal(0, dtype=torch.float32), 100 * normal(1, dtype=torch.float32)
    v_teacher = v_student + 2**-20
    step = transition("flow_sde", 0.9, 0.88, 0.7)
    exact = step.kl(v_student.double(), v_teacher.double())
    torch.testing.assert_close(step.kl(v_student, v_teacher).double(), exact, rtol=1e-6, atol=0)
    naive = (step.mean(x, v_student) - step.mean(x, v_teacher)).square().mean(dim=(1, 2, 3)) / (2 * step.std**2)
    assert ((naive.double() - exact).abs() / exact).max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    step = transition("cps", 0.9, 0.7, 0.5)
    x, v = normal(0).to(dtype), normal(1).to(dtype)
    for method in (step.mean, step.kl):
        torch.testing.assert_close(method(x, v), method(x.float(), v.float()), rtol=0, atol=0)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (("heun", 0.5, 0.4), r"heun.*ode"),
        *((("ode", *pair), "sigma") for pair in [(0.4, 0.5), (0.5, 0.5), (1.1, 0.5), (0.5, -0.1)]),
        *((("ode", *pair), "sigma") for pair in [(math.nan, 0.1), (0.5, math.nan)]),
        *(((kernel, 0.5, 0.4, eta), "noise_level") for kernel in KERNELS for eta in (-0.1, math.nan, math.inf)),
        *(((kernel, 0.5, 0.4, 1.1), "noise_level") for kernel in ("cps", "ddim")),  # where the kernel ends
        *((("flow_sde", 1.0, 0.9, 0.7, sigma_max), "sigma_max") for sigma_max in (None, 1.0, math.nan)),
    ],
)
def test_what_is_no_step_is_refused(arguments, fact):
    with pytest.raises(ValueError, match=fact):
        transition(*arguments)


def test_flow_sde_takes_the_second_sigma_in_a_first_step_that_is_nearly_one():
    """A scheduler may begin at .9997, where t / (1 - t) is 3000; later steps are those of any schedule."""
    exact, near = (schedule("flow_sde", [first, 0.9, 0.5, 0.0], 0.7) for first in (1.0, 0.9997))
    assert near[0].std == pytest.approx(exact[0].std, rel=1e-2)
    assert near[0].a == pytest.approx(exact[0].a, rel=1e-2)
    assert near[1:] == exact[1:]


def test_deterministic_step_has_no_density_and_noisy_step_needs_noise():
    x = normal(0)
    with pytest.raises(ValueError, match="density"):
        transition("ode", 0.5, 0.4).log_prob(x, x, x)
    with pytest.raises(ValueError, match="noise"):
        transition("cps", 0.5, 0.4, 0.5).sample(x, x)


# --- rollouts on Gaussian data, where the velocity and the flow map are known exactly --------------------------------

MEAN, STD = 0.7, 0.4  # of the data


def marginal_std(t):
    return math.sqrt((1 - t) ** 2 * STD**2 + t**2)


def slope(t):
    """dv/dx of the exact velocity E[noise - x0 | x] at time t."""
    return (t - (1 - t) * STD**2) / marginal_std(t) ** 2


def velocity(x, t):
    return -MEAN + slope(t) * (x - (1 - t) * MEAN)


def final_std(kernel, eta, sigmas):
    """Standard deviation at the end of a rollout, exactly: every step is linear in x, so variances recur."""
    variance = marginal_std(sigmas[0]) ** 2
    for t, t_next in pairwise(sigmas):
        step = transition(kernel, t, t_next, eta, sigmas[1])
        variance = (step.a + step.b * slope(t)) ** 2 * variance + step.std**2
    return math.sqrt(variance)


def grid(start, end, steps):
    return [start + (end - start) * i / steps for i in range(steps + 1)]


@pytest.mark.parametrize(
    ("kernel", "eta"), [("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.3), ("ddim", 0.7), ("ddim", 1.0)]
)
def test_noise_keeps_the_marginal_in_the_limit_of_many_steps(kernel, eta):
    """The noise is compensated by the score: the error falls in proportion to the step; from pure noise to the data."""
    errors = [abs(final_std(kernel, eta, grid(0.95, 0.02, n)) - marginal_std(0.02)) for n in (400, 800)]
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
    assert final_std(kernel, eta, grid(1.0, 0.0, 2000)) == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize(("kernel", "eta"), [case for case in CASES if case[0] in ("cps", "ddim")])
def test_coefficients_keep_signal_and_noise_at_the_schedules_level(kernel, eta):
    """With exact estimates x0 and noise, x' has signal (1 - t') and noise t' at any step size and noise level."""
    for t, t_next in pairwise(shifted_sigmas(10)):
        step = transition(kernel, t, t_next, eta)
        signal = step.a * (1 - t) - step.b  # x = (1 - t) x0 + t noise, v = noise - x0
        noise = math.hypot(step.a * t + step.b, step.std)
        assert (signal, noise) == (pytest.approx(1 - t_next), pytest.approx(t_next))


# --- the multistep solver --------------------------------------------------------------------------------------------


def dpm_solver_pp_2m(x, sigmas):
    """DPM-Solver++(2M) as in arXiv 2211.01095, algorithm 2, in half log-SNR; first order where lambda is infinite."""
    data, lambdas = [], []
    for t, t_next in pairwise(sigmas):
        alpha, alpha_next = 1 - t, 1 - t_next
        data.append(x - t * velocity(x, t))
        lambdas.append(math.log(alpha / t) if t < 1 else None)
        if t == 1.0 or t_next == 0.0:  # x = noise exactly, or no noise left: DDIM
            noise = x if t == 1.0 else (x - alpha * data[-1]) / t
            x = alpha_next * data[-1] + t_next * noise
            continue
        h = math.log(alpha_next / t_next) - lambdas[-1]
        estimate = data[-1]
        if len(data) > 1 and lambdas[-2] is not None:
            r = (lambdas[-1] - lambdas[-2]) / h
            estimate = (1 + 1 / (2 * r)) * data[-1] - 1 / (2 * r) * data[-2]
        x = t_next / t * x - alpha_next * math.expm1(-h) * estimate
    return x


def dpm2_rollout(x, sigmas):
    solver = DpmSolver2()
    for t, t_next in pairwise(sigmas):
        x = solver.step(transition("ode", t, t_next), x, velocity(x, t))
    return x


@pytest.mark.parametrize(
    "sigmas", [shifted_sigmas(10), shifted_sigmas(40), grid(0.9, 0.1, 7), [1.0, 0.5, 0.0], [1.0, 0.0]]
)
def test_dpm2_equals_the_published_multistep_solver(sigmas):
    x = normal(0)
    torch.testing.assert_close(dpm2_rollout(x, sigmas), dpm_solver_pp_2m(x, sigmas), rtol=1e-10, atol=1e-11)


def test_dpm2_is_of_second_order():
    x = normal(0)
    exact = (1 - 0.1) * MEAN + marginal_std(0.1) * (x - (1 - 0.9) * MEAN) / marginal_std(0.9)  # the ODE keeps the rank
    errors = [(dpm2_rollout(x, grid(0.9, 0.1, n)) - exact).abs().max().item() for n in (40, 80, 160)]
    assert [coarse / fine for coarse, fine in pairwise(errors)] == pytest.approx([4.0] * 2, rel=0.15)
