"""Distillation on Z-Image at 512x512: the base, and Turbo, which is distilled to eight steps without guidance.

No teachers are released for these bases: name LoRAs of them, of any format in ``docs/loras.md``, with
``--config.train.teachers[0].lora_path=...``. What is None is the base model's own (``docs/families.md``); its guidance
is one more than what the pipeline calls so.
"""

from ml_collections import ConfigDict

from diffusionopd.training import distillation_of


def get_config(name: str) -> ConfigDict:
    """Return the configuration called ``name``: mopd or turbo."""
    return globals()[name]()


def mopd() -> ConfigDict:
    """Three teachers, one student, on Z-Image (6.15 B parameters).

    Command:   CONFIG=config/z_image.py:mopd bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr) and [2] (geneval)
    Hardware:  8 GPUs, 21 GB each at the peak with the rewards' models, one image a pass, activations recomputed;
               72 images per round, 24 per task
    Cost:      99 PFLOP per round, 47 s on 8 H100 at 33% of 790 TFLOP/s (computed, python -m tools.cost; not run)
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    return distillation_of("z_image_mopd", "Tongyi-MAI/Z-Image")


def turbo() -> ConfigDict:
    """The same on Z-Image-Turbo: 8 steps, all trained, without guidance.

    Command:   CONFIG=config/z_image.py:turbo bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr) and [2] (geneval)
    Hardware:  8 GPUs, 20 GB each, likewise
    Cost:      44 PFLOP per round, 15 s (computed, as ``mopd``'s)
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    return distillation_of("z_image_turbo", "Tongyi-MAI/Z-Image-Turbo", few_steps=True)
