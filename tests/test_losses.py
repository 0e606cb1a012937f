"""Losses against torch.distributions, hand-written gradients and Monte-Carlo estimates."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusionopd.losses import distillation_loss, policy_gradient_loss
from diffusionopd.transitions import transition

SHAPE = (3, 2, 4, 4)
SIZE = math.prod(SHAPE[1:])
NOISY = [
    transition("flow_sde", 1.0, 0.96, 0.7, 0.96),
    transition("flow_sde", 0.8, 0.7, 0.7),
    transition("dance_sde", 0.8, 0.7, 0.3),
    transition("cps", 0.8, 0.7, 0.7),
    transition("ddim", 0.8, 0.7, 1.0),
]
ODE = transition("ode", 0.8, 0.7)
TARGETS = ("mean", "velocity", "x0")


def normal(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("step", NOISY, ids=repr)
def test_sde_loss_is_the_kl_of_the_two_kernels(step):
    x, v_student, v_teacher = normal(0), normal(1), normal(2)
    student = Normal(step.a * x + step.b * v_student, step.std)
    teacher = Normal(step.a * x + step.b * v_teacher, step.std)
    expected = kl_divergence(student, teacher).mean(dim=(1, 2, 3))
    torch.testing.assert_close(distillation_loss(step, v_student, v_teacher), expected)


def test_ode_loss_is_half_the_squared_distance_of_the_next_states():
    x, v_student, v_teacher = normal(0), normal(1), normal(2)
    dt = 0.7 - 0.8
    distance = (x + v_student * dt) - (x + v_teacher * dt)
    torch.testing.assert_close(distillation_loss(ODE, v_student, v_teacher), 0.5 * distance.pow(2).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("step", [*NOISY, ODE], ids=repr)
def test_velocity_and_x0_targets_do_not_depend_on_the_kernel(step):
    x, v_student, v_teacher = normal(0), normal(1), normal(2)
    velocity = 0.5 * (v_student - v_teacher).pow(2).mean(dim=(1, 2, 3))
    x0_student, x0_teacher = x - step.sigma * v_student, x - step.sigma * v_teacher
    x0 = 0.5 * (x0_student - x0_teacher).pow(2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(distillation_loss(step, v_student, v_teacher, "velocity"), velocity)
    torch.testing.assert_close(distillation_loss(step, v_student, v_teacher, "x0"), x0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("step", [NOISY[1], ODE], ids=["sde", "ode"])
def test_self_normalisation_divides_by_the_detached_mean_distance(step, target):
    v_student, v_teacher = normal(1).requires_grad_(), normal(2)
    scale = {"mean": step.b, "velocity": 1.0, "x0": step.sigma}[target]
    distance = scale * (v_student - v_teacher).detach().abs().mean(dim=(1, 2, 3)) * math.copysign(1.0, scale)
    plain = distillation_loss(step, v_student, v_teacher, target)
    normalised = distillation_loss(step, v_student, v_teacher, target, self_normalize=True)
    torch.testing.assert_close(normalised, plain / distance)
    (gradient,) = torch.autograd.grad(normalised.sum(), v_student)
    (plain_gradient,) = torch.autograd.grad(plain.sum(), v_student)
    torch.testing.assert_close(gradient, plain_gradient / distance.view(-1, 1, 1, 1))  # the divisor is a constant


def test_self_normalisation_of_a_tiny_difference_stays_finite_and_small():
    v_teacher = normal(2)
    loss = distillation_loss(ODE, v_teacher + 1e-9, v_teacher, "velocity", self_normalize=True)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.5e-18 / 1e-5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", [*NOISY, ODE], ids=repr)
def test_gradient_is_the_hand_formula(step):
    """eq. 11: b^2 / std^2 (v_S - v_T) / D; eq. 12: b^2 (v_S - v_T) / D."""
    v_student, v_teacher = normal(1).requires_grad_(), normal(2)
    distillation_loss(step, v_student, v_teacher).sum().backward()
    weight = step.b**2 / (step.std**2 if step.std else 1.0) / SIZE
    torch.testing.assert_close(v_student.grad, weight * (v_student.detach() - v_teacher))


def test_gradient_through_a_network_equals_finite_differences():
    weight, bias, v_teacher = normal(1, (4, 4)).requires_grad_(), normal(2, (4,)).requires_grad_(), normal(3)

    def loss(weight, bias):
        return distillation_loss(NOISY[1], torch.tanh(normal(0) @ weight + bias), v_teacher)

    assert torch.autograd.gradcheck(loss, (weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("self_normalize", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("step", [*NOISY, ODE], ids=repr)
def test_student_equal_to_teacher_gives_exactly_nothing(step, target, self_normalize, dtype):
    v_student = normal(1).to(dtype).requires_grad_()
    loss = distillation_loss(step, v_student, v_student.detach().clone(), target, self_normalize)
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert torch.equal(v_student.grad, torch.zeros_like(v_student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_velocities_give_a_float32_loss(dtype):
    v_student, v_teacher = normal(1).to(dtype), normal(2).to(dtype)
    loss = distillation_loss(NOISY[1], v_student, v_teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(NOISY[1], v_student.float(), v_teacher.float()))


def test_loss_is_a_mean_whatever_the_resolution():
    step = NOISY[1]
    small = distillation_loss(step, torch.full((1, 4, 8, 8), 0.3), torch.zeros(1, 4, 8, 8))
    large = distillation_loss(step, torch.full((1, 4, 64, 64), 0.3), torch.zeros(1, 4, 64, 64))
    torch.testing.assert_close(small, large)


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match=r"score.*velocity"):
        distillation_loss(ODE, normal(0), normal(1), "score")


# --- the PPO-style surrogate -----------------------------------------------------------------------------------------


def surrogate_gradients(step, v_student, v_teacher, count, seed=0):
    """Per-sample gradients [count, D] with respect to the student's velocity, on policy, from one state."""
    size = v_student.numel()
    x, noise = normal(seed, (size,)).expand(count, -1), normal(seed + 1, (count, size))
    v = v_student.expand(count, -1).clone().requires_grad_()
    x_next = (step.a * x + step.b * v + step.std * noise).detach()
    loss = policy_gradient_loss(step, x, x_next, v, v.detach(), v_teacher.expand(count, -1), clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    return gradient


@pytest.mark.parametrize("step", NOISY, ids=repr)
def test_surrogate_has_the_mean_gradient_of_the_kl(step):
    size, count = 12, 40_000
    v_student = normal(1, (size,))
    v_teacher = v_student + 0.5 * step.std / abs(step.b) * normal(2, (size,))
    gradients = surrogate_gradients(step, v_student, v_teacher, count)
    leaf = v_student[None].clone().requires_grad_()
    (expected,) = torch.autograd.grad(distillation_loss(step, leaf, v_teacher[None]).sum(), leaf)
    z = (gradients.mean(0) - expected[0]) / (gradients.std(0) / math.sqrt(count))
    assert z.abs().max() < 4
    assert expected.norm() > 10 * (gradients.std(0) / math.sqrt(count)).norm()  # the test could have seen a difference


def test_surrogate_carries_the_predicted_score_function_noise():
    """Its gradient is b/(std D) (KL + eps.d/std) eps with d = mu_S - mu_T; the closed form has no variance at all."""
    step, size, count = NOISY[1], 12, 40_000
    v_student = normal(1, (size,))
    v_teacher = v_student + step.std / abs(step.b) * normal(2, (size,))
    distance = step.b * (v_student - v_teacher) / step.std
    kl = 0.5 * distance.square().sum()
    predicted = (step.b / (step.std * size)) ** 2 * (kl**2 * size + (size + 1) * distance.square().sum())
    measured = surrogate_gradients(step, v_student, v_teacher, count).var(0).sum()
    assert measured.item() == pytest.approx(predicted.item(), rel=0.05)
    signal = (step.b / (step.std * size)) ** 2 * distance.square().sum()
    assert measured > 10 * signal


def test_surrogate_on_policy_has_ratio_one():
    """There the loss is minus the advantage: log p_old - log p_teacher of the sampled state, summed over dimensions."""
    step = NOISY[1]
    x, v, v_teacher, noise = normal(0), normal(1), normal(2), normal(3)
    x_next = step.a * x + step.b * v + step.std * noise
    old, teacher = (Normal(step.a * x + step.b * u, step.std) for u in (v, v_teacher))
    expected = (old.log_prob(x_next) - teacher.log_prob(x_next)).sum(dim=(1, 2, 3))
    for clip_range in (0.2, 1e-4):
        torch.testing.assert_close(policy_gradient_loss(step, x, x_next, v, v, v_teacher, clip_range), expected)


def test_surrogate_of_the_teacher_itself_is_exactly_nothing():
    step = NOISY[1]
    x, v = normal(0), normal(1).requires_grad_()
    x_next = step.sample(x, v.detach(), normal(2))
    loss = policy_gradient_loss(step, x, x_next, v, v.detach(), v.detach(), 0.2)
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert torch.equal(v.grad, torch.zeros_like(v))


@pytest.mark.parametrize("teacher_agrees", [True, False], ids=["good sample", "bad sample"])
@pytest.mark.parametrize("shift", [-1.0, 1.0], ids=["ratio below", "ratio above"])
def test_surrogate_clips_only_what_would_be_pushed_further(teacher_agrees, shift):
    """One dimension, old mean 0, sample at +1 std: the student moved away (ratio < 1) or towards it (ratio > 1)."""
    step = transition("cps", 0.8, 0.7, 0.5)
    x, v_old = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    x_next = torch.full((1, 1), step.std, dtype=torch.float64)
    per_std = step.std / step.b  # the velocity that moves the mean by one std
    v_teacher = torch.full_like(v_old, per_std if teacher_agrees else -per_std)
    v_student = torch.full_like(v_old, 0.8 * shift * per_std).requires_grad_()
    loss = policy_gradient_loss(step, x, x_next, v_student, v_old, v_teacher, clip_range=0.1)
    loss.sum().backward()

    advantage = 0.5 if teacher_agrees else 0.5 * (1 - 4)  # log-densities at distances 0 or 2 against distance 1
    ratio = math.exp(0.5 * (1 - (1 - 0.8 * shift) ** 2))
    unclipped, clipped = -advantage * ratio, -advantage * min(max(ratio, 0.9), 1.1)
    assert loss.item() == pytest.approx(max(unclipped, clipped))
    pushed_further = (advantage > 0) == (ratio > 1)
    assert (v_student.grad.abs().max() == 0) == pushed_further


def test_surrogate_ratio_averages_over_dimensions():
    """The ratio is exp of the mean log-density difference, so that clipping does not depend on the resolution."""
    step = NOISY[3]
    x, v_old, v_student, v_teacher = normal(0), normal(1), normal(1) + 0.05 * normal(4), normal(2)
    x_next = step.sample(x, v_old, normal(3))
    densities = [Normal(step.a * x + step.b * v, step.std).log_prob(x_next) for v in (v_student, v_old, v_teacher)]
    ratio = torch.exp((densities[0] - densities[1]).mean(dim=(1, 2, 3)))
    advantage = (densities[2] - densities[1]).sum(dim=(1, 2, 3))
    loss = policy_gradient_loss(step, x, x_next, v_student, v_old, v_teacher, clip_range=100.0)
    torch.testing.assert_close(loss, -advantage * ratio)


def test_surrogate_pulls_on_the_student_alone():
    step = NOISY[1]
    leaves = {name: normal(i).requires_grad_() for i, name in enumerate(("v_student", "v_old", "v_teacher"))}
    x, x_next = normal(5), normal(6)
    policy_gradient_loss(step, x, x_next, **leaves, clip_range=0.2).sum().backward()
    assert leaves["v_student"].grad is not None
    assert leaves["v_old"].grad is None and leaves["v_teacher"].grad is None


def test_surrogate_needs_a_density():
    x = normal(0)
    with pytest.raises(ValueError, match="density"):
        policy_gradient_loss(ODE, x, x, x, x, x, 0.2)
