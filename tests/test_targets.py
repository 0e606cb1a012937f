"""Targets other than the teacher: extrapolated, by branch, and at drawn states."""

from __future__ import annotations

import collections

import pytest
import torch
from torch.distributions import Normal

from diffusionopd.algorithms.opd import Opd, OpdSettings
from diffusionopd.config_schema import ConfigError
from diffusionopd.data.batches import choose_steps, step_chances
from diffusionopd.losses import extrapolated
from diffusionopd.models.policies import STUDENT
from diffusionopd.training.checks import check
from diffusionopd.training.keys import load_config
from diffusionopd.transitions import KERNELS, schedule

from .helpers import assert_near, gradients, kept_gradients, loss_table, make_batches, make_opd, perturb, with_rows

TRAINED = 4
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_extrapolated_step_is_the_product_of_powers(kernel):
    """``N_T^L N_ref^(1 - L)`` up to a factor: its log-density differs from the target's by a constant over x."""
    x, v_ref, v_teacher, points = (torch.randn(7, 3, dtype=torch.float64) for _ in range(4))
    for step in schedule(kernel, SIGMAS, 0.6):
        std = step.std or 1e-3  # the limit of a deterministic step
        for strength in (0.0, 0.5, 1.0, 1.25, 2.0):
            both, target = (
                [Normal(step.mean(x, v), std).log_prob(points) for v in (v_teacher, v_ref)],
                Normal(step.mean(x, extrapolated(v_ref, v_teacher, strength)), std),
            )
            moved = points + std
            difference = strength * both[0] + (1 - strength) * both[1] - target.log_prob(points)
            again = [Normal(step.mean(x, v), std).log_prob(moved) for v in (v_teacher, v_ref)]
            other = strength * again[0] + (1 - strength) * again[1] - target.log_prob(moved)
            torch.testing.assert_close(difference, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reference", [None, "teacher_b"])
def test_a_round_pulls_to_the_target(backbone, adapters, text, monkeypatch, reference):
    """Gradient, losses and distances of the slow way, where the target is composed after guidance."""
    perturb(adapters)
    learner = make_opd(backbone, adapters, text, "flow", 0.7, 2.0)
    (plain,) = make_batches(backbone, text, (3.0, 1.0), tasks="a")
    (batch,) = with_rows([plain], strength=1.5, reference=reference)
    result, found = kept_gradients(learner, [batch], monkeypatch)
    x, losses, distances = batch.noise, [], {"teacher": [], "target": []}
    for step, tr in enumerate(learner.transitions[:TRAINED]):
        v = {}
        for name in ("teacher_a", reference, STUDENT):
            adapters.use(name)
            with torch.set_grad_enabled(name == STUDENT):
                v[name] = backbone.velocity(x, tr.sigma, batch.text, 2.0 if name == STUDENT else 3.0)[0]
        target = v[reference] + 1.5 * (v["teacher_a"] - v[reference])
        loss = (tr.mean(x, v[STUDENT]) - tr.mean(x, target)).square().flatten(1).mean(1) / (2 * tr.std**2)
        learner.optimizer.backward(loss.mean() / TRAINED)
        losses.append(loss.mean().item())
        for name, other in (("teacher", v["teacher_a"]), ("target", target)):
            distances[name].append((v[STUDENT] - other).detach().square().mean().item())
        x = tr.sample(x, v[STUDENT].detach(), batch.step_noise(step))
    assert loss_table(result)[0].tolist() == pytest.approx(losses, rel=1e-4)
    assert_near(found, gradients(adapters), rel=1e-4)
    expected = {f"distance/a/{name}": (sum(own) / TRAINED) ** 0.5 for name, own in distances.items()}
    assert result.metrics == pytest.approx(expected, rel=1e-4)


def test_strength_one_costs_and_changes_nothing(backbone, adapters, text, monkeypatch):
    learner, asked = make_opd(backbone, adapters, text), collections.Counter()
    student, frozen = learner.policies.student, learner.policies.frozen
    monkeypatch.setattr(learner.policies, "student", lambda *a: asked.update([STUDENT]) or student(*a))
    monkeypatch.setattr(learner.policies, "frozen", lambda rs: asked.update(r.policy for r in rs) or frozen(rs))
    for strength, base in ((1.0, 0), (0.75, TRAINED)):
        asked.clear()
        result = learner.round(with_rows(make_batches(backbone, text, tasks="a"), strength=strength), step=False)
        assert asked == collections.Counter({"teacher_a": TRAINED, STUDENT: TRAINED} | ({None: base} if base else {}))
        assert bool(result.metrics) == bool(base)
        learner.optimizer.discard()


def test_the_loss_of_both_branches(backbone, adapters, text, monkeypatch):
    perturb(adapters)
    learner = make_opd(backbone, adapters, text, guidance=2.0, conditional_weight=0.5)
    (batch,) = make_batches(backbone, text, (3.0, 1.0), tasks="a", steps=(0,))
    _, found = kept_gradients(learner, [batch], monkeypatch)
    adapters.use("teacher_a")
    with torch.no_grad():
        teacher = backbone.velocity(batch.noise, 1.0, batch.text, 3.0)
    adapters.use(STUDENT)
    student = backbone.velocity(batch.noise, 1.0, batch.text, 2.0)
    b = learner.transitions[0].b
    guided, conditional = (0.5 * (b * (s - t)).square().mean() for s, t in zip(student, teacher, strict=True))
    learner.optimizer.backward(guided + 0.5 * conditional)
    assert_near(found, gradients(adapters), rel=1e-5)


# --- which states count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "a", "b"), [(1, 5, 2), (3, 2, 5), (3, 30, 1), (4, 1, 1)])
def test_steps_are_drawn_as_often_as_said(count, a, b):
    chances = step_chances(6, count, a, b)
    assert sum(chances) == pytest.approx(count) and max(chances) <= 1
    draws = [choose_steps(6, count, 42, n, chances=chances) for n in range(4000)]
    assert all(len(set(draw)) == count and list(draw) == sorted(draw) for draw in draws)
    found = collections.Counter(step for draw in draws for step in draw)
    for step, chance in enumerate(chances):
        assert abs(found[step] / 4000 - chance) <= 4 * (chance * (1 - chance) / 4000) ** 0.5, (step, chance)
    assert choose_steps(6, count, 42, 7, chances=chances) == draws[7]
    if a == b == 1:
        assert chances == pytest.approx([count / 6] * 6)


def test_corrected_draws_have_the_full_gradient_in_expectation(backbone, adapters, text, monkeypatch):
    perturb(adapters)
    full, expected = kept_gradients(make_opd(backbone, adapters, text), make_batches(backbone, text), monkeypatch)
    drawn = {"steps_per_rollout": 1, "step_weighting": "beta(3, 1.5)"}
    chances = OpdSettings(**drawn).chances(TRAINED)
    for corrected in (True, False):
        learner, total = make_opd(backbone, adapters, text, step_correction=corrected, **drawn), None
        for step, chance in enumerate(chances):
            result, found = kept_gradients(learner, make_batches(backbone, text, steps=(step,)), monkeypatch)
            total = [chance * g + (total[i] if total else 0) for i, g in enumerate(found)]
            if not corrected:
                torch.testing.assert_close(loss_table(result), loss_table(full)[:, [step]], rtol=1e-5, atol=0)
        if corrected:
            assert_near(total, expected, rel=1e-5)
        else:
            with pytest.raises(AssertionError):
                assert_near(total, expected, rel=1e-2)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    for overrides, key in (
        ({"train.step_weighting": "beta(5, 2)"}, "train.step_weighting"),
        ({"train.step_weighting": "beta(0, 2)", "train.steps_per_rollout": 1}, "train.step_weighting"),
        ({"train.conditional_weight": 1.0}, "train.conditional_weight"),
        ({"train.teachers[0].reference": "assets/tiny/teachers/ocr/lora"}, "train.teachers[0].reference"),
        ({"train.teachers[0].strength": -1.0}, "train.teachers[0].strength"),
        ({"train.teachers[0].strength": 2.0, "train.algorithm": "sft"}, "train.teachers[0].strength"),
    ):
        given = {"save_dir": tmp_path, **overrides}
        with pytest.raises(ConfigError, match=key.replace("[", r"\[").replace("]", r"\]")):
            check(load_config("config/tiny.py:mopd", [(name, str(value)) for name, value in given.items()]), 1)


def test_the_plan_counts_what_a_round_spends(tmp_path):
    """Base and teacher cost two forwards a state where that teacher is guided."""
    plan = check(load_config("config/tiny.py:mopd_beyond", [("save_dir", str(tmp_path))]), 1)
    images = plan.shape.images_per_task * plan.sampler.trained_steps
    own = sum(1 if task.guidance_scale <= 1 else 2 for task in plan.tasks)
    nfe = Opd.count(plan)
    assert (nfe.student, nfe.teacher, nfe.base) == (3 * images, own * images, own * images)
