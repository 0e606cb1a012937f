"""The configuration of an arm in a world, as scripts read it: ``experiments/claims/config.py:<world>/<arm>``.

``<world>/validation`` and ``<world>/test`` are the prompts to score models on. Prompt files and teachers are where
``run.py`` puts them.
"""

import math
import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.claims.arms import Arm, arms
from experiments.claims.worlds import WORLDS, World

_configs = Path(__file__).resolve().parents[2] / "config"
_tiny = runpy.run_path(str(_configs / "tiny.py"))["get_config"]
_teacher = runpy.run_path(str(_configs / "teacher.py"))["get_config"]
_TASK_FIELDS = ("strength", "guidance_scale")
SHIPPED_LORA = "assets/tiny/teachers/{}/lora"


def get_config(name: str) -> ConfigDict:
    """Return the configuration ``<world>/<arm>``, ``<world>/validation`` or ``<world>/test``."""
    world, _, arm = name.partition("/")
    if arm in ("validation", "test"):
        return _of_tasks(_tiny("mopd"), WORLDS[world], Arm(arm, "", "", "base"), arm)
    return _of_arm(WORLDS[world], arms_of(WORLDS[world])[arm])


def arms_of(world: World) -> dict[str, Arm]:
    """The arms of a world by name."""
    return arms(world.names, [task.name for task in world.tasks if task.shipped], world.rate)


def _of_arm(world: World, arm: Arm) -> ConfigDict:
    config = _of_tasks(_tiny("mopd") if arm.kind == "opd" else _teacher("tiny_compose"), world, arm, "validation")
    stages = list(arm.stages(len(world.tasks)).values())
    # A checkpoint every so often, all kept: stages are scored, and teachers taken, at their own rounds.
    config.update({"num_epochs": stages[-1], "save_freq": 20, "num_checkpoint_limit": 0})
    # Curves are read of the claims' arms; of others, and of RL of all tasks, the ends of the stages.
    config.eval_freq = 10 if arm.group == "claims" and not arm.per_task else math.gcd(*stages)
    config.update({"monitor_freq": 0, "sample_freq": 0})
    config.sample.test_batch_size = 16
    if arm.kind == "opd":
        config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = len(world.tasks)
    if arm.kind == "guard":
        # At a clip range that no ratio reaches, a student of all tasks collapsed into one. A log-ratio is a mean over
        # 2048 dimensions: 2e-5 clips a few percent of them.
        config.sample.noise_level = 0.7
        config.train.update({"algorithm": "grpo_guard", "learning_rate": 1e-3})
        config.train.update({"clip_range_lt": 2e-5, "clip_range_gt": 2e-5})
    for key, value in arm.changes.items():
        if key not in _TASK_FIELDS:
            section, _, leaf = key.rpartition(".")
            (config[section] if section else config)[leaf] = value
    return config


def _of_tasks(config: ConfigDict, world: World, arm: Arm, split: str) -> ConfigDict:
    fields: dict[str, Any] = {"guidance_scale": 1.0, **{k: v for k, v in arm.changes.items() if k in _TASK_FIELDS}}
    config.train.teachers = [
        {
            "name": task.name,
            "dataset": world.folder(task, split),
            "prompt_fn": task.prompt_fn,
            "proxy_reward": {task.reward: 1.0},
            # run.py puts the seed's own teachers in the place of the shipped ones
            "lora_path": SHIPPED_LORA.format(task.shipped or "compose") if arm.teachers else "",
            **fields,
        }
        for task in world.tasks
        if arm.task in ("", task.name)
    ]
    return config
