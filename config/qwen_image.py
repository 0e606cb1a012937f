"""Distillation on Qwen-Image, Qwen-Image 2.1 and Qwen-Image-Edit at 512x512.

No teachers of them are released with this project: any LoRA of the base is one, published or trained with
``config/teacher.py`` (``--config.pretrained.model=Qwen/Qwen-Image``).
"""

from ml_collections import ConfigDict

from diffusionopd.training import distillation_of, teacher_of

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
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr): LoRAs of this base
    Hardware:  8 GPUs of 80 GB, 53 GB each at the peak with the rewards' models, a task in a pass, of which the
               weights are 41; 48 images per round, 24 per task
    Cost:      81 PFLOP per round, 39 s on 8 H100 at 33% of 790 TFLOP/s (computed, python -m tools.cost)
    Expected:  not run and not measured; a student is compared with its own teachers
    """
    return _distillation("qwen_image_mopd", "Qwen/Qwen-Image")


def mopd_21() -> ConfigDict:
    """Two teachers, one student, on Qwen-Image 2.1, 7.1 B parameters, which is meant to be used without guidance.

    Command:   CONFIG=config/qwen_image.py:mopd_21 bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr): LoRAs of this base
    Hardware:  8 GPUs of 40 GB, of which the weights are 14 GB in bf16; 48 images per round, 24 per task
    Cost:      not known, since its transformer cannot be counted; each image has forwards of its own
    Expected:  not run and not measured; a student is compared with its own teachers
    """
    return _distillation("qwen_image_21_mopd", "Qwen/Qwen-Image-2.1")


def edit() -> ConfigDict:
    """A teacher that draws and one that edits, one student that does both, on Qwen-Image-Edit 2511 (docs/editing.md).

    Command:   CONFIG=config/qwen_image.py:edit bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' (ocr) and likewise [1] (edit): LoRAs of this base
    Hardware:  8 GPUs of 80 GB, 67 GB each at the peak with the rewards' models, a task in a pass, of which the
               weights are 41; 48 images per round, 24 per task
    Cost:      less than 423 PFLOP per round, 203 s on 8 H100 at 33% of 790 TFLOP/s, which all edits of 1024 tokens
               would have (computed, python -m tools.cost)
    Expected:  not run and not measured; a student is compared with its own teachers
    """
    config = _distillation("qwen_image_edit", "Qwen/Qwen-Image-Edit-2511")
    config.train.teachers = [teacher_of("ocr"), dict(EDIT)]
    return config


def _distillation(run_name: str, model: str) -> ConfigDict:
    config = distillation_of(run_name, model, ("pickscore", "ocr"), batch=3, batches=2)
    config.sample.test_batch_size = 4
    return config
