"""Losses against torch.distributions, hand-written gradients and Monte-Carlo estimates."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusionopd.losses import distillation_loss, policy_gradient_loss
from diffusionopd.transitions import transition

SHAPE = (3, 2, 2, 2)
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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("step", [*NOISY, ODE], ids=repr)
def test_loss_and_gradient_are_those_of_the_definition(step, target):
    """KL of the kernels (eq. 11) or half a squared distance (eq. 12); normalised, by a mean distance that is constant.

    Targets other than the mean do not depend on the kernel.
    """
    x, v_student, v_teacher = normal(0), normal(1).requires_grad_(), normal(2)
    student, teacher = (
        {"mean": step.a * x + step.b * v, "velocity": v, "x0": x - step.sigma * v}[target]
        for v in (v_student, v_teacher)
    )
    if target == "mean" and step.std:
        elements = kl_divergence(Normal(student, step.std), Normal(teacher, step.std))
    else:
        elements = 0.5 * (student - teacher).square()
    expected = elements.mean(dim=(1, 2, 3))
    distance = (student - teacher).detach().abs().mean(dim=(1, 2, 3))
    for normalize, divided in ((False, expected), (True, expected / distance)):
        loss = distillation_loss(step, v_student, v_teacher, target, self_normalize=normalize)
        torch.testing.assert_close(loss, divided)
        ours, theirs = (torch.autograd.grad(e.sum(), v_student, retain_graph=True)[0] for e in (loss, divided))
        torch.testing.assert_close(ours, theirs)


def test_self_normalisation_of_a_tiny_difference_stays_finite_and_small():
    v_teacher = normal(2)
    loss = distillation_loss(ODE, v_teacher + 1e-9, v_teacher, "velocity", self_normalize=True)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.5e-18 / 1e-5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [*NOISY, ODE], ids=repr)
def test_student_equal_to_teacher_gives_exactly_nothing(step, dtype):
    for target, self_normalize in itertools.product(TARGETS, (False, True)):
        v_student = normal(1).to(dtype).requires_grad_()
        loss = distillation_loss(step, v_student, v_student.detach().clone(), target, self_normalize)
        loss.sum().backward()
        assert not loss.any() and not v_student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_velocities_give_a_float32_loss(dtype):
    v_student, v_teacher = normal(1).to(dtype), normal(2).to(dtype)
    loss = distillation_loss(NOISY[1], v_student, v_teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(NOISY[1], v_student.float(), v_teacher.float()))


def test_unknown_target_and_a_surrogate_without_a_density_are_refused():
    x = normal(0)
    with pytest.raises(ValueError, match=r"score.*velocity"):
        distillation_loss(ODE, x, normal(1), "score")
    with pytest.raises(ValueError, match="density"):
        policy_gradient_loss(ODE, x, x, x, x, x, 0.2)


# --- the PPO-style surrogate -----------------------------------------------------------------------------------------


BASELINE = pytest.mark.parametrize("baseline", [False, True])


@BASELINE
@pytest.mark.parametrize("step", NOISY, ids=repr)
def test_surrogate_has_the_mean_gradient_of_the_kl(step, baseline):
    """Over 40,000 samples, on policy, from one state."""
    size, count = 12, 40_000
    v_student = normal(1, (size,))
    v_teacher = v_student + 0.5 * step.std / abs(step.b) * normal(2, (size,))
    x, noise, v = normal(0, (size,)).expand(count, -1), normal(1, (count, size)), v_student.repeat(count, 1)
    x_next = step.a * x + step.b * v + step.std * noise
    v.requires_grad_()
    loss = policy_gradient_loss(step, x, x_next, v, v.detach(), v_teacher.expand(count, -1), 0.2, baseline)
    (gradients,) = torch.autograd.grad(loss.sum(), v)
    leaf = v_student[None].clone().requires_grad_()
    (expected,) = torch.autograd.grad(distillation_loss(step, leaf, v_teacher[None]).sum(), leaf)
    error = gradients.std(0) / math.sqrt(count)
    assert ((gradients.mean(0) - expected[0]) / error).abs().max() < 4
    assert expected.norm() > 10 * error.norm()  # the test could have seen a difference


@BASELINE
@pytest.mark.parametrize("step", NOISY, ids=repr)
def test_surrogate_is_its_definition(step, baseline):
    """The advantage summed over dimensions, the ratio exp of a mean (so that clipping does not know the resolution).

    On policy the ratio is one. It pulls on the student alone; what would be pushed beyond the clip range is not.
    """
    x, v_old, v_teacher, noise = (normal(i).requires_grad_() for i in range(4))
    x_next = (step.a * x + step.b * v_old + step.std * noise).detach()
    for change, clip_range in itertools.product((0.0, 0.05), (100.0, 0.2, 1e-4)):
        v_student = (normal(1) + change * step.std / step.b * normal(4)).requires_grad_()
        student, old, teacher = (Normal(step.a * x + step.b * v, step.std) for v in (v_student, v_old, v_teacher))
        elements = teacher.log_prob(x_next) - old.log_prob(x_next) + baseline * kl_divergence(old, teacher)
        advantages = elements.flatten(1).sum(1).tolist()
        ratios = (student.log_prob(x_next) - old.log_prob(x_next)).flatten(1).mean(1).exp().tolist()
        loss = policy_gradient_loss(step, x.detach(), x_next, v_student, v_old, v_teacher, clip_range, baseline)
        clipped = [min(max(q, 1 - clip_range), 1 + clip_range) for q in ratios]
        expected = [max(-a * q, -a * c) for a, q, c in zip(advantages, ratios, clipped, strict=True)]
        assert loss.tolist() == pytest.approx(expected)
        loss.sum().backward()
        assert v_student.grad is not None and v_old.grad is None and v_teacher.grad is None
        stopped = [a * (q - c) > 0 for a, q, c in zip(advantages, ratios, clipped, strict=True)]
        assert [not own.any() for own in v_student.grad] == stopped
    assert any(stopped)


@BASELINE
def test_surrogate_keeps_its_digits_in_float32(baseline):
    """A latent of SD3.5 at 512 pixels and a gap of 1%: the sum of differences of log-densities would be 3% off."""
    step, shape = NOISY[0], (2, 16, 64, 64)
    x, v, noise, away = (normal(i, shape, torch.float32) for i in range(4))
    tensors = x, step.sample(x, v, noise), v, v, v + 0.01 * away
    exact = policy_gradient_loss(step, *(tensor.double() for tensor in tensors), 0.2, baseline)
    torch.testing.assert_close(policy_gradient_loss(step, *tensors, 0.2, baseline).double(), exact, rtol=1e-5, atol=0)
