"""The shipped configurations: every one passes the checks, with the published arithmetic."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path

import pytest

from diffusionopd.data.batches import step_chances
from diffusionopd.rewards.composite import check_weights
from diffusionopd.training import check, load_config
from diffusionopd.training.describe import describe

from .conftest import ROOT

OPD, TINY, TEACHER = (ROOT / "config" / f"{name}.py" for name in ("opd", "tiny", "teacher"))
GPUS = 8
VISITS = 1152 * 9  # every image of a round of teacher.py at each of the 9 trained steps


pytestmark = pytest.mark.usefixtures("prompt_files")  # the current folder has those that the configurations name


def plan_of(source, num_processes=GPUS, *overrides):
    return check(load_config(source, overrides), num_processes)


# --- distillation -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def rewards_are_here(monkeypatch):
    monkeypatch.setattr("diffusionopd.training.checks.lacking", lambda *of: "")


def test_mopd_has_the_published_plan():
    plan = plan_of(f"{OPD}:mopd")
    assert [task.name for task in plan.tasks] == ["pickscore", "ocr", "geneval"]
    assert [task.guidance_scale for task in plan.tasks] == [4.5, 4.5, 1.0]
    assert plan.tasks[1].lora_path == "quanhaol/DiffusionOPD/OCRTeacher/lora"
    shape, sampler = plan.shape, plan.sampler
    assert (shape.batch_size, shape.batches_per_task) == (3, 1)
    assert (shape.images_per_task, shape.images_per_round, shape.groups_per_task) == (24, 72, 24)
    assert (sampler.num_steps, sampler.trained_steps) == (10, 9)
    assert (sampler.kernel, sampler.noise_level, sampler.multistep, sampler.guidance) == ("ode", 0.0, False, 4.5)
    assert (plan.run.run_dir, plan.num_prompts, plan.notes) == (Path.cwd() / "logs/mopd", (96, 96, 96), ())
    text = describe(plan)
    for part in ("stable-diffusion-3.5-medium (hub)", "logs/mopd", "GenEvalTeacher/lora (hub)", "1296", "1080"):
        assert part in text


def test_the_plan_says_what_a_key_changes():
    usual = describe(plan_of(f"{OPD}:mopd")).splitlines()
    for key, value in (
        ("train.teachers[1].strength", "1.3"),
        ("train.teachers[1].scale", "0.7"),
        ("train.ema_repeats", "2"),
        ("train.lr_scheduler", "cosine"),
        ("eval_freq", "13"),
    ):
        changed = describe(plan_of(f"{OPD}:mopd", GPUS, (key, value))).splitlines()
        assert sum(value in line for line in changed if line not in usual) == 1, (key, changed)


def test_forward_passes_count_guidance_and_trained_steps():
    nfe = plan_of(f"{OPD}:mopd").nfe_per_round
    assert (nfe.student, nfe.teacher, nfe.sampling, nfe.base) == (72 * 9 * 2, 24 * 9 * (2 + 2 + 1), 0, 0)
    plan = plan_of(f"{OPD}:mopd", 8, ("train.cfg", "false"), ("train.num_inner_epochs", "2"), ("train.beta", "0.1"))
    assert plan.sampler.guidance == 1.0
    assert plan.nfe_per_round.student == plan.nfe_per_round.base == 72 * 9 * 2


def test_drawn_steps_change_the_counts_of_a_round():
    drawn = [f"{OPD}:mopd", 8, ("train.steps_per_rollout", "2")]
    plan = plan_of(*drawn)
    pairs = list(itertools.combinations(range(9), 2))
    walked = sum(last - 1 for _, last in pairs) / len(pairs)  # steps before the last drawn one, without the first drawn
    nfe, steps = plan.nfe_per_round, plan.algorithm.steps(plan, (1, 2, 3))
    assert (nfe.student, nfe.teacher, nfe.sampling) == (72 * 2 * 2, 24 * 2 * (2 + 2 + 1), round(72 * 2 * walked))
    assert len(steps) == 2 and set(steps) <= set(range(9))
    nfe = plan_of(*drawn[:2], ("train.steps_per_rollout", "9")).nfe_per_round
    assert (nfe.student, nfe.sampling) == (72 * 9 * 2, 0)
    weighted = plan_of(f"{OPD}:mopd", 8, ("train.steps_per_rollout", "1"), ("train.step_weighting", "beta(5, 2)"))
    draws = [weighted.algorithm.steps(weighted, (42, n, 0)) for n in range(2000)]
    chances, found = step_chances(9, 1, 5, 2), collections.Counter(step for (step,) in draws)
    for step, chance in enumerate(chances):
        assert abs(found[step] / 2000 - chance) <= 4 * (chance * (1 - chance) / 2000) ** 0.5, step
    walked = sum(step * chance for step, chance in enumerate(chances))
    assert weighted.nfe_per_round.sampling == pytest.approx(72 * 2 * walked, rel=0.05)
    plan = plan_of(*drawn, ("train.algorithm", "sft"))
    assert plan.algorithm.steps(plan, (1, 2, 3)) == tuple(range(9))
    assert any("train.steps_per_rollout" in note for note in plan.notes)


def test_single_teacher_and_tiny_configurations(monkeypatch):
    for name in ("pickscore", "ocr", "geneval"):
        plan = plan_of(f"{OPD}:sopd_{name}")
        assert [task.name for task in plan.tasks] == [name]
        assert (plan.shape.images_per_round, plan.shape.batches_per_task) == (72, 3)
        assert plan.run.run_dir == Path.cwd() / "logs" / f"sopd_{name}"
    monkeypatch.chdir(ROOT)  # the shipped model, teachers and prompts
    for name in ("mopd", "sopd_compose", "sopd_ocr", "sopd_scene"):
        plan = plan_of(f"{TINY}:{name}", 2)
        assert (plan.shape.images_per_round, plan.sampler.guidance, plan.notes) == (24, 1.0, ())
        assert all(list(task.proxy_reward) == [f"tiny_{task.name}"] for task in plan.tasks)


# --- teachers from rewards --------------------------------------------------------------------------------------------


def test_nft_geneval_is_the_published_round():
    plan, config = plan_of(f"{TEACHER}:nft_geneval"), load_config(f"{TEACHER}:nft_geneval")
    shape, sampler, nfe = plan.shape, plan.sampler, plan.nfe_per_round
    assert (plan.algorithm.name, shape.images_per_round, shape.groups_per_task) == ("nft", 48 * 24, 48)
    assert shape.backward_batches == shape.accumulation  # one optimizer step per round
    assert (sampler.num_steps, sampler.trained_steps) == (10, 9)
    assert (sampler.kernel, sampler.multistep, sampler.guidance) == ("ode", True, 1.0)
    assert nfe.student == nfe.base == VISITS
    assert nfe.sampling == 1152 * 10 + VISITS  # the old policy samples, and is asked again in training
    values = {
        "nft_beta": 1.0, "beta": 1e-4, "learning_rate": 3e-4, "old_policy_decay": (0, 0.001, 0.5), "adv_clip_max": 5.0,
        "loss_scale": 1.0, "lora_rank": 32, "lora_alpha": 64,
    }  # fmt: skip
    assert {key: config.train[key] for key in values} == values
    assert (config.mixed_precision, config.resolution, config.sample.global_std, plan.notes) == ("fp16", 512, True, ())


def test_guard_configurations_are_the_published_rounds():
    for name, task, clip_range in (("guard_ocr", "ocr", 2e-6), ("guard_aesthetic", "pickscore", 4e-6)):
        plan, config = plan_of(f"{TEACHER}:{name}"), load_config(f"{TEACHER}:{name}")
        shape, sampler, nfe = plan.shape, plan.sampler, plan.nfe_per_round
        assert (plan.algorithm.name, shape.images_per_round, shape.groups_per_task) == ("grpo_guard", 48 * 24, 48)
        assert shape.backward_batches == 2 * shape.accumulation  # two optimizer steps per round
        assert (sampler.num_steps, sampler.trained_steps) == (10, 9)
        assert (sampler.kernel, sampler.noise_level, sampler.guidance) == ("flow_sde", 0.7, 4.5)
        assert (nfe.student, nfe.base, nfe.sampling) == (2 * VISITS, 0, 2 * 1152 * 10)
        assert ([t.name for t in plan.tasks], plan.notes) == ([task], ())
        assert (config.train.clip_range_lt, config.train.clip_range_gt) == (clip_range, clip_range)
        assert (config.train.learning_rate, config.sample.global_std, config.mixed_precision) == (1e-4, False, "fp16")
    # 1:1:1, with PickScore on the scale of reinforcement learning: its 20 to 26 divided by 26.
    check_weights(plan.tasks[0].proxy_reward)
    assert plan.tasks[0].proxy_reward == {"pickscore": pytest.approx(1 / 26), "clipscore": 1.0, "hpsv2": 1.0}


def test_tiny_teachers(monkeypatch):
    """On the shipped model and prompts."""
    monkeypatch.chdir(ROOT)
    for task, processes in itertools.product(("compose", "ocr", "scene"), (1, 2)):
        plan = plan_of(f"{TEACHER}:tiny_{task}", processes)
        assert (plan.algorithm.name, plan.sampler.guidance, plan.sampler.kernel) == ("nft", 1.0, "ode")
        assert (plan.shape.images_per_round, plan.shape.groups_per_task) == (16 * processes, 2 * processes)
        assert plan.shape.backward_batches == 2 * plan.shape.accumulation
        assert [(t.name, t.proxy_reward, t.lora_path) for t in plan.tasks] == [(task, {f"tiny_{task}": 1.0}, "")]
        assert plan.notes == () or processes == 1


def test_loading_twice_gives_independent_configurations():
    first = load_config(f"{OPD}:mopd")
    first.train.teachers[0]["proxy_reward"]["ocr"] = 2.0
    first.train.teachers[0]["name"] = "changed"
    assert load_config(f"{OPD}:mopd").train.teachers[0]["name"] == "pickscore"
    assert load_config(f"{OPD}:mopd").train.teachers[0]["proxy_reward"].get("ocr") != 2.0
