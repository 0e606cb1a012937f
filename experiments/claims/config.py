"""The paper's comparisons in the tiny world: one configuration per experiment, all on the same prompts and test sets.

Teachers come from rewards (DiffusionNFT), students from these teachers; ``run.py`` fills in the teachers of a seed.
"""

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

_configs = Path(__file__).resolve().parents[2] / "config"
_tiny = runpy.run_path(str(_configs / "tiny.py"))["get_config"]
_teacher = runpy.run_path(str(_configs / "teacher.py"))["get_config"]


def get_config(name: str) -> ConfigDict:
    """Return the experiment called ``name``, a key of :data:`EXPERIMENTS`."""
    return EXPERIMENTS[name]()


def _watched(config: ConfigDict, only: str = "", **train: Any) -> ConfigDict:
    """Scored on 48 test prompts per task every tenth round; ``only`` is the one task of a teacher."""
    config.train.teachers = [
        dict(task, guidance_scale=1.0)  # run.py puts the seed's own teachers in the place of the shipped ones
        for task in _tiny("mopd").train.teachers
        if task["name"] == only or not only
    ]
    config.update({"eval_freq": 10, "eval_num_prompts": 48, "monitor_freq": 0, "sample_freq": 0, "save_freq": 10})
    config.num_checkpoint_limit = 2
    config.sample.test_batch_size = 16
    config.train.update(train)
    return config


def _guarded(config: ConfigDict, learning_rate: float = 1e-3) -> ConfigDict:
    """GRPO-Guard instead of DiffusionNFT."""
    # At the teachers' learning rate and a clip range that no ratio reaches, a student of all tasks collapsed into
    # scene's. A log-ratio is a mean over 2048 dimensions: 2e-5 clips a few percent of them.
    config.sample.noise_level = 0.7
    config.train.update({"algorithm": "grpo_guard", "learning_rate": learning_rate})
    config.train.update({"clip_range_lt": 2e-5, "clip_range_gt": 2e-5})
    return config


def _all_rewards(order: str, learning_rate: float = 1e-3) -> ConfigDict:
    """One student from all rewards with DiffusionNFT; the teachers' 2e-3 is stable on one task, not on three."""
    config = _watched(_teacher("tiny_compose"), task_order=order, learning_rate=learning_rate)
    # At 192 NFE each, 270 rounds cost as much as three teachers and the distillation together.
    config.update({"num_epochs": 270, "eval_freq": 30})
    return config


def _all_rewards_guarded(learning_rate: float = 5e-4) -> ConfigDict:
    """The same with GRPO-Guard, which needs 144 NFE per round: as many NFE in more rounds."""
    config = _guarded(_all_rewards("alternate"), learning_rate)
    config.num_epochs = 360
    return config


def _opd(**train: Any) -> ConfigDict:
    """The method as the tiny world's own configuration has it: ODE, velocities compared, self-normalised."""
    config = _watched(_tiny("mopd"), **train)
    config.num_epochs = 80
    return config


def _by_the_paper(noise_level: float, longer: bool = False, loss: str = "kl") -> ConfigDict:
    """The paper's loss, the closed form on the means of the steps (eq. 11 and 12), or the surrogate of section 3.3.

    ``longer`` is long enough to come near the teachers: with the paper's loss 80 rounds are not.
    """
    config = _opd(target="mean", self_normalize=False, loss=loss)
    config.sample.noise_level = noise_level
    if longer:
        config.update({"num_epochs": 160, "eval_freq": 20})
    return config


EXPERIMENTS: dict[str, Callable[[], ConfigDict]] = {
    # From rewards: the detector's alone, the reading of the sign alone, colourfulness alone; GRPO-Guard on one task
    "teacher_compose": lambda: _watched(_teacher("tiny_compose"), only="compose"),
    "teacher_ocr": lambda: _watched(_teacher("tiny_ocr"), only="ocr"),
    "teacher_scene": lambda: _watched(_teacher("tiny_scene"), only="scene"),
    "guard_scene": lambda: _watched(_guarded(_teacher("tiny_scene")), only="scene"),
    # From all rewards: one task per round in turn, as many rounds per task as a teacher has, and as many more as the
    # distillation costs; or the tasks one after another
    "multitask_nft": partial(_all_rewards, "alternate"),
    "multitask_guard": _all_rewards_guarded,  # 5e-4: the best of 3e-4, 5e-4 and 1e-3, where ocr collapsed in one seed
    "cascade_nft": partial(_all_rewards, "cascade"),
    # From teachers: the method, the paper's loss at three noise levels, the surrogate at equal noise, supervision
    "opd": _opd,
    "opd_noise00": partial(_by_the_paper, 0.0, longer=True),
    "opd_noise03": partial(_by_the_paper, 0.3),
    "opd_noise07": partial(_by_the_paper, 0.7, longer=True),
    "ppo_noise03": partial(_by_the_paper, 0.3, loss="policy_gradient"),
    "ppo_noise07": partial(_by_the_paper, 0.7, loss="policy_gradient"),
    "sft": partial(_opd, algorithm="sft"),
    # At other learning rates: the teachers', as multi-task training is first tried; the one that is good for one task;
    # half and twice the method's
    "multitask_nft_2e3": partial(_all_rewards, "alternate", 2e-3),
    "multitask_guard_1e3": partial(_all_rewards_guarded, 1e-3),
    "cascade_nft_2e3": partial(_all_rewards, "cascade", 2e-3),
    "opd_5e4": partial(_opd, learning_rate=5e-4),
    "opd_2e3": partial(_opd, learning_rate=2e-3),
}
