"""Stage 1's shipped configurations: every one passes the checks, with the published arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusionopd.config_schema import RunPlan, check, load_config
from diffusionopd.rewards import REGISTRY
from diffusionopd.rewards.composite import check_weights

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "config" / "teacher.py"
GPUS = 8
VISITS = 1152 * 9  # every picture of a round at each of the 9 trained steps


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the prompt files that the SD3.5 configurations name."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for name in ("pickscore", "ocr"):
            _write(tmp_path / "dataset" / name / f"{split}.txt", "a sign\n" * 96)
        _write(tmp_path / "dataset" / "geneval" / f"{split}_metadata.jsonl", '{"prompt": "a dog"}\n' * 96)
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _plan(name: str, num_processes: int) -> RunPlan:
    return check(load_config(f"{TEACHER}:{name}"), num_processes, REGISTRY)


def test_nft_geneval_is_the_published_round(folder):
    plan = _plan("nft_geneval", GPUS)
    assert (plan.algorithm, plan.images_per_round, plan.groups_per_task) == ("nft", 48 * 24, 48)
    assert plan.backward_batches // plan.accumulation == 1  # optimizer step a round
    assert (plan.num_steps, plan.trained_steps) == (10, 9)
    assert (plan.kernel, plan.multistep, plan.student_guidance) == ("ode", True, 1.0)
    assert plan.student_evaluations == plan.base_evaluations == VISITS
    assert plan.sampling_evaluations == 1152 * 10 + VISITS  # the old policy samples, and is asked again in training


def test_nft_geneval_has_the_published_settings(folder):
    config = load_config(f"{TEACHER}:nft_geneval")
    assert (config.train.nft_beta, config.train.beta, config.train.learning_rate) == (1.0, 1e-4, 3e-4)
    assert tuple(config.train.old_policy_decay) == (0, 0.001, 0.5)
    assert (config.train.adv_clip_max, config.sample.global_std, config.train.loss_scale) == (5.0, True, 1.0)
    assert (config.mixed_precision, config.resolution) == ("fp16", 512)
    assert (config.train.lora_rank, config.train.lora_alpha) == (32, 64)


@pytest.mark.parametrize(
    ("name", "task", "clip_range"), [("guard_ocr", "ocr", 2e-6), ("guard_aesthetic", "pickscore", 4e-6)]
)
def test_guard_configurations_are_the_published_rounds(folder, name, task, clip_range):
    plan, config = _plan(name, GPUS), load_config(f"{TEACHER}:{name}")
    assert (plan.algorithm, plan.images_per_round, plan.groups_per_task) == ("grpo_guard", 48 * 24, 48)
    assert plan.backward_batches // plan.accumulation == 2  # optimizer steps a round
    assert (plan.num_steps, plan.trained_steps) == (10, 9)
    assert (plan.kernel, plan.noise_level, plan.student_guidance) == ("flow_sde", 0.7, 4.5)
    assert (plan.student_evaluations, plan.base_evaluations) == (2 * VISITS, 0)
    assert plan.sampling_evaluations == 2 * 1152 * 10
    assert [teacher.name for teacher in plan.teachers] == [task]
    assert (config.train.clip_range_lt, config.train.clip_range_gt) == (clip_range, clip_range)
    assert (config.train.learning_rate, config.sample.global_std, config.mixed_precision) == (1e-4, False, "fp16")


def test_the_aesthetic_reward_counts_its_parts_alike(folder):
    """1:1:1, with PickScore on the scale of reinforcement learning: its 20 to 26 divided by 26."""
    (task,) = _plan("guard_aesthetic", GPUS).teachers
    check_weights(task.proxy_reward)
    assert task.proxy_reward == {"pickscore": pytest.approx(1 / 26), "clipscore": 1.0, "hpsv2": 1.0}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("task", ["compose", "ocr", "scene"])
def test_tiny_configurations(monkeypatch, task, processes):
    """On the shipped model and prompts."""
    monkeypatch.chdir(ROOT)
    plan = _plan(f"tiny_{task}", processes)
    assert (plan.algorithm, plan.student_guidance, plan.kernel) == ("nft", 1.0, "ode")
    assert (plan.images_per_round, plan.groups_per_task) == (16 * processes, 2 * processes)
    assert plan.backward_batches // plan.accumulation == 2
    assert [(t.name, t.proxy_reward, t.lora_path) for t in plan.teachers] == [(task, {f"tiny_{task}": 1.0}, "")]


def test_every_configuration_describes_itself_without_a_complaint(folder, monkeypatch):
    """Nothing is set that has no effect."""
    assert all("note:" not in _plan(name, GPUS).describe() for name in ("nft_geneval", "guard_ocr", "guard_aesthetic"))
    monkeypatch.chdir(ROOT)
    assert all("note:" not in _plan(f"tiny_{task}", 2).describe() for task in ("compose", "ocr", "scene"))
