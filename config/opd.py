"""Distillation on Stable Diffusion 3.5 Medium at 512x512: the published setup.

``mopd`` distils three teachers (aesthetics, text rendering, composition) into one student; ``sopd_*`` one teacher each.
The teachers are the released LoRAs. The prompt files go to ``dataset/`` (see ``dataset/README.md``).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_defaults = runpy.run_path(str(Path(__file__).with_name("base.py")))["get_config"]

# guidance_scale is the one that a teacher was trained with: GenEval's was trained without classifier-free guidance.
PICKSCORE = {
    "name": "pickscore",
    "dataset": "dataset/pickscore",
    "lora_path": "quanhaol/DiffusionOPD/AesTeacher/lora",
    "proxy_reward": {"pickscore": 1.0},
    "prompt_fn": "general_ocr",
    "guidance_scale": 4.5,
}
OCR = {
    "name": "ocr",
    "dataset": "dataset/ocr",
    "lora_path": "quanhaol/DiffusionOPD/OCRTeacher/lora",
    "proxy_reward": {"ocr": 1.0},
    "prompt_fn": "general_ocr",
    "guidance_scale": 4.5,
}
GENEVAL = {
    "name": "geneval",
    "dataset": "dataset/geneval",
    "lora_path": "quanhaol/DiffusionOPD/GenEvalTeacher/lora",
    "proxy_reward": {"geneval": 1.0},
    "prompt_fn": "geneval",
    "guidance_scale": 1.0,
}


def get_config(name: str) -> ConfigDict:
    """Return the configuration called ``name``: mopd, sopd_pickscore, sopd_ocr or sopd_geneval."""
    return globals()[name]()


def mopd() -> ConfigDict:
    """Three teachers, one student.

    Command:   bash scripts/single_node/mopd.sh
    Hardware:  8 GPUs; 72 pictures a round, 24 a task
    Cost:      11.26 hours (published), after the teachers' 85.75, 33.17 and 46.92 hours
    Expected:  GenEval 0.96, OCR 0.94, PickScore 23.99, ClipScore 0.297, HPSv2.1 0.342, Aesthetic 6.15,
               ImageReward 1.50, UnifiedReward 3.50 (published, Table 1 of arXiv 2605.15055; base model with guidance:
               0.63, 0.59, 22.34, 0.285, 0.279, 5.36, 0.85, 3.03)
    """
    return _distillation("mopd", [PICKSCORE, OCR, GENEVAL])


def sopd_pickscore() -> ConfigDict:
    """The aesthetics teacher alone.

    Command:   CONFIG=config/opd.py:sopd_pickscore bash scripts/single_node/sopd.sh
    Hardware:  8 GPUs; 72 pictures a round
    Cost:      not published for a single teacher
    Expected:  towards the teacher: PickScore 24.02, ClipScore 0.295, HPSv2.1 0.346, Aesthetic 6.22,
               ImageReward 1.498, UnifiedReward 3.48 (the teacher's own scores, published)
    """
    return _distillation("sopd_pickscore", [PICKSCORE])


def sopd_ocr() -> ConfigDict:
    """The text rendering teacher alone.

    Command:   CONFIG=config/opd.py:sopd_ocr bash scripts/single_node/sopd.sh
    Hardware:  8 GPUs; 72 pictures a round
    Cost:      not published for a single teacher
    Expected:  towards the teacher: OCR 0.93 (the teacher's own score, published)
    """
    return _distillation("sopd_ocr", [OCR])


def sopd_geneval() -> ConfigDict:
    """The composition teacher alone.

    Command:   CONFIG=config/opd.py:sopd_geneval bash scripts/single_node/sopd.sh
    Hardware:  8 GPUs; 72 pictures a round
    Cost:      not published for a single teacher
    Expected:  towards the teacher: GenEval 0.96 (the teacher's own score, published)
    """
    return _distillation("sopd_geneval", [GENEVAL])


def _distillation(run_name: str, teachers: list[dict]) -> ConfigDict:
    config = _defaults()
    config.run_name = run_name
    config.save_freq = 30
    config.eval_freq = 30
    config.resolution = 512
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"

    config.sample.num_steps = 10
    config.sample.train_batch_size = 3
    config.sample.test_batch_size = 16
    config.sample.num_batches_per_epoch = 3
    config.sample.noise_level = 0.0

    config.train.teachers = [dict(teacher) for teacher in teachers]
    config.train.batch_size = 3
    config.train.gradient_accumulation_steps = 3
    config.train.timestep_fraction = 0.99  # the first 9 of 10 steps
    config.train.ema = True
    return config
