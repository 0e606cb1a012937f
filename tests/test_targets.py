"""Targets other than the teacher: extrapolated, by branch, and at drawn states."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from torch.distributions import Normal

from diffusionopd.algorithms.opd import Opd
from diffusionopd.config_schema import ConfigError
from diffusionopd.data.batches import choose_steps, step_chances
from diffusionopd.losses import extrapolated
from diffusionopd.models.policies import STUDENT
from diffusionopd.training.checks import check
from diffusionopd.training.costs.models import read_pipeline
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
            target = Normal(step.mean(x, extrapolated(v_ref, v_teacher, strength)), std)
            teacher, reference = (Normal(step.mean(x, v), std) for v in (v_teacher, v_ref))
            constant = [
                strength * teacher.log_prob(y) + (1 - strength) * reference.log_prob(y) - target.log_prob(y)
                for y in (points, points + std)
            ]
            torch.testing.assert_close(*constant, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize(("count", "beta"), [(2, None), (1, (5, 2)), (3, (2, 5)), (3, (30, 1)), (4, (1, 1))])
def test_steps_are_drawn_as_often_as_said_by_the_key_alone(count, beta):
    chances = step_chances(6, count, *beta) if beta else None
    draws = [choose_steps(6, count, 42, n, chances=chances) for n in range(4000)]
    assert all(len(set(draw)) == count and list(draw) == sorted(draw) for draw in draws)
    expected = dict(enumerate(chances or [count / 6] * 6))
    assert sum(expected.values()) == pytest.approx(count) and max(expected.values()) <= 1
    found = collections.Counter(step for draw in draws for step in draw)
    if beta is None:  # not the steps alone: each subset
        found += collections.Counter(draws)
        expected |= dict.fromkeys(itertools.combinations(range(6), count), 1 / 15)
    for what, chance in expected.items():
        assert abs(found[what] / 4000 - chance) <= 4 * (chance * (1 - chance) / 4000) ** 0.5, (what, chance)
    assert choose_steps(6, count, 42, 7, chances=chances) == draws[7]
    assert [choose_steps(6, count, 43, n, chances=chances) for n in range(99)] != draws[:99] or beta == (30, 1)
    if beta == (1, 1):
        assert chances == pytest.approx([count / 6] * 6)


def test_draws_have_the_full_gradient_in_expectation(backbone, adapters, text, monkeypatch):
    """Where all subsets are as likely, and with the correction where they are not; without it they have another."""
    perturb(adapters)
    options = {"solver": "flow", "noise_level": 0.7}
    learner = make_opd(backbone, adapters, text, **options)
    full, expected = kept_gradients(learner, make_batches(backbone, text), monkeypatch)
    drawn = options | {"steps_per_rollout": 1, "step_weighting": "beta(3, 1.5)"}
    pairs = dict.fromkeys(itertools.combinations(range(TRAINED), 2), 1 / 6)
    singles = {(step,): chance for step, chance in enumerate(step_chances(TRAINED, 1, 3, 1.5))}
    for own, draws, near in (
        (options, pairs, 1e-5),
        (drawn | {"step_correction": True}, singles, 1e-5),
        (drawn, singles, 0),
    ):
        learner, total = make_opd(backbone, adapters, text, **own), [torch.zeros_like(g) for g in expected]
        for steps, chance in draws.items():
            result, found = kept_gradients(learner, make_batches(backbone, text, steps=steps), monkeypatch)
            total = [sum_ + chance * g for sum_, g in zip(total, found, strict=True)]
            if "step_correction" not in own:
                torch.testing.assert_close(loss_table(result), loss_table(full)[:, list(steps)], rtol=1e-5, atol=0)
        if near:
            assert_near(total, expected, rel=near)
        else:
            with pytest.raises(AssertionError):
                assert_near(total, expected, rel=1e-2)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    for overrides, key in (
        ({"train.step_weighting": "beta(5, 2)"}, "train.step_weighting"),
        *(
            ({"train.step_weighting": f"beta({a}, 2)", "train.steps_per_rollout": 1}, "train.step_weighting")
            for a in (0, 1000)
        ),
        ({"train.conditional_weight": 1.0}, "train.conditional_weight"),
        ({"train.teachers[0].reference": "assets/tiny/teachers/ocr/lora"}, "train.teachers[0].reference"),
        ({"train.teachers[0].strength": -1.0}, "train.teachers[0].strength"),
        ({"train.teachers[0].strength": 2.0, "train.algorithm": "sft"}, "train.teachers[0].strength"),
    ):
        given = {"save_dir": tmp_path, **overrides}
        with pytest.raises(ConfigError, match=key.replace("[", r"\[").replace("]", r"\]")):
            check(load_config("config/tiny.py:mopd", [(name, str(value)) for name, value in given.items()]), 1)


def test_a_strength_of_none_is_the_default(tmp_path):
    given = [("train.algorithm", "sft"), ("train.teachers[0].strength", "None"), ("save_dir", str(tmp_path))]
    assert check(load_config("config/tiny.py:mopd", given), 1).tasks[0].strength == 1.0


def test_a_model_with_one_branch_has_no_loss_of_two():
    """FLUX.1-dev is given its guidance."""
    config = load_config("config/flux1.py:mopd", [("train.conditional_weight", "1.0")])
    with pytest.raises(ConfigError) as caught:
        check(config, 8, sources=False, model=read_pipeline("black-forest-labs/FLUX.1-dev"))
    (problem,) = caught.value.problems
    assert problem.startswith("train.conditional_weight ") and "train.teachers[0].guidance_scale" in problem


def test_the_plan_counts_what_a_round_spends(tmp_path):
    """Base and teacher cost two forwards a state where that teacher is guided."""
    plan = check(load_config("config/tiny.py:mopd_beyond", [("save_dir", str(tmp_path))]), 1)
    images = plan.shape.images_per_task * plan.sampler.trained_steps
    own = sum(1 if task.guidance_scale <= 1 else 2 for task in plan.tasks)
    nfe = Opd.count(plan)
    assert (nfe.student, nfe.teacher, nfe.base) == (3 * images, own * images, own * images)
