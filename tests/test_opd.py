"""One fused round equals the three-pass way, spends no forward in vain, and stops before harm."""

from __future__ import annotations

import collections
import dataclasses
import gc
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers.optimization import get_scheduler

from diffusionopd.algorithms import opd
from diffusionopd.algorithms.base import Models
from diffusionopd.algorithms.opd import Opd, OpdSettings
from diffusionopd.algorithms.optim import Ema, NonFiniteError, OptimizerSettings, StudentOptimizer
from diffusionopd.algorithms.results import Losses
from diffusionopd.models.policies import STUDENT

from .helpers import assert_near, gradients, kept_gradients, loss_table, make_batches, make_opd, perturb, with_rows

STEPS, TRAINED = 5, 4


def three_pass(learner, batches):
    """The slow, obvious way of a round: roll out, ask the teacher at every state, then train; losses and final latents.

    The gradient is left on the student.
    """
    backbone, adapters = learner.policies.backbone, learner.policies.adapters
    own, losses, finals = learner.sampler.guidance, torch.zeros(len(batches), TRAINED), []
    for i, batch in enumerate(batches):

        def mean(adapter, x, step, guidance, batch=batch):
            adapters.use(adapter)
            transition = learner.transitions[step]
            return transition.mean(x, backbone.velocity(x, transition.sigma, batch.text, guidance)[0])

        states, teacher = [batch.noise], batch.rows[0]
        with torch.no_grad():
            for step, transition in enumerate(learner.transitions):
                noise = transition.std * batch.step_noise(step) if transition.std > 0 else 0.0
                states.append(mean(STUDENT, states[-1], step, own) + noise)
            means = [mean(teacher.teacher, states[step], step, teacher.guidance) for step in range(TRAINED)]
        for step in range(TRAINED):
            difference = mean(STUDENT, states[step], step, own) - means[step]
            variance = learner.transitions[step].std ** 2 or 1.0
            loss = (difference.square().flatten(1).mean(1) / (2 * variance)).mean()
            learner.optimizer.backward(loss / losses.numel())
            losses[i, step] = loss.detach()
        finals.append(states[-1])
    return losses, finals


@pytest.mark.parametrize("target", ["mean", "velocity"])
@pytest.mark.parametrize("solver", ["dpm1", "flow", "cps", "ddim"])
def test_a_loss_of_one_step_is_said(backbone, adapters, text, solver, target):
    """On SD3.5's levels of ten steps, of which the second last ends near 0."""
    sigmas = torch.tensor([1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0])
    learner = make_opd(backbone, adapters, text)
    sampler = replace(learner.sampler, num_steps=10, solver=solver, noise_level=0.7)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Opd(Models(learner.policies, learner.optimizer), OpdSettings(target=target), sampler, sigmas, learner.shape)
    expected = solver in ("cps", "ddim") and target == "mean"
    assert ["step 9 of 9 has 99.9%" in str(warning.message) for warning in said] == [True] * expected


@pytest.mark.parametrize(
    ("solver", "level", "student_guidance", "teacher_guidance"),
    [
        ("dpm1", 0.0, 1.0, (1.0, 1.0)),
        ("dpm1", 0.0, 2.0, (1.0, 3.0)),
        ("flow", 0.3, 2.0, (2.0, 1.0)),
        ("cps", 0.5, 1.5, (4.5, 1.0)),
        ("ddim", 0.8, 1.0, (1.0, 1.0)),
        ("dance", 0.3, 1.0, (1.0, 1.0)),
    ],
)
def test_fused_round_equals_three_passes(
    backbone, adapters, text, monkeypatch, solver, level, student_guidance, teacher_guidance
):
    perturb(adapters)
    learner = make_opd(backbone, adapters, text, solver, level, student_guidance)
    batches = make_batches(backbone, text, teacher_guidance, watched=True)
    losses, finals = three_pass(learner, batches)
    expected = gradients(adapters)
    learner.optimizer.discard()
    result, found = kept_gradients(learner, batches, monkeypatch)
    torch.testing.assert_close(loss_table(result), losses, rtol=1e-5, atol=0)
    assert result.losses.means() == pytest.approx(dict(zip("ab", losses.mean(1).tolist(), strict=True)), rel=1e-5)
    torch.testing.assert_close([latents for _, latents in result.images], finals, rtol=1e-5, atol=1e-5)
    assert_near(found, expected, rel=1e-5)


@pytest.mark.parametrize(
    ("watched", "steps", "without"), [(False, range(4), 0), (True, range(4), 1), (True, (0, 2), 3)]
)
def test_no_forward_is_spent_in_vain(backbone, adapters, text, monkeypatch, watched, steps, without):
    """Student and teacher at each supervised step; the student alone at others before the last, and for an image."""
    learner, calls, original = make_opd(backbone, adapters, text), collections.Counter(), backbone.velocity

    def counted(*arguments):
        calls[adapters.active, torch.is_grad_enabled()] += 1
        return original(*arguments)

    monkeypatch.setattr(backbone, "velocity", counted)
    learner.round(make_batches(backbone, text, watched=watched, tasks="a", steps=steps))
    expected = {("teacher_a", False): len(steps), (STUDENT, True): len(steps), (STUDENT, False): without}
    assert calls == collections.Counter(expected)


def test_memory_is_that_of_one_step(backbone, adapters, text, monkeypatch):
    """When a visit's loss goes backward, no earlier visit's graph or state is alive."""
    alive: list[weakref.ref] = []
    original = opd.distillation_loss

    def spy(transition, v_student, *others):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1, "an earlier visit's velocity is still in memory"
        alive.append(weakref.ref(v_student))
        return original(transition, v_student, *others)

    monkeypatch.setattr(opd, "distillation_loss", spy)
    make_opd(backbone, adapters, text).round(make_batches(backbone, text, tasks="a"))
    assert len(alive) == TRAINED


def test_training_changes_the_student_alone_and_lowers_the_loss(backbone, adapters, text):
    before = {n: p.detach().clone() for n, p in backbone.transformer.named_parameters()}
    learner = make_opd(backbone, adapters, text, scale=1e4)
    batches = make_batches(backbone, text)
    losses = [learner.round(batches).losses.mean for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in backbone.transformer.named_parameters():
        trained = ".student." in name and "transformer_blocks.3.attn.add_q_proj" not in name  # unused by the last block
        assert torch.equal(parameter, before[name]) != trained, name


def test_inner_epochs_train_on_the_kept_trajectory(backbone, adapters, text, monkeypatch):
    """Two inner epochs: the second one's gradient is that of the same states with the new weights."""
    learner, batches = (
        make_opd(backbone, adapters, text, inner=2, scale=1e4),
        make_batches(backbone, text, steps=(1, 3)),
    )
    visits = [found for batch in batches for found in learner.rollout(batch) if found[1].target]
    student, taken, step = adapters.parameters(STUDENT), [], learner.optimizer.step
    kept = lambda: taken.append((gradients(adapters), [p.detach().clone() for p in student])) or step()  # noqa: E731
    monkeypatch.setattr(learner.optimizer, "step", kept)
    learner.round(batches)
    _, (found, weights) = taken
    with torch.no_grad():
        for p, value in zip(student, weights, strict=True):
            p.copy_(value)
    adapters.use(STUDENT)
    for batch, visit in visits:
        v = backbone.velocity(visit.x, visit.transition.sigma, batch.text)[0]
        loss = 0.5 * (visit.transition.b * (v - visit.target.v_teacher)).square().flatten(1).mean(1).mean()
        learner.optimizer.backward(loss / 4)
    assert_near(found, gradients(adapters), rel=1e-5)


def test_policy_gradient_round_starts_at_ratio_one(backbone, adapters, text, monkeypatch):
    """There the surrogate is minus the advantage, and its gradient minus the advantage times that of log p."""
    perturb(adapters)
    learner = make_opd(backbone, adapters, text, "flow", 0.7, loss="policy_gradient", clip_range=1e-4)
    (batch,) = make_batches(backbone, text, tasks="a")
    result, found = kept_gradients(learner, [batch], monkeypatch)
    x, total = batch.noise, []
    for step, tr in enumerate(learner.transitions[:TRAINED]):
        adapters.use("teacher_a")
        with torch.no_grad():
            teacher = tr.mean(x.double(), backbone.velocity(x, tr.sigma, batch.text)[0].double())
        adapters.use(STUDENT)
        mean = tr.mean(x.double(), backbone.velocity(x, tr.sigma, batch.text)[0].double())
        x_next = mean.detach() + tr.std * batch.step_noise(step)
        own, other = (torch.distributions.Normal(m, tr.std).log_prob(x_next) for m in (mean, teacher))
        advantage = (other - own).detach().flatten(1).sum(1)
        (-advantage * own.flatten(1).mean(1)).sum().div(2 * TRAINED).backward()
        total.append(-advantage)
        x = x_next.float()
    assert result.losses.mean == pytest.approx(torch.stack(total).mean().item(), rel=1e-4)
    assert_near(found, gradients(adapters), rel=1e-4)


def test_beta_pulls_towards_the_base(backbone, adapters, text, monkeypatch):
    perturb(adapters)
    batches = make_batches(backbone, text)
    learners = [make_opd(backbone, adapters, text, beta=beta) for beta in (0.0, 2.0)]
    without, pulled = (loss_table(kept_gradients(learner, batches, monkeypatch)[0]) for learner in learners)
    x, tr, velocities = batches[0].noise, learners[0].transitions[0], []
    for adapter in (STUDENT, None):
        adapters.use(adapter)
        with torch.no_grad():
            velocities.append(backbone.velocity(x, 1.0, batches[0].text)[0])
    expected = (tr.b * (velocities[0] - velocities[1])).square().mean()  # 2 * 1/2 * ...
    torch.testing.assert_close(pulled[0, 0] - without[0, 0], expected, rtol=1e-4, atol=1e-9)


def test_a_rows_weight_scales_its_pull_and_not_its_reported_loss(backbone, adapters, text, monkeypatch):
    perturb(adapters)
    learner = make_opd(backbone, adapters, text)
    (batch,) = make_batches(backbone, text, tasks="a")

    def weighted(*weights):
        rows = tuple(dataclasses.replace(row, weight=w) for row, w in zip(batch.rows, weights, strict=True))
        return kept_gradients(learner, [dataclasses.replace(batch, rows=rows)], monkeypatch)

    (plain, _), (result, found), (_, first), (_, second) = (
        weighted(*weights) for weights in ((1, 1), (3.0, 0.5), (1.0, 0.0), (0.0, 1.0))
    )
    assert torch.equal(result.losses.sums, plain.losses.sums)
    assert_near(found, [3 * a + 0.5 * b for a, b in zip(first, second, strict=True)], rel=1e-5)


def test_losses_are_kept_by_task_and_step(backbone, text):
    """Also where a batch holds rows of several tasks, and steps differ between batches."""
    (mixed, other) = make_batches(backbone, text, steps=(0, 2))
    rows = tuple(dataclasses.replace(row, task=task) for row, task in zip(mixed.rows, "xy", strict=True))
    mixed, (other,) = dataclasses.replace(mixed, rows=rows), with_rows([other], steps=(2,))
    losses = Losses([mixed, other], STEPS, torch.device("cpu"))
    shares = [losses.add(mixed, step, torch.tensor([1.0, 10.0]) * (step + 1)) for step in (0, 2)]
    shares.append(losses.add(other, 2, torch.tensor([5.0, 7.0])))
    losses.reduce()
    assert losses.means() == {"x": 2.0, "y": 20.0, "b": 6.0}
    assert losses.mean == pytest.approx((1 + 10 + 3 + 30 + 5 + 7) / 6)
    assert sum(shares).item() == pytest.approx(losses.mean)
    losses += losses
    assert losses.means() == {"x": 2.0, "y": 20.0, "b": 6.0}


@pytest.mark.parametrize("where", ["teacher", "gradient"])
def test_non_finite_stops_before_the_step(backbone, adapters, text, monkeypatch, where):
    learner = make_opd(backbone, adapters, text)
    batches, facts = make_batches(backbone, text, steps=(0, 2, 3)), ["gradient"]
    if where == "teacher":
        original = backbone.velocity

        def broken(x, sigma, *rest):
            factor = float("nan") if adapters.active == "teacher_b" and sigma < 0.8 else 1.0
            return tuple(v * factor for v in original(x, sigma, *rest))

        monkeypatch.setattr(backbone, "velocity", broken)
        step = next(i for i in (0, 2, 3) if learner.transitions[i].sigma < 0.8)
        facts = ["'b'", f"step {step}", f"{learner.transitions[step].sigma:.4f}", "teacher"]
    else:
        adapters.parameters(STUDENT)[0].register_hook(lambda g: g * float("inf"))
    before = [p.detach().clone() for p in adapters.parameters(STUDENT)]
    with pytest.raises(NonFiniteError) as caught:
        learner.round(batches)
    assert [fact for fact in facts if fact not in str(caught.value)] == []
    assert all(torch.equal(p, b) for p, b in zip(adapters.parameters(STUDENT), before, strict=True))
    assert all(p.grad is None for p in adapters.parameters(STUDENT))


# --- the optimizer ----------------------------------------------------------------------------------------------------


def optimize(weight, dynamic_scale=False, **settings):
    return StudentOptimizer([weight], OptimizerSettings(learning_rate=0.1, **settings), dynamic_scale)


def test_loss_scale_changes_neither_norm_nor_clipping_only_epsilon():
    """AdamW is invariant to the scale except through epsilon, which the scale makes harmless."""
    steps = {}
    for scale in (1.0, 1e4):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = optimize(weight, loss_scale=scale, max_grad_norm=1e-9, adam_weight_decay=0.0)
        optimizer.backward((weight * torch.tensor([3e-9, 4e-9])).sum())
        assert optimizer.step() == pytest.approx(5e-9, rel=1e-5)
        steps[scale] = (torch.tensor([1.0, 2.0]) - weight.detach()).tolist()
    # clipped to norm 1e-9: gradients 6e-10 and 8e-10, Adam's first step is g / (g + eps)
    assert steps[1.0] == pytest.approx([0.1 * 6e-10 / (6e-10 + 1e-8), 0.1 * 8e-10 / (8e-10 + 1e-8)], rel=1e-4)
    assert steps[1e4] == pytest.approx([0.1, 0.1], rel=1e-2)


def published_averages(weights, batches_per_step, interval, decay):
    """The published loop: the average after each optimizer step, of the student's weight after each, from the first.

    It is called after every batch, with the optimizer steps done by then.
    """
    average, step, averages = weights[0], 0, [weights[0]]
    while step < len(weights) - 1:
        for batch in range(batches_per_step):
            step += batch == batches_per_step - 1
            if (step + 1) % interval == 0:
                average += (1 - min((1 + step) / (10 + step), decay)) * (weights[step] - average)
        averages.append(average)
    return averages


def test_the_average_is_that_of_the_published_loop():
    """Of config/opd.py:mopd, of guard_ocr and of nft_geneval. What acts after a step and in the batches of the next is
    done at once here, so the averages of the steps in between are ahead."""
    for batches_per_step, interval in ((3, 8), (8, 8), (1, 1)):
        weight = torch.nn.Parameter(torch.zeros(1))
        ema = Ema([weight], 0.9, interval, repeats=batches_per_step)
        weights = [0.0, *torch.rand(99, generator=torch.Generator().manual_seed(0)).cumsum(0).tolist()]
        for step, expected in enumerate(published_averages(weights, batches_per_step, interval, 0.9)):
            weight.data.fill_(weights[step])
            if step:
                ema.update(step)
            if batches_per_step == 1 or (step + 1) % interval:
                assert ema.shadow[0].item() == pytest.approx(expected, rel=1e-5), (interval, step)
        with ema.in_use():
            assert weight.item() == ema.shadow[0].item()
        assert weight.item() == pytest.approx(weights[99])


def test_every_schedule_is_the_stock_one():
    """Against torch's AdamW with diffusers' scheduler, stepped after each optimizer step; cut in the middle too."""
    for name, warmup in (("constant", 0), ("constant_with_warmup", 3), ("linear", 2), ("cosine", 0), ("cosine", 4)):
        mine, other = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
        settings = {"lr_scheduler": name, "lr_warmup_steps": warmup, "adam_weight_decay": 0.0, "loss_scale": 1.0}
        settings |= {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3}
        settings = OptimizerSettings(learning_rate=0.1, max_grad_norm=1e9, **settings)
        optimizer = StudentOptimizer([mine], settings, num_steps=8)
        stock = torch.optim.AdamW([other], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0, fused=True)
        schedule = get_scheduler(name, stock, num_warmup_steps=warmup, num_training_steps=8)
        assert optimizer.lr == schedule.get_last_lr()[0]
        for step in range(8):
            if step == 5:
                cut, saved = StudentOptimizer([mine], settings, num_steps=8), optimizer.state_tensors()
                cut.load_state({k: v.clone() for k, v in saved.items()}, optimizer.state_scalars())
                cut.steps, optimizer = optimizer.steps, cut
            optimizer.backward((mine * (step + 1)).square().sum())
            optimizer.step()
            (other * (step + 1)).square().sum().backward()
            assert optimizer.lr == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
            stock.step()
            schedule.step()
            stock.zero_grad()
            torch.testing.assert_close(mine, other)


def test_an_overflow_under_dynamic_scaling_skips_the_step_and_halves_the_scale():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optimize(weight, dynamic_scale=True, loss_scale=1e4, max_grad_norm=10.0)
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
