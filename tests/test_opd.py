"""One fused round equals the three-pass way, spends no forward in vain, and stops before harm."""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
import weakref

import pytest
import torch

from benchmarks.three_pass import three_pass
from diffusionopd.algorithms.base import STUDENT, Parts
from diffusionopd.algorithms.opd import Distiller, Recipe
from diffusionopd.algorithms.optim import Ema, NonFiniteError, StudentOptimizer
from diffusionopd.data.batches import Batch, choose_steps
from diffusionopd.data.noise import noise
from diffusionopd.transitions import schedule

STEPS = 5


def perturb(adapters, std=0.02):
    """A student that has already learnt something, so that its losses are of ordinary size."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in adapters.parameters(STUDENT):
            p.add_(torch.randn(p.shape, generator=generator) * std)


def make_batches(backbone, text, guidances=(1.0, 1.0), size=2, watched=False):
    shape = backbone.latent_shape(64)

    def batch(i, guidance):
        return Batch(
            task="ab"[i],
            teacher=f"teacher_{'ab'[i]}",
            teacher_guidance=guidance,
            x=noise(shape, [(i, s) for s in range(size)]),
            text=text(size, i),
            draw_noise=lambda step: noise(shape, [(i, s, step) for s in range(size)]),
            wants_picture=watched,
        )

    return [batch(i, guidance) for i, guidance in enumerate(guidances)]


def make_distiller(backbone, adapters, text, kernel="ode", noise_level=0.0, trained=STEPS - 1, **recipe):
    optimizer = StudentOptimizer(adapters.parameters(STUDENT), lr=1e-3, loss_scale=recipe.pop("loss_scale", 1.0))
    transitions = schedule(kernel, backbone.sigmas(STEPS, 64), noise_level)
    return Distiller(Parts(backbone, adapters, optimizer, text(1, 99)), Recipe(transitions, trained, **recipe))


def gradients(adapters):
    return [p.grad.clone() for p in adapters.parameters(STUDENT) if p.grad is not None]


def freeze_step(distiller, monkeypatch):
    """Keep the gradients: the round ends without its optimizer step."""
    monkeypatch.setattr(distiller.optimizer, "step", lambda: 0.0)


@pytest.mark.parametrize(
    ("kernel", "level", "student_guidance", "teacher_guidance"),
    [
        ("ode", 0.0, 1.0, (1.0, 1.0)),
        ("ode", 0.0, 2.0, (1.0, 3.0)),
        ("flow_sde", 0.7, 1.0, (1.0, 2.0)),
        ("flow_sde", 0.3, 2.0, (2.0, 1.0)),
        ("cps", 0.5, 1.5, (4.5, 1.0)),
        ("ddim", 0.8, 1.0, (1.0, 1.0)),
        ("dance_sde", 0.3, 1.0, (1.0, 1.0)),
    ],
)
def test_fused_round_equals_three_passes(
    backbone, adapters, text, monkeypatch, kernel, level, student_guidance, teacher_guidance
):
    perturb(adapters)
    distiller = make_distiller(backbone, adapters, text, kernel, level, student_guidance=student_guidance)
    batches = make_batches(backbone, text, teacher_guidance, watched=True)
    losses, finals = three_pass(distiller, batches)
    expected = gradients(adapters)
    distiller.optimizer.discard()
    freeze_step(distiller, monkeypatch)
    result = distiller.round(batches)
    torch.testing.assert_close(result.losses, losses, rtol=1e-5, atol=0)
    for (_, latents), final in zip(result.pictures, finals, strict=True):
        torch.testing.assert_close(latents, final, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients(adapters), expected, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def test_teacher_equal_to_student_gives_zero_loss_and_gradient(backbone, adapters, text, make_lora, monkeypatch):
    perturb(adapters)
    with torch.no_grad():
        state = [p.clone() for p in adapters.parameters(STUDENT)]
    adapters.add_student("twin", rank=8, alpha=16, target_modules=adapters.configs[STUDENT].target_modules)
    with torch.no_grad():
        for p, value in zip(adapters.parameters("twin"), state, strict=True):
            p.copy_(value)
    distiller = make_distiller(backbone, adapters, text)
    freeze_step(distiller, monkeypatch)
    (batch, _) = make_batches(backbone, text)
    result = distiller.round([dataclasses.replace(batch, teacher="twin")])
    assert torch.equal(result.losses, torch.zeros_like(result.losses))
    assert all(not g.any() for g in gradients(adapters))


@pytest.mark.parametrize(("watched", "expected"), [(False, 4), (True, 5)])
def test_no_forward_is_spent_in_vain(backbone, adapters, text, monkeypatch, watched, expected):
    """4 of 5 steps are trained: 4 student and 4 teacher forwards, and a fifth student's only for a picture."""
    distiller = make_distiller(backbone, adapters, text)
    calls: list[str | None] = []
    original = backbone.velocity
    monkeypatch.setattr(backbone, "velocity", lambda *a: (calls.append(adapters.active), original(*a))[1])
    distiller.round(make_batches(backbone, text, watched=watched)[:1])
    assert calls.count(STUDENT) == expected
    assert calls.count("teacher_a") == 4


def test_memory_is_that_of_one_step(backbone, adapters, text, monkeypatch):
    """When a visit's loss goes backward, no earlier visit's graph or state is alive."""
    alive: list[weakref.ref] = []
    distiller = make_distiller(backbone, adapters, text)
    original = distiller._loss

    def spy(batch, visit, v_student):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1, "an earlier visit's velocity is still in memory"
        alive.append(weakref.ref(visit.v_student))
        return original(batch, visit, v_student)

    monkeypatch.setattr(distiller, "_loss", spy)
    distiller.round(make_batches(backbone, text)[:1])
    assert len(alive) == STEPS - 1


def test_training_changes_the_student_alone_and_lowers_the_loss(backbone, adapters, text):
    before = {n: p.detach().clone() for n, p in backbone.transformer.named_parameters()}
    distiller = make_distiller(backbone, adapters, text, loss_scale=1e4)
    batches = make_batches(backbone, text)
    losses = [distiller.round(batches).losses.mean().item() for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in backbone.transformer.named_parameters():
        trained = ".student." in name and "transformer_blocks.3.attn.add_q_proj" not in name  # unused by the last block
        assert torch.equal(parameter, before[name]) != trained, name


def test_inner_epochs_train_on_the_kept_trajectory(backbone, adapters, text):
    """Two inner epochs: the second one's gradient is that of the same states with the new weights."""
    distiller = make_distiller(backbone, adapters, text, inner_epochs=2, loss_scale=1e4)
    batches = make_batches(backbone, text)
    steps = []
    original = distiller.optimizer.step
    distiller.optimizer.step = lambda: steps.append(gradients(adapters)) or original()
    states = []
    original_visits = distiller._visits
    distiller._visits = lambda batch: (states.append((batch, v)) or v for v in original_visits(batch))
    weights_after_first: list[torch.Tensor] = []
    train_again = distiller._train_again

    def spy(*args):
        weights_after_first.extend(p.detach().clone() for p in adapters.parameters(STUDENT))
        train_again(*args)

    distiller._train_again = spy
    distiller.round(batches)
    assert len(steps) == 2
    with torch.no_grad():
        for p, value in zip(adapters.parameters(STUDENT), weights_after_first, strict=True):
            p.copy_(value)
    distiller.optimizer.discard()
    for batch, visit in states:
        v = distiller._student(batch)(visit.x, visit.transition.sigma)
        loss = 0.5 * (visit.transition.b * (v - visit.v_teacher)).square().flatten(1).mean(1).mean()
        distiller.optimizer.backward(loss / len(states))
    for mine, other in zip(steps[1], gradients(adapters), strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def test_policy_gradient_round_starts_at_ratio_one(backbone, adapters, text, monkeypatch):
    distiller = make_distiller(backbone, adapters, text, "flow_sde", 0.7, loss="policy_gradient", clip_range=1e-4)
    freeze_step(distiller, monkeypatch)
    result = distiller.round(make_batches(backbone, text))
    assert result.losses.isfinite().all()
    assert any(g.any() for g in gradients(adapters))


def test_beta_pulls_towards_the_base(backbone, adapters, text, monkeypatch):
    perturb(adapters)
    batches = make_batches(backbone, text)
    losses = []
    for beta in (0.0, 2.0):
        distiller = make_distiller(backbone, adapters, text, beta=beta)
        freeze_step(distiller, monkeypatch)
        losses.append(distiller.round(batches).losses)
        distiller.optimizer.discard()
    adapters.use(STUDENT)
    x, tr = batches[0].x, distiller.recipe.transitions[0]
    with torch.no_grad():
        v = backbone.velocity(x, 1.0, batches[0].text)[0]
        adapters.use(None)
        base = backbone.velocity(x, 1.0, batches[0].text)[0]
    expected = (tr.b * (v - base)).square().mean()  # 2 * 1/2 * ...
    torch.testing.assert_close(losses[1][0, 0] - losses[0][0, 0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_before_the_step(backbone, adapters, text, monkeypatch, where):
    distiller = make_distiller(backbone, adapters, text)
    batches = make_batches(backbone, text)
    if where == "loss":
        original = backbone.velocity

        def broken(x, sigma, *rest):
            factor = float("nan") if adapters.active == "teacher_b" and sigma < 0.8 else 1.0
            return tuple(v * factor for v in original(x, sigma, *rest))

        monkeypatch.setattr(backbone, "velocity", broken)
        step = next(i for i, tr in enumerate(distiller.recipe.transitions) if tr.sigma < 0.8)
        sigma = distiller.recipe.transitions[step].sigma
        message = rf"round 7: the loss is nan for task 'b' at step {step} \(sigma {sigma:.4f}\)"
    else:
        adapters.parameters(STUDENT)[0].register_hook(lambda g: g * float("inf"))
        message = "round 7: the gradient's norm is (nan|inf)"
    before = [p.detach().clone() for p in adapters.parameters(STUDENT)]
    with pytest.raises(NonFiniteError, match=message):
        distiller.round(batches, "round 7")
    assert all(torch.equal(p, b) for p, b in zip(adapters.parameters(STUDENT), before, strict=True))
    assert all(p.grad is None for p in adapters.parameters(STUDENT))


def test_loss_scale_changes_neither_norm_nor_clipping_only_epsilon():
    """AdamW is invariant to the scale except through epsilon, which the scale makes harmless."""
    steps = {}
    for scale in (1.0, 1e4):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = StudentOptimizer([weight], lr=0.1, loss_scale=scale, epsilon=1e-8, max_grad_norm=1e-9)
        optimizer.backward((weight * torch.tensor([3e-9, 4e-9])).sum())
        assert optimizer.step() == pytest.approx(5e-9, rel=1e-5)
        steps[scale] = (torch.tensor([1.0, 2.0]) - weight.detach()).tolist()
    # clipped to norm 1e-9: gradients 6e-10 and 8e-10, Adam's first step is g / (g + eps)
    assert steps[1.0] == pytest.approx([0.1 * 6e-10 / (6e-10 + 1e-8), 0.1 * 8e-10 / (8e-10 + 1e-8)], rel=1e-4)
    assert steps[1e4] == pytest.approx([0.1, 0.1], rel=1e-2)


def test_ema_follows_the_formula():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = Ema([weight], decay=0.9, interval=8)
    expected = 0.0
    for done in range(1, 100):
        weight.data.fill_(float(done))
        ema.update(done)
        if done % 8 == 0:
            decay = min((1 + done) / (10 + done), 0.9)
            expected = decay * expected + (1 - decay) * done
        assert ema.shadow[0].item() == pytest.approx(expected, rel=1e-5)
    with ema.in_use():
        assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() == 99


def test_an_overflow_under_dynamic_scaling_skips_the_step_and_halves_the_scale():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = StudentOptimizer([weight], lr=0.1, dynamic_scale=True, loss_scale=1e4, max_grad_norm=10.0)
    scale = optimizer.state_scalars()["scale"]
    optimizer.backward(weight.sum() * float("inf"))
    assert optimizer.step() is None
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))
    assert optimizer.state_scalars()["scale"] == scale / 2
    optimizer.backward((weight * torch.tensor([3.0, 4.0])).sum())
    assert optimizer.step() == pytest.approx(5.0), "the norm is that of the unscaled loss"
    assert not torch.equal(weight, torch.tensor([1.0, 2.0]))
    with pytest.raises(NonFiniteError):
        for _ in range(40):
            optimizer.backward(weight.sum() * float("nan"))
            optimizer.step()


def test_optimizer_state_round_trips_bit_for_bit():
    def fresh():
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        return weight, StudentOptimizer([weight], lr=0.1, dynamic_scale=True)

    def advance(weight, optimizer, steps):
        for i in range(steps):
            optimizer.backward((weight * (i + 1)).square().sum())
            optimizer.step()

    weight, optimizer = fresh()
    advance(weight, optimizer, 3)
    tensors = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    other, resumed = fresh()
    other.data.copy_(weight.data)
    resumed.load_state(tensors, optimizer.state_scalars())
    advance(weight, optimizer, 3)
    advance(other, resumed, 3)
    assert torch.equal(weight, other)
    assert resumed.state_scalars() == optimizer.state_scalars()


def drawn(batches, steps):
    return [dataclasses.replace(batch, steps=steps) for batch in batches]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_mean_gradient_over_all_draws_is_the_full_one(backbone, adapters, text, monkeypatch, count):
    """Unbiased, exactly: every subset of the trained steps, each as likely as the others."""
    perturb(adapters)
    distiller = make_distiller(backbone, adapters, text, "flow_sde", 0.7)
    freeze_step(distiller, monkeypatch)
    batches = make_batches(backbone, text)
    full = distiller.round(batches)
    expected = gradients(adapters)
    distiller.optimizer.discard()
    subsets = list(itertools.combinations(range(STEPS - 1), count))
    losses = []
    for subset in subsets:
        result = distiller.round(drawn(batches, subset))
        assert result.losses.shape == (2, count)
        torch.testing.assert_close(result.losses, full.losses[:, list(subset)], rtol=1e-5, atol=0)
        losses.append(result.losses.mean())
    torch.testing.assert_close(torch.stack(losses).mean(), full.losses.mean(), rtol=1e-5, atol=0)
    for mine, other in zip(gradients(adapters), expected, strict=True):
        assert (mine / len(subsets) - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(("watched", "student"), [(False, 3), (True, 5)])
def test_undrawn_steps_cost_a_students_forward_and_those_after_the_last_nothing(
    backbone, adapters, text, monkeypatch, watched, student
):
    distiller = make_distiller(backbone, adapters, text)
    calls: list[tuple[str | None, bool]] = []
    original = backbone.velocity
    monkeypatch.setattr(
        backbone, "velocity", lambda *a: (calls.append((adapters.active, torch.is_grad_enabled())), original(*a))[1]
    )
    distiller.round(drawn(make_batches(backbone, text, watched=watched)[:1], (0, 2)))
    assert calls.count(("teacher_a", False)) == 2
    assert calls.count((STUDENT, True)) == 2
    assert calls.count((STUDENT, False)) == student - 2


def test_inner_epochs_train_on_the_drawn_steps_alone(backbone, adapters, text):
    distiller = make_distiller(backbone, adapters, text, inner_epochs=2, loss_scale=1e4)
    visits = []
    original = distiller._loss
    distiller._loss = lambda batch, visit, v: visits.append(visit.step) or original(batch, visit, v)
    result = distiller.round(drawn(make_batches(backbone, text), (1, 3)))
    assert visits == [1, 3] * 4
    assert result.losses.shape == (2, 2)


def test_a_non_finite_loss_of_a_drawn_step_names_the_step(backbone, adapters, text, monkeypatch):
    distiller = make_distiller(backbone, adapters, text)
    original = backbone.velocity
    monkeypatch.setattr(
        backbone,
        "velocity",
        lambda *a: tuple(v * (float("nan") if adapters.active == "teacher_b" else 1.0) for v in original(*a)),
    )
    sigma = distiller.recipe.transitions[2].sigma
    with pytest.raises(NonFiniteError, match=rf"task 'b' at step 2 \(sigma {sigma:.4f}\)"):
        distiller.round(drawn(make_batches(backbone, text), (2, 3)))


def test_draws_depend_on_the_key_alone_and_favour_no_step():
    assert choose_steps(9, 3, 42, 7, 1) == choose_steps(9, 3, 42, 7, 1)
    draws = [choose_steps(4, 2, 42, round_, 0) for round_ in range(600)]
    assert all(a < b for a, b in draws)
    counts = collections.Counter(draws)
    assert set(counts) == set(itertools.combinations(range(4), 2))
    assert all(70 < count < 130 for count in counts.values()), "six subsets, 100 times each on average"
    assert choose_steps(4, 2, 42, 0, 0) != choose_steps(4, 2, 42, 0, 1) or draws[1] != choose_steps(4, 2, 42, 1, 1)
