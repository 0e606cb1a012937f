"""Distillation on FLUX.1 at 512x512: dev, whose guidance is an input of the transformer, and schnell, which has none.

No teachers are released for these bases: name LoRAs of them, of any format in ``docs/loras.md``, with
``--config.train.teachers[0].lora_path=...``. What is None is the base model's own (``docs/families.md``).
"""

from ml_collections import ConfigDict

from diffusionopd.training import distillation_of


def get_config(name: str) -> ConfigDict:
    """Return the configuration called ``name``: mopd or schnell."""
    return globals()[name]()


def mopd() -> ConfigDict:
    """Three teachers, one student, on FLUX.1-dev, with bf16 weights; Krea-dev with ``--config.pretrained.model=...``.

    Command:   CONFIG=config/flux1.py:mopd bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr) and [2] (geneval)
    Hardware:  8 GPUs, 34 GB each at the peak with the rewards' models, one image a pass, activations recomputed;
               72 images per round, 24 per task
    Cost:      58 PFLOP per round, 19 s on 8 H100 at 47% of 790 TFLOP/s (computed, python -m tools.cost; not run)
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    return distillation_of("flux1_mopd", "black-forest-labs/FLUX.1-dev")


def schnell() -> ConfigDict:
    """The same on FLUX.1-schnell, distilled to four steps without guidance.

    Command:   CONFIG=config/flux1.py:schnell bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr) and [2] (geneval)
    Hardware:  as ``mopd``
    Cost:      21 PFLOP per round, 7.1 s (computed, as ``mopd``'s): 4 steps, all trained, in the place of 10
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    return distillation_of("flux1_schnell", "black-forest-labs/FLUX.1-schnell", few_steps=True)
