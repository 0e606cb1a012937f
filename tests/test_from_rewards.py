"""Training from rewards, and on teachers' samples: rounds against slow loops, whole runs against each other."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.algorithms.nft import OLD
from diffusionopd.config_schema import ConfigError
from diffusionopd.models.policies import STUDENT
from diffusionopd.rewards import RewardError, RewardUnavailableError, UnfitPromptError
from diffusionopd.rewards.jpeg import JpegCompressibility
from diffusionopd.training import check, checkpoint, train
from diffusionopd.transitions import per_sample_mean

from .helpers import (
    Darkness,
    assert_bitwise,
    assert_equal_rounds,
    assert_near,
    gradients,
    kept_gradients,
    loss_table,
    make_batches,
    make_learner,
    metrics,
    perturb,
    state,
    train_forked,
)

TRAINED, SIZE, GROUP = 3, 4, 2
SAMPLE_FIRST = [name for name in ALGORITHMS if name != "opd"]


def batches_of(backbone, text, tasks="a", **options):
    return make_batches(backbone, text, size=SIZE, tasks=tasks, steps=range(TRAINED), **options)


# --- one round --------------------------------------------------------------------------------------------------------


def advantages_by_hand(rewards):
    out = []
    for i, reward in enumerate(rewards):
        group = [rewards[j] for j in range(len(rewards)) if j // GROUP == i // GROUP]
        out.append((reward - np.mean(group)) / (np.std(group) + 1e-4))
    return out


PULL = {"distill_weight": 0.7, "target": "velocity", "self_normalize": True}


def pulled(batch):
    """The batch with a target beyond its teacher."""
    return replace(batch, rows=tuple(replace(row, strength=1.5) for row in batch.rows))


def distillation_by_hand(v, x, sigma, velocity):
    """Losses `[B]` towards 1.5 times the way from the base to teacher a, in float64."""
    v_base, v_teacher = (velocity(name, x, sigma).double() for name in (None, "teacher_a"))
    difference = v.double() - (v_base + 1.5 * (v_teacher - v_base))
    return 0.5 * difference.square().flatten(1).mean(1) / difference.detach().abs().flatten(1).mean(1)


@pytest.mark.parametrize("options", [{}, PULL], ids=["rewards", "both"])
@pytest.mark.parametrize("kind", ["grpo", "grpo_guard"])
def test_a_policy_gradient_round_equals_the_slow_loop(kind, options, backbone, adapters, text, monkeypatch):
    """On policy the ratio is exactly 1, and the gradient is that of -A log p, sample by sample, step by step."""
    perturb(adapters)
    learner = make_learner(kind, backbone, adapters, text, beta=0.3, **options)
    (batch,) = map(pulled, batches_of(backbone, text))
    result, found = kept_gradients(learner, [batch], monkeypatch)
    assert result.metrics["ratio"] == 1.0 and result.metrics["clip_fraction"] == 0.0

    def velocity(adapter, x, sigma):
        with adapters.using(adapter), torch.set_grad_enabled(adapter == STUDENT):
            return backbone.velocity(x, sigma, batch.text)[0]

    states, x = [], batch.noise
    for step, tr in enumerate(learner.transitions):
        x_next = tr.sample(x, velocity(STUDENT, x, tr.sigma).detach(), batch.step_noise(step))
        states.append((x, x_next))
        x = x_next
    rewards = (-x[:, 0].mean(dim=(1, 2)).double()).tolist()
    assert result.metrics["reward/a"] == pytest.approx(np.mean(rewards))
    advantages, total, pulls = advantages_by_hand(rewards), 0.0, []
    for step in range(TRAINED):
        tr, (x, x_next) = learner.transitions[step], states[step]
        v = velocity(STUDENT, x, tr.sigma)
        normal, base = (
            torch.distributions.Normal(tr.a * x + tr.b * u, tr.std) for u in (v, velocity(None, x, tr.sigma))
        )
        if options:
            pulls.append(distillation_by_hand(v, x, tr.sigma, velocity).mean())
            total = total + 0.7 * pulls[-1] / TRAINED
        log_prob = normal.log_prob(x_next)
        kl = torch.distributions.kl_divergence(normal, base)
        for i in range(SIZE):
            scale = tr.std / (tr.sigma - tr.sigma_next) if kind == "grpo_guard" else 1.0
            total = total + (-advantages[i] * scale * log_prob[i].mean() + 0.3 * kl[i].mean()) / (SIZE * TRAINED)
    learner.optimizer.backward(total)
    assert_near(found, gradients(adapters), rel=1e-3, floor=1e-8)
    if options:
        assert result.metrics["distill/a"] == pytest.approx(torch.stack(pulls).mean().item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, PULL], ids=["rewards", "both"])
def test_an_nft_round_equals_the_slow_loop(options, backbone, adapters, text, monkeypatch):
    """The distillation has states of its own, those of the student's trajectory."""
    perturb(adapters)
    learner = make_learner("nft", backbone, adapters, text, beta=0.1, **options)
    perturb(adapters, seed=12)  # the student has moved on from the old policy
    (batch,) = map(pulled, batches_of(backbone, text))
    result, found = kept_gradients(learner, [batch], monkeypatch)

    def velocity(adapter, x, sigma):
        with adapters.using(adapter), torch.set_grad_enabled(adapter == STUDENT):
            return backbone.velocity(x, sigma, batch.text)[0]

    x = batch.noise
    for tr in learner.transitions:
        x = x + tr.b * velocity(OLD, x, tr.sigma)
    advantages = advantages_by_hand((-x[:, 0].mean(dim=(1, 2)).double()).tolist())
    total = 0.0
    for step in range(TRAINED):
        t = learner.transitions[step].sigma
        x_t = (1 - t) * x + t * batch.forward_noise(step)
        v, old, base = (velocity(name, x_t, t) for name in (STUDENT, OLD, None))
        for i in range(SIZE):
            r = min(max(min(max(advantages[i], -5), 5) / 10 + 0.5, 0), 1)

            def error(u, i=i, x_t=x_t, t=t):
                difference = x_t[i] - t * u - x[i]
                return difference.square().mean() / max(difference.detach().abs().mean().item(), 1e-5)

            plus, minus = 0.5 * v[i] + 0.5 * old[i], 1.5 * old[i] - 0.5 * v[i]
            loss = 5 * (r * error(plus) + (1 - r) * error(minus)) / 0.5 + 0.1 * (v[i] - base[i]).square().mean()
            total = total + loss / (SIZE * TRAINED)
    x = batch.noise
    for tr in learner.transitions[:TRAINED] if options else ():
        v = velocity(STUDENT, x, tr.sigma)
        total = total + 0.7 * distillation_by_hand(v, x, tr.sigma, velocity).mean() / TRAINED
        x = (x + tr.b * v).detach()
    learner.optimizer.backward(total)
    assert result.losses.mean == pytest.approx(total.item(), rel=1e-4)
    assert_near(found, gradients(adapters), rel=1e-3, floor=1e-8)


def test_the_old_policy_follows_by_its_schedule(backbone, adapters, text):
    perturb(adapters)
    learner = make_learner("nft", backbone, adapters, text)
    before = [p.clone() for p in adapters.parameters(OLD)]
    perturb(adapters, seed=12)
    learner.finish(3)  # d = min(0.1 * 3, 0.5)
    for old, mine, new in zip(before, adapters.parameters(OLD), adapters.parameters(STUDENT), strict=True):
        torch.testing.assert_close(mine, 0.3 * old + 0.7 * new)


def test_supervised_on_teacher_samples_equals_the_formula(backbone, adapters, text, monkeypatch):
    learner = make_learner("sft", backbone, adapters, text)
    (batch,) = batches_of(backbone, text, watched=True)
    result, _ = kept_gradients(learner, [batch], monkeypatch)
    x = batch.noise
    with torch.no_grad():
        adapters.use("teacher_a")
        for tr in learner.transitions:
            x = x + tr.b * backbone.velocity(x, tr.sigma, batch.text)[0]
        adapters.use(STUDENT)
        for step in range(TRAINED):
            t, eps = learner.transitions[step].sigma, batch.forward_noise(step)
            v = backbone.velocity((1 - t) * x + t * eps, t, batch.text)[0]
            wanted = 0.5 * per_sample_mean((v - (eps - x)).square()).mean()
            assert loss_table(result)[0, step].item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(result.images[0][1], x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nft", "grpo_guard"])
def test_rewards_rise(kind, backbone, adapters, text):
    """From rewards alone, on the same noise: the reward of the last rounds is above that of the first."""
    learner = make_learner(kind, backbone, adapters, text, lr=2e-3)
    batches = batches_of(backbone, text)
    rewards = []
    for completed in range(1, 11):
        rewards.append(learner.round(batches).metrics["reward/a"])
        learner.finish(completed)
    assert rewards[-1] > rewards[0] + 0.01, rewards


def test_several_optimizer_steps_per_round(backbone, adapters, text):
    """Four batches, two per step, two passes: four steps; the first pass's losses are reported."""
    learner = make_learner("grpo", backbone, adapters, text, inner=2, accumulation=2, batches=2, clip_range=1e-8)
    steps = []
    original = learner.optimizer.step
    learner.optimizer.step = lambda: steps.append(original()) or steps[-1]
    result = learner.round(batches_of(backbone, text, tasks="abab"))
    assert len(steps) == 4
    assert result.grad_norm == steps[0]
    assert result.losses.counts[:, :TRAINED].tolist() == [[2 * SIZE] * TRAINED] * 2
    assert 0 < result.metrics["clip_fraction"] <= 1  # later steps are off policy
    assert {"reward/a", "reward/b", "zero_variance/a", "monitor/b/dark"} <= result.metrics.keys()


def test_equal_rewards_teach_nothing(backbone, adapters, text, monkeypatch):
    flat = Darkness(lambda latents: np.ones(len(latents)))
    learner = make_learner("grpo", backbone, adapters, text, flat)
    result, found = kept_gradients(learner, batches_of(backbone, text), monkeypatch)
    assert result.metrics["zero_variance/a"] == 1.0
    assert all(not g.any() for g in found)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", ["nft", "grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "grpo_guard"))]
)
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tiny_config, algorithm):
    options = {"train__algorithm": algorithm, "num_epochs": 2}
    complete = train(tiny_config(run_name="complete", **options))
    train(tiny_config(run_name="cut", **options | {"num_epochs": 1}))
    resumed = train(tiny_config(run_name="cut", resume_from="auto", **options))
    assert any(name.startswith("old.") for name in state(complete)) == (algorithm == "nft")
    assert_bitwise(state(complete), state(resumed))


@pytest.mark.parametrize("algorithm", ["nft", pytest.param("grpo_guard", marks=pytest.mark.slow)])
def test_one_process_equals_two(tiny_config, tmp_path, algorithm):
    """Groups are spread over the processes, and their advantages are those of all images."""
    common = {"train__algorithm": algorithm, "num_epochs": 2, "train__gradient_accumulation_steps": 4}
    common |= {"sample__num_image_per_prompt": 4}
    one = tiny_config(run_name="one", sample__train_batch_size=4, train__batch_size=4, **common)
    two = tiny_config(run_name="two", **common)
    for task in (*one.train.teachers, *two.train.teachers):
        task["proxy_reward"] = {"tiny_scene": 1.0}  # smooth in the pixels, as a file's size is not
    train(one)
    train_forked(two)
    rows = [metrics(tmp_path / "logs" / name) for name in ("one", "two")]
    keep = ("round", "evaluations", "loss/first", "loss/second", "grad_norm", "reward/first", "zero_variance/second")
    assert_equal_rounds(*([{key: row[key] for key in keep} for row in part] for part in rows), rel=2e-3)
    assert rows[0][0].keys() == rows[1][0].keys() and rows[0][0]["evaluations"] > 0


def test_what_comes_out_is_a_teacher(finished_runs, tiny_config):
    config = tiny_config(num_epochs=1)
    lora = finished_runs("nft") / "checkpoints" / "checkpoint-3" / "lora"
    config.train.teachers = [{**config.train.teachers[0], "lora_path": str(lora)}]
    assert train(config) is not None


@pytest.mark.parametrize(
    ("order", "visited"),
    [
        ("alternate", "first second first"),
        pytest.param("cascade", "first first second", marks=pytest.mark.slow),
    ],
)
def test_tasks_in_turn_and_one_after_another(tiny_config, tmp_path, order, visited):
    train(tiny_config(train__algorithm="nft", train__task_order=order, num_epochs=3))
    rows = metrics(tmp_path / "logs" / "run")
    assert [key.removeprefix("reward/") for row in rows for key in row if key.startswith("reward/")] == visited.split()


def test_a_distillation_beside_rewards_is_counted(tiny_config, tmp_path):
    """Forward passes announced before the run are those that the transformer then does."""
    for algorithm in ("nft", "grpo"):
        name, options = f"{algorithm}-pulled", {"train__algorithm": algorithm, "train__distill_weight": 0.5}
        config = tiny_config(run_name=name, num_epochs=1, train__num_inner_epochs=2, **options)
        config.train.teachers[1]["strength"] = 1.5
        nfe = check(config, 1).nfe_per_round
        train(config)
        (row,) = metrics(tmp_path / "logs" / name)
        assert row["evaluations"] == nfe.student + nfe.teacher + nfe.sampling + nfe.base, name
        assert row["distill/first"] > 0 and row["distill/second"] > 0


def test_a_distillation_beside_rewards_needs_teachers(tiny_config):
    config = tiny_config(train__algorithm="nft", train__distill_weight=0.5)
    config.train.teachers[0]["lora_path"] = ""
    with pytest.raises(ConfigError) as caught:
        check(config, 1)
    (problem,) = caught.value.problems
    assert problem.startswith("train.teachers[0].lora_path ")
    config.train.distill_weight = 0.0
    config.train.target = "velocity"
    plan = check(config, 1)
    assert not plan.teachers and any("train.target" in note for note in plan.notes)


def test_a_failing_reward_stops_the_training(finished, monkeypatch):
    folder, config = finished("nft", num_epochs=4)

    where = Path(config.train.teachers[0]["dataset"], "train.txt")
    lines = where.read_text().splitlines()
    for error, changed in (
        (lambda prompt: UnfitPromptError("is odd", prompt), True),
        (lambda prompt: KeyError(prompt), True),
        (lambda prompt: RewardUnavailableError("is odd"), False),
    ):
        seen = []

        def fail(self, images, prompts, metadata, error=error, seen=seen):
            seen.append(prompts[0])
            raise error(prompts[0])

        monkeypatch.setattr(JpegCompressibility, "score", fail)
        config.reward_timeout = 1.0  # an unavailable one is asked again
        with pytest.raises(RewardError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(config)
        place = f"{where}, line {lines.index(seen[0]) + 1}: "
        for fact in ("'first'", "resume_from=auto"):
            assert fact in str(caught.value)
        for fact in (place, "--allow_config_change"):  # the same prompt would fail again
            assert (fact in str(caught.value)) == changed
        assert checkpoint.find_latest(folder / "checkpoints").name == "checkpoint-3"


# --- configurations ---------------------------------------------------------------------------------------------------


def test_the_upstream_keys_of_a_single_task(tiny_config):
    config = tiny_config(train__algorithm="nft")
    config.dataset, config.prompt_fn = config.train.teachers[0]["dataset"], "general_ocr"
    config.reward_fn = {"jpeg_compressibility": 1.0}
    config.train.teachers = []
    (task,) = check(config, 1).tasks
    assert (task.name, task.proxy_reward, task.lora_path) == ("first", {"jpeg_compressibility": 1.0}, "")


def test_what_cannot_be_trained_is_said_before_weights_load(tiny_config):
    for algorithm, key, value, facts in (
        ("grpo", "sample__noise_level", 0.0, ("train.algorithm", "'grpo'", "noise")),
        ("nft", "sample__num_image_per_prompt", 1, ("sample.num_image_per_prompt", "1")),
        ("nft", "train__gradient_accumulation_steps", 3, ("train.gradient_accumulation_steps", "3", "4")),
        ("nft", "train__nft_beta", 0.0, ("train.nft_beta", "0.0")),
        ("nft", "train__old_policy_decay", (1, 2), ("train.old_policy_decay", "(1, 2)")),
        ("nft", "train__task_order", "random", ("train.task_order", "'random'", "cascade")),
        ("nft", "train__teachers", [], ("train.teachers",)),
        ("ppo", "num_epochs", 1, ("train.algorithm", "'ppo'", "nft")),
    ):
        with pytest.raises(ConfigError) as caught:
            check(tiny_config(**{"train__algorithm": algorithm, key: value}), 1)
        (problem,) = caught.value.problems
        assert [fact for fact in facts if fact not in problem] == [], problem


def test_prompts_that_rewards_cannot_score_are_said_before_weights_load(tiny_config):
    off = {"monitor_freq": 0, "eval_freq": 0}
    for changes, wanted in (
        ({**off, "train__algorithm": "nft"}, {"train": 7}),
        ({"train__algorithm": "nft", "eval_freq": 1, "eval_num_prompts": 2}, {"train": 7, "test": 2}),
        ({**off, "monitor_freq": 1}, {"train": 7}),
        ({**off, "eval_freq": 1}, {"test": 3}),
        (off, {}),
    ):
        config = tiny_config(**changes)
        first, second = config.train.teachers
        config.train.teachers = [first, {**second, "proxy_reward": {"jpeg_compressibility": 1.0, "ocr": 0.5}}]
        found = {}
        try:
            check(config, 1)
        except ConfigError as error:
            for problem in error.problems:
                assert problem.startswith("train.teachers[1].dataset ")
                found |= Counter(re.findall(r"(\w+)\.txt, line \d+: ", problem))
        assert found == wanted, changes


def test_rounds_of_a_task_are_those_that_visit_it(tiny_config):
    for order in ("together", "alternate", "cascade"):
        for rounds in (1, 5, 6):
            shape = check(tiny_config(train__algorithm="nft", train__task_order=order, num_epochs=rounds), 1).shape
            for task in (0, 1):
                for start in range(rounds + 1):
                    slow = [r for r in range(start, rounds) if task in shape.tasks_of(r)]
                    assert list(shape.rounds_of(task, start)) == slow, (order, rounds, task, start)
