"""The paper's comparisons in the tiny world: one configuration per experiment, all on the same prompts and test sets.

Teachers come from rewards (DiffusionNFT), students from these teachers; ``run.py`` fills in the teachers of a seed.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_configs = Path(__file__).resolve().parents[2] / "config"
_tiny = runpy.run_path(str(_configs / "tiny.py"))["get_config"]
_teacher = runpy.run_path(str(_configs / "teacher.py"))["get_config"]


def get_config(name: str) -> ConfigDict:
    """Return the experiment called ``name``."""
    return globals()[name]()


# ---- from rewards ----------------------------------------------------------------------------------------------------


def teacher_compose() -> ConfigDict:
    """DiffusionNFT from the detector's reward alone."""
    return _watched(_teacher("tiny_compose"), only="compose")


def teacher_ocr() -> ConfigDict:
    """DiffusionNFT from the reading of the sign alone."""
    return _watched(_teacher("tiny_ocr"), only="ocr")


def teacher_scene() -> ConfigDict:
    """DiffusionNFT from colourfulness alone."""
    return _watched(_teacher("tiny_scene"), only="scene")


def guard_scene() -> ConfigDict:
    """GRPO-Guard instead of DiffusionNFT on one task."""
    return _watched(_guarded(_teacher("tiny_scene")), only="scene")


def multitask_nft() -> ConfigDict:
    """One student from all rewards, one task per round in turn; as many rounds per task as a teacher has, and as many
    more as the distillation costs."""
    return _several(_teacher("tiny_compose"), "alternate")


def multitask_guard() -> ConfigDict:
    """The same with GRPO-Guard, which needs 144 NFE per round: as many NFE in more rounds."""
    config = _guarded(_several(_teacher("tiny_compose"), "alternate"))
    config.train.learning_rate = 5e-4  # the best of 3e-4, 5e-4 and 1e-3, at which ocr collapsed in one seed of three
    config.num_epochs = 360
    return config


def cascade_nft() -> ConfigDict:
    """The tasks one after another."""
    return _several(_teacher("tiny_compose"), "cascade")


# ---- from teachers ---------------------------------------------------------------------------------------------------


def opd() -> ConfigDict:
    """The method as the tiny world's own configuration has it: ODE, velocities compared, self-normalised."""
    config = _watched(_tiny("mopd"))
    config.num_epochs = 80
    return config


def opd_noise00() -> ConfigDict:
    """The ODE with the paper's loss (eq. 12), for comparison with the two noise levels (eq. 11)."""
    return _longer(_by_the_paper(0.0))


def opd_noise03() -> ConfigDict:
    """The paper's loss on stochastic rollouts (eq. 11), little noise."""
    return _by_the_paper(0.3)


def opd_noise07() -> ConfigDict:
    """The paper's loss at the noise that reinforcement learning uses, on the way to the teachers' level."""
    return _longer(_by_the_paper(0.7))


def ppo_noise03() -> ConfigDict:
    """The surrogate of section 3.3 at equal noise."""
    return _surrogate(_by_the_paper(0.3))


def ppo_noise07() -> ConfigDict:
    """The surrogate at the noise that reinforcement learning uses."""
    return _surrogate(_by_the_paper(0.7))


def sft() -> ConfigDict:
    """Supervised on samples of the teachers."""
    config = opd()
    config.train.algorithm = "sft"
    return config


# ---- at other learning rates -----------------------------------------------------------------------------------------


def multitask_nft_2e3() -> ConfigDict:
    """At the teachers' learning rate, as multi-task training is first tried."""
    return _at(2e-3, multitask_nft())


def multitask_guard_1e3() -> ConfigDict:
    """At the learning rate that is good for one task."""
    return _at(1e-3, multitask_guard())


def cascade_nft_2e3() -> ConfigDict:
    """At the teachers' learning rate: every stage as its teacher was trained."""
    return _at(2e-3, cascade_nft())


def opd_5e4() -> ConfigDict:
    """The method at half of its learning rate."""
    return _at(5e-4, opd())


def opd_2e3() -> ConfigDict:
    """The method at twice its learning rate."""
    return _at(2e-3, opd())


# ---- parts -----------------------------------------------------------------------------------------------------------


def _watched(config: ConfigDict, only: str = "") -> ConfigDict:
    """Scored on 48 test prompts per task every tenth round; ``only`` is the one task of a teacher."""
    config.train.teachers = [
        dict(task, guidance_scale=1.0)  # run.py puts the seed's own teachers in the place of the shipped ones
        for task in _tiny("mopd").train.teachers
        if task["name"] == only or not only
    ]
    config.update({"eval_freq": 10, "eval_num_prompts": 48, "monitor_freq": 0, "sample_freq": 0, "save_freq": 10})
    config.num_checkpoint_limit = 2
    config.sample.test_batch_size = 16
    return config


def _several(config: ConfigDict, order: str) -> ConfigDict:
    config = _watched(config)
    config.train.task_order = order
    config.train.learning_rate = 1e-3  # the teachers' 2e-3 is stable on one task, not on three
    # At 192 NFE each, 270 rounds cost as much as three teachers and the distillation together.
    config.update({"num_epochs": 270, "eval_freq": 30})
    return config


def _at(learning_rate: float, config: ConfigDict) -> ConfigDict:
    config.train.learning_rate = learning_rate
    return config


def _guarded(config: ConfigDict) -> ConfigDict:
    # At the teachers' learning rate and a clip range that no ratio reaches, a student of all tasks collapsed into
    # scene's. A log-ratio is a mean over 2048 dimensions: 2e-5 clips a few percent of them.
    config.sample.noise_level = 0.7
    config.train.update({"algorithm": "grpo_guard", "learning_rate": 1e-3})
    config.train.update({"clip_range_lt": 2e-5, "clip_range_gt": 2e-5})
    return config


def _by_the_paper(noise_level: float) -> ConfigDict:
    """The closed form on the means of the steps."""
    config = opd()
    config.sample.noise_level = noise_level
    config.train.target = "mean"
    config.train.self_normalize = False
    return config


def _longer(config: ConfigDict) -> ConfigDict:
    """Long enough to come near the teachers: with the paper's loss 80 rounds are not."""
    config.update({"num_epochs": 160, "eval_freq": 20})
    return config


def _surrogate(config: ConfigDict) -> ConfigDict:
    config.train.loss = "policy_gradient"
    return config
