"""Stage 1: a teacher LoRA from rewards, on Stable Diffusion 3.5 Medium and in the embedded tiny world.

What comes out, ``<run folder>/checkpoints/checkpoint-<n>/lora``, is what ``train.teachers`` takes as ``lora_path``.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_here = Path(__file__).parent
_defaults = runpy.run_path(str(_here / "base.py"))["get_config"]
_tiny = runpy.run_path(str(_here / "tiny.py"))


def get_config(name: str) -> ConfigDict:
    """Return the configuration called ``name``: nft_geneval, guard_ocr, guard_aesthetic, tiny_compose, ..."""
    return globals()[name]()


def tiny_nft(task: str) -> ConfigDict:
    config = _tiny["_distillation"](f"tiny-teacher-{task.lower()}", [_tiny[task]])
    config.num_epochs = 100
    config.train.algorithm = "nft"
    config.sample.num_image_per_prompt = 8
    config.sample.train_batch_size = 16
    config.sample.num_batches_per_epoch = 4
    config.train.batch_size = 16
    config.train.gradient_accumulation_steps = 2
    config.train.learning_rate = 1e-3
    config.train.loss_scale = 1.0
    config.train.nft_beta = 1.0
    config.train.adv_clip_max = 5.0
    config.train.lora_rank = 16
    config.train.lora_alpha = 32
    config.sample.global_std = True
    return config


def tiny_compose():
    return tiny_nft("COMPOSE")


def tiny_ocr():
    return tiny_nft("OCR")


def tiny_scene():
    return tiny_nft("SCENE")
