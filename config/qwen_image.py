"""Distillation on Qwen-Image, Qwen-Image 2.1 and Qwen-Image-Edit at 512x512.

No teachers of them are released with this project: any LoRA of the base is one, published or trained with
``config/teacher.py`` (``--config.pretrained.model=Qwen/Qwen-Image``).
"""

from ml_collections import ConfigDict

from diffusionopd.training import base_config as _defaults

PICKSCORE = {
    "name": "pickscore",
    "dataset": "dataset/pickscore",
    "lora_path": "",
    "proxy_reward": {"pickscore": 1.0},
    "prompt_fn": "general_ocr",
}
OCR = {
    "name": "ocr",
    "dataset": "dataset/ocr",
    "lora_path": "",
    "proxy_reward": {"ocr": 1.0},
    "prompt_fn": "general_ocr",
}

EDIT = {
    "name": "edit",
    "dataset": "dataset/edit",  # of your own
    "lora_path": "",
    "proxy_reward": {"pickscore": 1.0},
    "prompt_fn": "geneval",
}


def get_config(name: str = "mopd") -> ConfigDict:
    """Return the configuration called ``name``: mopd, mopd_21, edit."""
    return globals()[name]()


def mopd() -> ConfigDict:
    """Two teachers, one student, on Qwen-Image (2512 included), 20.4 B parameters.

    Command:   CONFIG=config/qwen_image.py:mopd bash scripts/single_node/mopd.sh
               --config.train.teachers[0].lora_path=... and likewise [1] (ocr): LoRAs of this base
    Hardware:  8 GPUs of 80 GB, of which the weights are 41 GB in bf16; 48 images per round, 24 per task
    Cost:      not computed; two forwards a velocity, under guidance
    Expected:  not run and not measured; a student is compared with its own teachers
    """
    return _distillation("qwen_image_mopd", "Qwen/Qwen-Image")


def mopd_21() -> ConfigDict:
    """Two teachers, one student, on Qwen-Image 2.1, 7.1 B parameters, which is meant to be used without guidance.

    Command:   CONFIG=config/qwen_image.py:mopd_21 bash scripts/single_node/mopd.sh
               --config.train.teachers[0].lora_path=... and likewise [1] (ocr): LoRAs of this base
    Hardware:  8 GPUs of 40 GB, of which the weights are 14 GB in bf16; 48 images per round, 24 per task
    Cost:      not computed; each image has forwards of its own, since its prompts cannot be padded
    Expected:  not run and not measured; a student is compared with its own teachers
    """
    return _distillation("qwen_image_21_mopd", "Qwen/Qwen-Image-2.1")


def edit() -> ConfigDict:
    """A teacher that draws and one that edits, one student that does both, on Qwen-Image-Edit 2511 (docs/editing.md).

    Command:   CONFIG=config/qwen_image.py:edit bash scripts/single_node/mopd.sh
               --config.train.teachers[0].lora_path=... (ocr) and likewise [1] (edit): LoRAs of this base
    Hardware:  8 GPUs of 80 GB, of which the weights are 41 GB in bf16; 48 images per round, 24 per task
    Cost:      not computed; a forward of an edit has 5 times the image tokens of one without, at 512x512
    Expected:  not run and not measured; a student is compared with its own teachers
    """
    config = _distillation("qwen_image_edit", "Qwen/Qwen-Image-Edit-2511")
    config.train.teachers = [dict(OCR), dict(EDIT)]
    return config


def _distillation(run_name: str, model: str) -> ConfigDict:
    config = _defaults()
    config.run_name = run_name
    config.save_freq = 30
    config.eval_freq = 30
    config.activation_checkpointing = True
    config.resolution = 512
    config.pretrained.model = model

    config.sample.num_steps = 10
    config.sample.train_batch_size = 3
    config.sample.test_batch_size = 4
    config.sample.num_batches_per_epoch = 2
    config.sample.noise_level = 0.0

    config.train.teachers = [dict(PICKSCORE), dict(OCR)]
    config.train.batch_size = 3
    config.train.gradient_accumulation_steps = 2
    config.train.timestep_fraction = 0.99  # the first 9 of 10 steps
    config.train.ema = True

    # The model's own: bf16, length of prompts, steps of an evaluation, guidance.
    config.mixed_precision = config.max_sequence_length = config.sample.eval_num_steps = None
    config.sample.guidance_scale = config.sample.teacher_guidance_scale = config.sample.eval_guidance_scale = None
    return config
