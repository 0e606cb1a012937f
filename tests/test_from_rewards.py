"""Training from rewards, and on teachers' samples: rounds against slow loops, whole runs against each other."""

from __future__ import annotations

import dataclasses
import re
import shutil
import warnings
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusionopd.algorithms import ALGORITHMS
from diffusionopd.algorithms.nft import OLD
from diffusionopd.config_schema import ConfigError
from diffusionopd.models.policies import STUDENT
from diffusionopd.rewards import NOT_APPLICABLE, RewardError, RewardUnavailableError, UnfitPromptError
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
    make_batches,
    make_learner,
    metrics,
    perturb,
    state,
    train_forked,
    with_rows,
)

TRAINED, SIZE, GROUP, CLIP = 3, 4, 2, 2e-5
SAMPLE_FIRST = [name for name in ALGORITHMS if name != "opd"]


def batches_of(backbone, text, tasks="a", **options):
    return make_batches(backbone, text, size=SIZE, tasks=tasks, steps=range(TRAINED), **options)


# --- one round --------------------------------------------------------------------------------------------------------


def advantages_by_hand(rewards, global_std=False, per_prompt_stat_tracking=True, adv_clip_max=5.0):
    out, size = [], GROUP if per_prompt_stat_tracking else len(rewards)
    for i, reward in enumerate(rewards):
        group = [rewards[j] for j in range(len(rewards)) if j // size == i // size]
        out.append((reward - np.mean(group)) / (np.std(rewards if global_std else group) + 1e-4))
    return torch.tensor(out).clamp(-adv_clip_max, adv_clip_max)


def loss_by_hand(kind, tr, state, x0, eps, advantage, velocity, clip=5.0):
    """The published loss of each sample at a step, its ratio and whether that is clipped; `eps` is the forward
    process's."""
    x, x_next, v_old = state
    if kind in ("nft", "sft"):
        x = (1 - tr.sigma) * x0 + tr.sigma * eps
    v = velocity(STUDENT, x)
    if kind == "sft":
        return 0.5 * per_sample_mean((v - (eps - x0)).square()), None, None
    v_base = velocity(None, x)
    if kind == "nft":
        v_old, r = velocity(OLD, x), advantage / clip / 2 + 0.5

        def error(u):
            difference = x - tr.sigma * u - x0
            return per_sample_mean(difference.square()) / per_sample_mean(difference.detach().abs())

        plus, minus = 0.5 * v + 0.5 * v_old, 1.5 * v_old - 0.5 * v
        loss = clip * (r * error(plus) + (1 - r) * error(minus)) / 0.5
        return loss + 0.2 * per_sample_mean((v - v_base).square()), None, None
    new, old, base = (Normal(tr.a * x + tr.b * u, tr.std) for u in (v, v_old, v_base))
    log_ratio = per_sample_mean(new.log_prob(x_next) - old.log_prob(x_next))
    low, high, length = CLIP, CLIP, 1.0
    if kind == "grpo_guard":
        log_ratio = log_ratio * tr.std + per_sample_mean((new.mean - old.mean).square()) / (2 * tr.std)
        high, length = 2 * CLIP, tr.sigma - tr.sigma_next
    q = log_ratio.exp()
    loss = torch.maximum(-advantage * q, -advantage * q.clamp(1 - low, 1 + high)) / length
    return loss + 0.2 * per_sample_mean(kl_divergence(new, base)), q, (q < 1 - low) | (q > 1 + high)


def pull_by_hand(x, velocity):
    """The distillation's loss of each sample, towards 1.5 times the way from the base to the teacher."""
    v_base, v_teacher = velocity(None, x), velocity("teacher_a", x)
    difference = velocity(STUDENT, x) - (v_base + 1.5 * (v_teacher - v_base))
    return 0.5 * per_sample_mean(difference.square()) / per_sample_mean(difference.detach().abs())


@pytest.mark.parametrize(
    ("kind", "pull", "own"),
    [
        *((kind, 0.0, {}) for kind in SAMPLE_FIRST),
        *((kind, 0.7, {}) for kind in ("nft", "grpo", "grpo_guard")),
        ("nft", 0.0, {"global_std": True}),
        ("grpo", 0.0, {"adv_clip_max": 0.3}),
        ("nft", 0.0, {"per_prompt_stat_tracking": False}),
    ],
)
def test_every_step_of_a_round_has_the_gradient_of_the_slow_loop(kind, pull, own, backbone, adapters, text):
    """An optimizer step for each group of images, and that twice, so that all but the first are off policy.

    The distillation is at the states of the trajectory, for NFT at those of the student's as it is then.
    """
    perturb(adapters)
    options = {} if kind == "sft" else {"beta": 0.2, "distill_weight": pull, **own}
    options |= {"target": "velocity", "self_normalize": True} if pull else {}
    options |= {"grpo": {"clip_range": CLIP}, "grpo_guard": {"clip_range_lt": CLIP, "clip_range_gt": 2 * CLIP}}.get(
        kind, {}
    )
    learner = make_learner(kind, backbone, adapters, text, inner=2, accumulation=1, **options)
    perturb(adapters, seed=12)  # the student has moved on from NFT's old policy
    batches = with_rows(
        batches_of(backbone, text, "a" if pull else "ab", watched=True), teacher="teacher_a", weight=3.0
    )
    batches = with_rows(batches, strength=1.5) if pull else batches
    seen, step, trained = [], learner.optimizer.step, adapters.parameters(STUDENT)
    learner.optimizer.step = lambda: seen.append(([p.detach().clone() for p in trained], gradients(adapters))) or step()
    result = learner.round(batches)

    def velocity(batch, sigma, adapter, x):
        with adapters.using(adapter), torch.set_grad_enabled(adapter == STUDENT):
            return backbone.velocity(x.float(), sigma, batch.text)[0].double()

    def walk(batch, policy):
        x = batch.noise.double()
        for n, tr in enumerate(learner.transitions):
            v = velocity(batch, tr.sigma, policy, x).detach()
            x_next = tr.a * x + tr.b * v + tr.std * batch.step_noise(n)
            yield x, x_next, v
            x = x_next

    clip = own.get("adv_clip_max", 5.0)
    walks, losses, pulls, ratios, beyond = [], [], [], [], []
    for number, (weights, found) in enumerate(seen):
        with torch.no_grad():
            for p, value in zip(trained, weights, strict=True):
                p.copy_(value)
        walks = walks or [list(walk(b, {"nft": OLD, "sft": "teacher_a"}.get(kind, STUDENT))) for b in batches]
        batch, states = batches[number % len(batches)], walks[number % len(batches)]
        pulled, x0, total = (list(walk(batch, STUDENT)) if kind == "nft" and pull else states), states[-1][1], 0.0
        advantages = advantages_by_hand((-x0[:, 0].mean(dim=(1, 2))).tolist(), **own)
        for n, tr in enumerate(learner.transitions[:TRAINED]):
            at = partial(velocity, batch, tr.sigma)
            loss, ratio, outside = loss_by_hand(kind, tr, states[n], x0, batch.forward_noise(n), advantages, at, clip)
            ratios.append(ratio)
            beyond.append(outside)
            if pull:
                pulls.append(pull_by_hand(pulled[n][0], at).mean())
                loss = loss + pull * pulls[-1]
            total = total + loss.mean() / TRAINED
        learner.optimizer.backward(3.0 * total)
        assert_near(found, gradients(adapters), rel=1e-4)
        learner.optimizer.discard()
        losses.append(total.item())
    assert len(seen) == 2 * len(batches)
    assert list(result.losses.means().values()) == pytest.approx(losses[: len(batches)], rel=1e-4, abs=1e-7)
    assert result.grad_norm * 1e4 == pytest.approx(torch.nn.utils.get_total_norm(seen[0][1]).item(), rel=1e-5)
    for (_, latents), states in zip(result.images, walks, strict=True):
        torch.testing.assert_close(latents.double(), states[-1][1], rtol=1e-5, atol=1e-5)
    if pull:
        assert result.metrics["distill/a"] == pytest.approx(torch.stack(pulls[:TRAINED]).mean().item(), rel=1e-4)
    if "grpo" in kind:
        assert not torch.stack(beyond[:TRAINED]).any()
        assert result.metrics["clip_fraction"] == pytest.approx(torch.stack(beyond).double().mean().item())
        assert result.metrics["ratio"] == pytest.approx(torch.stack(ratios).mean().item(), abs=1e-6)
        assert abs(result.metrics["ratio"] - 1) < 1e-3
        assert 0 < result.metrics["clip_fraction"] < 1 - 1 / len(seen)
    if kind != "sft":
        rewards = -walks[0][-1][1][:, 0].mean()
        assert result.metrics["reward/a"] == pytest.approx(rewards.item(), rel=1e-5)


def test_the_old_policy_follows_by_its_schedule(backbone, adapters, text):
    perturb(adapters)
    learner = make_learner("nft", backbone, adapters, text)
    before = [p.clone() for p in adapters.parameters(OLD)]
    perturb(adapters, seed=12)
    learner.finish(3)  # d = min(0.1 * 3, 0.5)
    for old, mine, new in zip(before, adapters.parameters(OLD), adapters.parameters(STUDENT), strict=True):
        torch.testing.assert_close(mine, 0.3 * old + 0.7 * new)


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


def test_equal_rewards_teach_nothing(backbone, adapters, text, monkeypatch):
    flat = Darkness(lambda latents: np.ones(len(latents)))
    learner = make_learner("grpo", backbone, adapters, text, flat)
    result, found = kept_gradients(learner, batches_of(backbone, text), monkeypatch)
    assert result.metrics["zero_variance/a"] == 1.0
    assert all(not g.any() for g in found)
    partly = Darkness(lambda latents: np.array([0.5] * (len(latents) - 1) + [NOT_APPLICABLE]))
    result, _ = kept_gradients(
        make_learner("grpo", backbone, adapters, text, partly), batches_of(backbone, text), monkeypatch
    )
    assert result.metrics["reward/a"] == result.metrics["monitor/a/dark"] == 0.5, "what does not apply is in no mean"


def test_a_full_memory_is_no_prompts_fault(backbone, adapters, text):
    """In decoding, and in a scorer, whose errors are named after it."""

    def full(latents):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def failing(latents):
        try:
            full(latents)
        except torch.OutOfMemoryError as error:
            raise RewardError("reward 'dark' failed") from error

    learner = make_learner("nft", backbone, adapters, text, Darkness(failing))
    for decode in (backbone.decode, full):
        backbone.decode = decode
        with pytest.raises(torch.OutOfMemoryError):
            learner.round(batches_of(backbone, text))


def test_states_are_kept_where_they_are_trained(backbone, adapters, text):
    learner, seen, kept = make_learner("grpo", backbone, adapters, text), [], []
    walk, step = learner.trajectory, learner.optimizer.step

    def noted(*given):
        for visit in walk(*given):
            seen.append(weakref.ref(visit))
            yield visit

    learner.trajectory = noted
    learner.optimizer.step = lambda: kept.extend(ref().step for ref in seen if ref()) or step()
    learner.round(make_batches(backbone, text, size=SIZE, tasks="ab", steps=(1,)))
    assert len(seen) == 2 * 4 and kept == [1, 1]


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", ["nft", "grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "grpo_guard"))]
)
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tiny_config, algorithm):
    options = {"train__algorithm": algorithm, "num_epochs": 2, "save_freq": 1, "train__lr_scheduler": "cosine"}
    options |= {"train__gradient_accumulation_steps": 1} if algorithm != "sft" else {}  # four optimizer steps a round
    complete = train(tiny_config(run_name="complete", **options))
    cut = shutil.copytree(complete.parent.parent, complete.parent.parent.with_name("cut"))
    shutil.rmtree(cut / "checkpoints" / "checkpoint-2")
    resumed = train(tiny_config(run_name="cut", resume_from="auto", **options))
    assert metrics(cut)[-1]["lr"] == metrics(complete.parent.parent)[-1]["lr"] < metrics(cut)[0]["lr"]
    assert any(name.startswith("old.") for name in state(complete)) == (algorithm == "nft")
    assert_bitwise(state(complete), state(resumed))


@pytest.mark.parametrize("algorithm", ["nft", pytest.param("grpo_guard", marks=pytest.mark.slow)])
def test_one_process_equals_two(tiny_config, tmp_path, algorithm, pattern):
    """Groups are spread over the processes, and their advantages are those of all images."""
    common = {"train__algorithm": algorithm, "num_epochs": 2, "train__gradient_accumulation_steps": 4}
    common |= {"sample__num_image_per_prompt": 4}
    one = tiny_config(run_name="one", sample__train_batch_size=4, train__batch_size=4, **common)
    two = tiny_config(run_name="two", **common)
    for task in (*one.train.teachers, *two.train.teachers):
        task["proxy_reward"] = {pattern: 1.0}  # smooth in the pixels, as a file's size is not, and without near-ties
    train(one)
    train_forked(two)
    rows = [metrics(tmp_path / "logs" / name) for name in ("one", "two")]
    keep = ["round", "evaluations", "grad_norm", "reward/first", "zero_variance/second"]
    keep += (
        ["loss/first", "loss/second"] if algorithm == "nft" else []
    )  # GRPO's is a mean of advantages: 0, but rounded
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


def test_every_task_is_watched_in_turn(tiny_config):
    """At the start, every so many rounds, and at the end."""
    plan = check(tiny_config(train__task_order="alternate", num_epochs=43, monitor_freq=10, sample_freq=10), 1)
    for tasks in range(2, 6):
        own = dataclasses.replace(plan, shape=dataclasses.replace(plan.shape, num_tasks=tasks))
        for wants in (own.wants_scores, own.wants_grid):
            watched = {n for n in range(1, 44) if wants(n)}
            rows = [range(first, first + tasks) for first in (1, 10, 20, 30, 44 - tasks)]
            assert watched == {n for row in rows for n in row} | {n for n in range(40, 40 + tasks) if n <= 43}
            for row in rows:
                assert {task for n in row for task in own.shape.tasks_of(n - 1)} == set(range(tasks))


def test_rounds_of_a_task_are_those_that_visit_it(tiny_config):
    for order in ("together", "alternate", "cascade"):
        for rounds in (1, 5, 6):
            shape = check(tiny_config(train__algorithm="nft", train__task_order=order, num_epochs=rounds), 1).shape
            for task in (0, 1):
                for start in range(rounds + 1):
                    slow = [r for r in range(start, rounds) if task in shape.tasks_of(r)]
                    assert list(shape.rounds_of(task, start)) == slow, (order, rounds, task, start)
