"""Losses of training from rewards against slow loops, torch.distributions, hand-written gradients and Monte Carlo."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusionopd.losses import (
    grpo_guard_loss,
    grpo_loss,
    kl_to_reference,
    nft_loss,
    old_policy_decay,
    optimality,
    reference_penalty,
)
from diffusionopd.transitions import schedule, transition

from .test_losses import NOISY, SIZE, normal

SD3_SIGMAS = [3 * u / (1 + 2 * u) for u in (1 - i / 10 for i in range(11))]
ADVANTAGE = torch.tensor([1.5, -0.8, 0.0], dtype=torch.float64)
GRPO = pytest.mark.parametrize("loss_function", [grpo_loss, grpo_guard_loss])


# --- DiffusionNFT -----------------------------------------------------------------------------------------------------


def nft_by_loops(v, v_old, x0, x_t, sigma, r, beta):
    """The definition, one sample and one element at a time, in Python floats."""
    losses = []
    for i in range(len(v)):
        elements = list(zip(*(tensor[i].flatten().tolist() for tensor in (v, v_old, x0, x_t)), strict=True))
        total = 0.0
        for weight, sign in ((r[i], 1), (1 - r[i], -1)):
            errors = []
            for new, old, data, noisy in elements:
                mixed = beta * new + (1 - beta) * old if sign == 1 else (1 + beta) * old - beta * new
                errors.append(noisy - sigma[i] * mixed - data)
            normalizer = max(sum(abs(e) for e in errors) / len(errors), 1e-5)
            total += weight * sum(e * e for e in errors) / len(errors) / normalizer / beta
        losses.append(total)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_its_definition(beta):
    v, v_old, x0, x_t = (normal(i) for i in range(4))
    r = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    for sigma in (torch.tensor([0.2, 0.7, 1.0]).double(), torch.tensor(0.7).double()):
        expected = nft_by_loops(v, v_old, x0, x_t, sigma.expand(3).tolist(), r.tolist(), beta)
        torch.testing.assert_close(nft_loss(v, v_old, x0, x_t, sigma if sigma.dim() else 0.7, r, beta), expected)


@pytest.mark.parametrize("clip", [5.0, 2.0])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_on_policy_has_the_advantage_times_the_gradient_of_the_error(beta, clip):
    """Times the clip range, whatever it and beta: A * d/dv [ mean (x_t - t v - x0)^2 / w ], with w a constant."""
    v_old, x0, sigma = normal(1), normal(2), 0.7
    x_t = (1 - sigma) * x0 + sigma * normal(3)
    v = v_old.clone().requires_grad_()
    loss = clip * nft_loss(v, v_old, x0, x_t, sigma, optimality(ADVANTAGE, clip), beta)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    error = x_t - sigma * v_old - x0
    expected = -2 * sigma * error / SIZE / error.abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, ADVANTAGE.view(-1, 1, 1, 1) * expected)
    assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))  # advantage 0, optimality 1/2: no pull at all


def test_nft_normaliser_is_detached_and_has_a_floor():
    """An error of 1e-7 everywhere: its mean absolute value is below 1e-5, which divides instead."""
    zeros = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    v = zeros.clone().requires_grad_()
    loss = nft_loss(v, zeros, zeros, zeros + 1e-7, 1.0, torch.ones(1), 1.0)
    assert loss.item() == pytest.approx(1e-14 / 1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    torch.testing.assert_close(gradient, torch.full_like(v, -2e-7 / 4 / 1e-5))


def test_nft_pulls_on_the_student_alone_and_takes_half_precision():
    leaves = [normal(i).to(torch.bfloat16).requires_grad_() for i in range(2)]
    x0, x_t, r = normal(2, dtype=torch.float32), normal(3, dtype=torch.float32), torch.tensor([0.1, 0.5, 0.9])
    loss = nft_loss(*leaves, x0, x_t, torch.tensor([0.2, 0.7, 1.0]), r, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nft_loss(*(leaf.float() for leaf in leaves), x0, x_t, [0.2, 0.7, 1.0], r, 0.1))
    loss.sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is None


def test_optimality_maps_the_clipped_advantage_to_the_unit_interval():
    advantage = torch.tensor([-9.0, -5.0, -2.5, 0.0, 1.0, 5.0, 9.0])
    torch.testing.assert_close(optimality(advantage, 5.0), torch.tensor([0.0, 0.0, 0.25, 0.5, 0.6, 1.0, 1.0]))


@pytest.mark.parametrize("step", NOISY, ids=repr)
def test_pulls_to_the_reference_are_the_mean_squared_distance_and_the_kl_of_the_two_gaussians(step):
    x, v, v_ref = normal(0), normal(1).requires_grad_(), normal(2).requires_grad_()
    student, reference = (Normal(step.a * x + step.b * u, step.std) for u in (v, v_ref.detach()))
    for mine, elements in (
        (reference_penalty(v, v_ref), (v - v_ref.detach()) ** 2),
        (kl_to_reference(step, v, v_ref), kl_divergence(student, reference)),
    ):
        expected = elements.mean(dim=(1, 2, 3))
        torch.testing.assert_close(mine, expected)
        ours, theirs = (torch.autograd.grad(e.sum(), v, retain_graph=True)[0] for e in (mine, expected))
        torch.testing.assert_close(ours, theirs)
        mine.sum().backward()
        assert v_ref.grad is None


@pytest.mark.parametrize(
    ("schedule_of", "expected"),
    [
        ((0, 0.001, 0.5), {0: 0.0, 1: 0.001, 499: 0.499, 500: 0.5, 10_000: 0.5}),
        ((75, 0.0075, 0.999), {0: 0.0, 75: 0.0, 76: 0.0075, 175: 0.75, 300: 0.999}),
    ],
)
def test_old_policy_decay_follows_the_published_schedules(schedule_of, expected):
    assert {step: old_policy_decay(step, *schedule_of) for step in expected} == pytest.approx(expected)


# --- Flow-GRPO and GRPO-Guard -----------------------------------------------------------------------------------------


def sampled(step, distance=0.05):
    """A state, the old policy's next one, and two velocities whose means are `distance` stds apart or so."""
    x, v_old, noise, away = (normal(i) for i in range(4))
    v_student = v_old + distance * step.std / abs(step.b) * away
    return x, step.a * x + step.b * v_old + step.std * noise, v_student, v_old


def ratio_by_densities(step, x, x_next, v_student, v_old, guard):
    """The published definitions, from torch.distributions and the two means."""
    means = [step.a * x + step.b * v for v in (v_student, v_old)]
    new, old = (Normal(mean, step.std).log_prob(x_next).mean(dim=(1, 2, 3)) for mean in means)
    if not guard:
        return torch.exp(new - old)
    distance = (means[0] - means[1]).square().mean(dim=(1, 2, 3))
    return torch.exp((new - old) * step.std + distance / (2 * step.std))


@GRPO
@pytest.mark.parametrize("step", NOISY, ids=repr)
def test_grpo_is_its_definition(step, loss_function):
    """Pulls on the student alone, and no further where it has gone far enough: its gradient is the definition's."""
    x, x_next, v_student, v_old = (tensor.requires_grad_() for tensor in sampled(step))
    guard = loss_function is grpo_guard_loss
    q = ratio_by_densities(step, x.detach(), x_next.detach(), v_student, v_old.detach(), guard)
    for clip_low in (1e-3, 100.0):
        loss, ratio = loss_function(step, x, x_next, v_student, v_old, ADVANTAGE, clip_low, 2e-3)
        assert not ratio.requires_grad
        torch.testing.assert_close(ratio, q.detach())
        expected = torch.maximum(-ADVANTAGE * q, -ADVANTAGE * q.clamp(1 - clip_low, 1 + 2e-3))
        expected = expected / (step.sigma - step.sigma_next if guard else 1.0)
        torch.testing.assert_close(loss, expected)
        mine, other = (torch.autograd.grad(e.sum(), v_student, retain_graph=True)[0] for e in (loss, expected))
        torch.testing.assert_close(mine, other)
        loss.sum().backward()
    assert [leaf.grad is not None for leaf in (x, x_next, v_student, v_old)] == [False, False, True, False]


@GRPO
@pytest.mark.parametrize("step", NOISY, ids=repr)
def test_on_policy_ratio_is_exactly_one(step, loss_function):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, v, noise = (normal(i).to(dtype) for i in range(3))
        _, ratio = loss_function(step, x, step.sample(x, v, noise), v, v.clone(), ADVANTAGE, 1e-5, 1e-5)
        assert torch.equal(ratio, torch.ones_like(ratio))


def on_policy_pull(loss_function, step):
    """The factor k of the on-policy gradient -A eps / D * k with respect to the velocity; without the guard, that of
    minus the advantage times the log-density."""
    x, x_next, _, v_old = sampled(step)
    v = v_old.clone().requires_grad_()
    loss, _ = loss_function(step, x, x_next, v, v_old, ADVANTAGE, 1e-4, 1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    if loss_function is grpo_loss:
        log_prob = Normal(step.a * x + step.b * v, step.std).log_prob(x_next).mean(dim=(1, 2, 3))
        torch.testing.assert_close(gradient, torch.autograd.grad((-ADVANTAGE * log_prob).sum(), v)[0])
    unit = -ADVANTAGE.view(-1, 1, 1, 1) * normal(2) / SIZE  # normal(2) is the noise of `sampled`
    factor = ((gradient * unit).sum() / unit.square().sum()).item()
    torch.testing.assert_close(gradient, factor * unit)
    return factor


def test_the_guard_gives_every_step_of_the_flow_sde_the_same_pull():
    steps = schedule("flow_sde", SD3_SIGMAS, 0.7)
    guarded = [on_policy_pull(grpo_guard_loss, step) for step in steps]
    assert guarded == pytest.approx([-1.0, *[-(1 + 0.7**2 / 2)] * 9])
    plain = [on_policy_pull(grpo_loss, step) for step in steps]
    assert plain == pytest.approx([step.b / step.std for step in steps])
    assert plain[9] / plain[1] > 20  # what the docstring says of the loss without the guard


def test_a_ratio_near_one_keeps_its_digits_in_float32():
    """A step of std 0.01 and a difference of 1e-3 std: two float32 log-densities already differ by their rounding."""
    step = transition("dance_sde", 0.8, 0.79, 0.1)
    single = [tensor.float() for tensor in sampled(step, distance=1e-3)]
    exact = ratio_by_densities(step, *(tensor.double() for tensor in single), guard=False)
    _, ratio = grpo_loss(step, *single, ADVANTAGE, 9.0, 9.0)
    assert ratio.dtype == torch.float32
    assert (ratio.double() - exact).abs().max() < 1e-7
    assert (ratio_by_densities(step, *single, guard=False).double() - exact).abs().max() > 3e-7


@GRPO
@pytest.mark.parametrize("step", [transition("ode", 0.8, 0.7), transition("cps", 0.1, 0.0, 0.7)], ids=repr)
def test_a_step_without_a_density_is_refused(step, loss_function):
    x = normal(0)
    with pytest.raises(ValueError, match=r"density.*noise_level"):
        loss_function(step, x, x, x, x, ADVANTAGE, 0.1, 0.1)
