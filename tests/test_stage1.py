"""Training without on-policy distillation: rounds against slow references, whole runs against each other."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionopd.algorithms import Grpo, Nft, RewardRecipe, Supervised
from diffusionopd.algorithms.base import STUDENT, Parts
from diffusionopd.algorithms.nft import OLD
from diffusionopd.algorithms.optim import StudentOptimizer
from diffusionopd.config_schema import ConfigError, check
from diffusionopd.data.batches import Batch
from diffusionopd.data.noise import noise
from diffusionopd.rewards import REGISTRY, RewardError
from diffusionopd.training import checkpoint, train
from diffusionopd.transitions import per_sample_mean, schedule

from .test_trainer import assert_bitwise, launch, metrics, student

STEPS, TRAINED, SIZE, GROUP = 4, 3, 4, 2
ALGORITHMS = ("nft", "grpo", "grpo_guard", "sft")


def perturb(adapters, name=STUDENT, std=0.02, seed=11):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters.parameters(name):
            p.add_(torch.randn(p.shape, generator=generator) * std)


def make_batches(backbone, text, tasks="a", watched=False):
    shape = backbone.latent_shape(64)

    def batch(i, task):
        return Batch(
            task=task,
            teacher="teacher_a",
            teacher_guidance=1.0,
            x=noise(shape, [(i, s) for s in range(SIZE)]),
            text=text(SIZE, i),
            draw_noise=lambda step: noise(shape, [(i, s, step) for s in range(SIZE)]),
            draw_forward_noise=lambda step: noise(shape, [(i, s, step, 1) for s in range(SIZE)]),
            wants_picture=watched,
            samples=range(SIZE),
            groups=[s // GROUP for s in range(SIZE)],
        )

    return [batch(i, task) for i, task in enumerate(tasks)]


def darkness(batch, latents):
    """A reward of the latents themselves: minus the mean of the first channel."""
    future: Future = Future()
    values = -latents[:, 0].mean(dim=(1, 2)).double().cpu().numpy()
    future.set_result({"dark": values, "avg": values})
    return future


def recipe(backbone, kernel="ode", noise_level=0.0, **changes):
    transitions = schedule(kernel, backbone.sigmas(STEPS, 64), noise_level)
    return RewardRecipe(transitions, TRAINED, images_per_task=SIZE, images_per_prompt=GROUP, **changes)


def make(kind, backbone, adapters, text, score=darkness, lr=1e-3, **changes):
    optimizer = StudentOptimizer(adapters.parameters(STUDENT), lr=lr)
    parts = Parts(backbone, adapters, optimizer, text(1, 99))
    if kind == "nft":
        return Nft(parts, recipe(backbone, **changes), score, beta=0.5, decay=(0, 0.1, 0.5))
    given = recipe(backbone, "flow_sde", 0.7, **changes)
    return Grpo(parts, given, score, clip_low=1e-3, clip_high=2e-3, guard=kind == "grpo_guard")


def gradients(learner):
    return [p.grad.clone() for p in learner.optimizer.parameters if p.grad is not None]


def kept_gradients(learner, batches, monkeypatch):
    """The gradients of a round, its optimizer step left out."""
    monkeypatch.setattr(learner.optimizer, "step", lambda: 0.0)
    result = learner.round(batches)
    found = gradients(learner)
    learner.optimizer.discard()
    return result, found


# ---- one round -------------------------------------------------------------------------------------------------------


def advantages_by_hand(rewards):
    out = []
    for i, reward in enumerate(rewards):
        group = [rewards[j] for j in range(len(rewards)) if j // GROUP == i // GROUP]
        out.append((reward - np.mean(group)) / (np.std(group) + 1e-4))
    return out


@pytest.mark.parametrize("kind", ["grpo", "grpo_guard"])
def test_a_policy_gradient_round_equals_the_slow_loop(kind, backbone, adapters, text, monkeypatch):
    """On policy the ratio is exactly 1, and the gradient is that of -A log p, sample by sample, step by step."""
    perturb(adapters)
    learner = make(kind, backbone, adapters, text)
    (batch,) = make_batches(backbone, text)
    result, found = kept_gradients(learner, [batch], monkeypatch)
    assert result.metrics["ratio"] == 1.0 and result.metrics["clip_fraction"] == 0.0
    adapters.use(STUDENT)
    states, x = [], batch.x
    with torch.no_grad():
        for step, tr in enumerate(learner.transitions):
            v = backbone.velocity(x, tr.sigma, batch.text)[0]
            x_next = tr.sample(x, v, batch.draw_noise(step))
            states.append((x, x_next))
            x = x_next
    rewards = (-x[:, 0].mean(dim=(1, 2)).double()).tolist()
    assert result.metrics["reward/a"] == pytest.approx(np.mean(rewards))
    advantages = advantages_by_hand(rewards)
    for step in range(TRAINED):
        tr, (x, x_next) = learner.transitions[step], states[step]
        v = backbone.velocity(x, tr.sigma, batch.text)[0]
        normal = torch.distributions.Normal(tr.a * x + tr.b * v, tr.std)
        for i in range(SIZE):
            scale = tr.std / (tr.sigma - tr.sigma_next) if kind == "grpo_guard" else 1.0
            part = -advantages[i] * scale * normal.log_prob(x_next)[i].mean() / (SIZE * TRAINED)
            part.backward(retain_graph=True)
    expected = gradients(learner)
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() <= 1e-3 * other.norm() + 1e-12


def test_an_nft_round_equals_the_slow_loop(backbone, adapters, text, monkeypatch):
    perturb(adapters)
    learner = make("nft", backbone, adapters, text, reference_weight=0.1)
    perturb(adapters, seed=12)  # the student has moved on from the old policy
    (batch,) = make_batches(backbone, text)
    result, found = kept_gradients(learner, [batch], monkeypatch)

    def velocity(adapter, x, sigma):
        with adapters.using(adapter), torch.set_grad_enabled(adapter == STUDENT):
            return backbone.velocity(x, sigma, batch.text)[0]

    x = batch.x
    for tr in learner.transitions:
        x = x + tr.b * velocity(OLD, x, tr.sigma)
    advantages = advantages_by_hand((-x[:, 0].mean(dim=(1, 2)).double()).tolist())
    total = 0.0
    for step in range(TRAINED):
        t = learner.transitions[step].sigma
        x_t = (1 - t) * x + t * batch.draw_forward_noise(step)
        v, old, base = (velocity(name, x_t, t) for name in (STUDENT, OLD, None))
        for i in range(SIZE):
            r = min(max(min(max(advantages[i], -5), 5) / 10 + 0.5, 0), 1)

            def error(u, i=i, x_t=x_t, t=t):
                difference = x_t[i] - t * u - x[i]
                return difference.square().mean() / max(difference.detach().abs().mean().item(), 1e-5)

            plus, minus = 0.5 * v[i] + 0.5 * old[i], 1.5 * old[i] - 0.5 * v[i]
            loss = 5 * (r * error(plus) + (1 - r) * error(minus)) / 0.5 + 0.1 * (v[i] - base[i]).square().mean()
            total = total + loss / (SIZE * TRAINED)
    total.backward()
    assert result.losses.mean().item() == pytest.approx(total.item(), rel=1e-4)
    for mine, other in zip(found, gradients(learner), strict=True):
        assert (mine - other).norm() <= 1e-3 * other.norm() + 1e-12


def test_the_old_policy_follows_by_its_schedule(backbone, adapters, text):
    perturb(adapters)
    learner = make("nft", backbone, adapters, text)
    before = [p.clone() for p in adapters.parameters(OLD)]
    perturb(adapters, seed=12)
    learner.finish(3)  # d = min(0.1 * 3, 0.5)
    for old, mine, new in zip(before, adapters.parameters(OLD), adapters.parameters(STUDENT), strict=True):
        torch.testing.assert_close(mine, 0.3 * old + 0.7 * new)


def test_supervised_on_teacher_samples_equals_the_formula(backbone, adapters, text, monkeypatch):
    optimizer = StudentOptimizer(adapters.parameters(STUDENT), lr=1e-3)
    transitions = schedule("ode", backbone.sigmas(STEPS, 64))
    learner = Supervised(Parts(backbone, adapters, optimizer, text(1, 99)), transitions, TRAINED)
    (batch,) = make_batches(backbone, text, watched=True)
    result, _ = kept_gradients(learner, [batch], monkeypatch)
    x = batch.x
    with torch.no_grad():
        adapters.use("teacher_a")
        for tr in transitions:
            x = x + tr.b * backbone.velocity(x, tr.sigma, batch.text)[0]
        adapters.use(STUDENT)
        for step in range(TRAINED):
            t, eps = transitions[step].sigma, batch.draw_forward_noise(step)
            v = backbone.velocity((1 - t) * x + t * eps, t, batch.text)[0]
            wanted = 0.5 * per_sample_mean((v - (eps - x)).square()).mean()
            assert result.losses[0, step].item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(result.pictures[0][1], x)


@pytest.mark.parametrize(("kind", "lr"), [("nft", 2e-3), ("grpo_guard", 2e-3)])
def test_rewards_rise(kind, lr, backbone, adapters, text):
    """From rewards alone, on the same noise: the reward of the last rounds is above that of the first."""
    learner = make(kind, backbone, adapters, text, lr=lr)
    batches = make_batches(backbone, text)
    rewards = []
    for completed in range(1, 11):
        rewards.append(learner.round(batches).metrics["reward/a"])
        learner.finish(completed)
    assert rewards[-1] > rewards[0] + 0.01, rewards


def test_several_optimizer_steps_a_round(backbone, adapters, text):
    """Four batches, two a step, two passes: four steps; the first pass's losses are reported."""
    learner = make("grpo", backbone, adapters, text, accumulation=2, inner_epochs=2)
    learner.clip_low = learner.clip_high = 1e-8
    steps = []
    original = learner.optimizer.step
    learner.optimizer.step = lambda: steps.append(original()) or steps[-1]
    result = learner.round(make_batches(backbone, text, tasks="abab"))
    assert len(steps) == 4
    assert result.grad_norm == steps[0] and result.losses.shape == (4, TRAINED)
    assert 0 < result.metrics["clip_fraction"] <= 1  # later steps are off policy
    assert {"reward/a", "reward/b", "zero_variance/a", "monitor/b/dark"} <= result.metrics.keys()


def test_equal_rewards_teach_nothing(backbone, adapters, text, monkeypatch):
    def flat(batch, latents):
        future: Future = Future()
        future.set_result({"flat": np.ones(SIZE), "avg": np.ones(SIZE)})
        return future

    result, found = kept_gradients(
        make("grpo", backbone, adapters, text, score=flat), make_batches(backbone, text), monkeypatch
    )
    assert result.metrics["zero_variance/a"] == 1.0
    assert all(not g.any() for g in found)


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage1_config(tiny_config):
    """`stage1_config(algorithm, ...)`: the two tasks of `tiny_config`, four pictures each, two a prompt."""

    def make(algorithm, **changes):
        noisy = {"sample__noise_level": 0.7} if algorithm.startswith("grpo") else {}
        settings = {"sample__num_image_per_prompt": 2, "sample__num_batches_per_epoch": 4, **noisy, **changes}
        return tiny_config(train__algorithm=algorithm, **{"train__gradient_accumulation_steps": 2, **settings})

    return make


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(stage1_config, algorithm):
    whole = train(stage1_config(algorithm, run_name="whole", num_epochs=3))
    train(stage1_config(algorithm, run_name="cut", num_epochs=2))
    resumed = train(stage1_config(algorithm, run_name="cut", num_epochs=3, resume_from="auto"))
    assert_bitwise(student(whole), student(resumed))
    (whole_state, _), (resumed_state, _) = (checkpoint.load_state(path / "state") for path in (whole, resumed))
    assert any(name.startswith("old.") for name in whole_state) == (algorithm == "nft")
    assert_bitwise(whole_state, resumed_state)


@pytest.mark.parametrize("algorithm", ["nft", "grpo_guard"])
def test_one_process_equals_two(stage1_config, tmp_path, algorithm):
    """Groups are spread over the processes, and their advantages are those of the whole."""
    common = {"num_epochs": 3, "train__gradient_accumulation_steps": 4}
    one = stage1_config(algorithm, run_name="one", sample__train_batch_size=4, train__batch_size=4, **common)
    config = stage1_config(algorithm, run_name="two", **common)
    for task in (*one.train.teachers, *config.train.teachers):
        task["proxy_reward"] = {"tiny_scene": 1.0}  # smooth in the pixels, as a file's size is not
    train(one)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    script = tmp_path / "run.py"
    script.write_text(
        "import json\nfrom ml_collections import ConfigDict\nfrom diffusionopd.training import train\n"
        f"train(ConfigDict(json.load(open({str(tmp_path / 'config.json')!r}))))\n"
    )
    launch(script)
    rows = [metrics(tmp_path / "logs" / name) for name in ("one", "two")]
    assert len(rows[0]) == 3
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert a["evaluations"] == b["evaluations"] > 0
        for key in ("loss/first", "loss/second", "grad_norm", "reward/first", "zero_variance/second"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-9), (a["round"], key)


def test_what_comes_out_is_a_teacher(stage1_config, tiny_config, tmp_path):
    taught = train(stage1_config("nft", run_name="teacher", num_epochs=2))
    config = tiny_config(run_name="student", num_epochs=1)
    config.train.teachers = [{**config.train.teachers[0], "lora_path": str(taught / "lora")}]
    assert train(config) is not None


@pytest.mark.parametrize(("order", "visited"), [("alternate", "first second first"), ("cascade", "first first second")])
def test_tasks_in_turn_and_one_after_another(stage1_config, tmp_path, order, visited):
    train(stage1_config("nft", train__task_order=order, num_epochs=3))
    rows = metrics(tmp_path / "logs" / "run")
    assert [key.removeprefix("reward/") for row in rows for key in row if key.startswith("reward/")] == visited.split()


def test_the_counts_of_the_plan_are_what_runs(stage1_config, tiny_config, tmp_path):
    """Evaluations announced before the run are those that the transformer then does."""
    for algorithm in ("opd", *ALGORITHMS):
        if algorithm == "opd":
            config = tiny_config(run_name="opd", num_epochs=1)
        else:
            config = stage1_config(algorithm, run_name=algorithm, num_epochs=1, train__beta=0.1)
        plan = check(config, 1, REGISTRY)
        announced = (
            plan.student_evaluations + plan.teacher_evaluations + plan.sampling_evaluations + plan.base_evaluations
        )
        train(config)
        assert metrics(tmp_path / "logs" / algorithm)[0]["evaluations"] == announced, algorithm


def test_a_failing_reward_stops_the_training(stage1_config, monkeypatch, tmp_path):
    from diffusionopd.rewards.jpeg import JpegCompressibility

    first = train(stage1_config("nft", num_epochs=1))
    monkeypatch.setattr(JpegCompressibility, "score", lambda *a: (_ for _ in ()).throw(RewardError("no more")))
    with pytest.raises(RewardError, match="no more"):
        train(stage1_config("nft", num_epochs=2, resume_from="auto"))
    assert checkpoint.find_latest(tmp_path / "logs" / "run" / "checkpoints") == first


# ---- configurations --------------------------------------------------------------------------------------------------


def test_the_upstream_keys_of_a_single_task(tiny_config, tmp_path):
    config = tiny_config(train__algorithm="nft", sample__num_image_per_prompt=2)
    config.dataset, config.prompt_fn = str(tmp_path / "dataset" / "first"), "general_ocr"
    config.reward_fn = {"jpeg_compressibility": 1.0}
    config.train.teachers = []
    (task,) = check(config, 1, REGISTRY).teachers
    assert (task.name, task.proxy_reward, task.lora_path) == ("first", {"jpeg_compressibility": 1.0}, "")


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("grpo", {"sample__noise_level": 0.0}, "train.algorithm is 'grpo', which needs a sampler with noise"),
        ("nft", {"sample__num_image_per_prompt": 1}, "sample.num_image_per_prompt is 1"),
        ("nft", {"train__gradient_accumulation_steps": 3}, "does not divide the 4 backward batches"),
        ("nft", {"train__nft_beta": 0.0}, "train.nft_beta is 0.0"),
        ("ppo", {}, "train.algorithm is 'ppo'"),
        ("nft", {"train__task_order": "random"}, "train.task_order is 'random'"),
    ],
)
def test_what_cannot_be_trained_is_said_before_weights_load(stage1_config, algorithm, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(stage1_config(algorithm, **changes), 1, REGISTRY)


def test_rounds_of_a_task_are_those_that_visit_it(stage1_config):
    for order in ("together", "alternate", "cascade"):
        for rounds in (1, 5, 6):
            plan = check(stage1_config("nft", train__task_order=order, num_epochs=rounds), 1, REGISTRY)
            for task in (0, 1):
                for start in range(rounds + 1):
                    slow = [r for r in range(start, rounds) if task in plan.tasks_of(r)]
                    assert list(plan.rounds_of(task, start)) == slow, (order, rounds, task, start)


def test_saved_teachers_are_listed(tmp_path: Path):
    """Every configuration of config/teacher.py names what it trains."""
    from diffusionopd.config_schema import load_config

    config = load_config("config/teacher.py:tiny_scene")
    assert config.train.algorithm in ALGORITHMS
