"""What the presets of base models without released teachers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from diffusionopd.training.keys import base_config

_PROMPT_FN = {"pickscore": "general_ocr", "ocr": "general_ocr", "geneval": "geneval"}


def teacher_of(name: str) -> dict[str, Any]:
    """A task of the published setup whose teacher is to be named."""
    own = {"name": name, "dataset": f"dataset/{name}", "lora_path": "", "proxy_reward": {name: 1.0}}
    return own | {"prompt_fn": _PROMPT_FN[name]}


def distillation_of(
    run_name: str,
    model: str,
    names: Sequence[str] = ("pickscore", "ocr", "geneval"),
    batch: int = 1,
    batches: int = 9,
    few_steps: bool = False,
) -> ConfigDict:
    """The published rounds on another base at 512x512, ``batches`` of ``batch`` images a task and process.

    Precision, length of prompts, steps of an evaluation and guidance are the model's own; with ``few_steps``, of a
    distilled model, so are the rounds' steps, and all of them are trained.
    """
    config = base_config()
    config.run_name = run_name
    config.save_freq = config.eval_freq = 30
    config.eval_num_prompts = 64  # a curve; all would cost several times the rounds between
    config.resolution = 512
    config.pretrained.model = model
    config.activation_checkpointing = True
    config.mixed_precision = config.max_sequence_length = config.sample.eval_num_steps = None
    config.sample.guidance_scale = config.sample.teacher_guidance_scale = config.sample.eval_guidance_scale = None

    config.sample.num_steps = None if few_steps else 10
    config.sample.train_batch_size = config.train.batch_size = batch
    config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = batches
    config.sample.noise_level = 0.0
    config.train.teachers = [teacher_of(name) for name in names]
    config.train.timestep_fraction = 1.0 if few_steps else 0.99  # the first 9 of 10 steps
    config.train.ema = True
    return config
