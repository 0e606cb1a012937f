"""Distillation on FLUX.2 at 512x512: klein base (4 B and 9 B), klein (distilled, four steps) and dev (32 B).

No teachers are released for these bases: name LoRAs of them, of any format in ``docs/loras.md``, with
``--config.train.teachers[0].lora_path=...``. What is None is the base model's own (``docs/families.md``).

A prompt takes 7.9 MB (klein 4B), 12.6 MB (9B) or 15.7 MB (dev) in the text cache, whatever its length: its padding is
attended too. 10 000 prompts are 79 to 157 GB, so shorten the prompt files where the disk is smaller (``head -n 2000``).
"""

from ml_collections import ConfigDict

from diffusionopd.training import distillation_of


def get_config(name: str) -> ConfigDict:
    """Return the configuration called ``name``: klein_base, klein or dev."""
    return globals()[name]()


def klein_base() -> ConfigDict:
    """Three teachers, one student, on FLUX.2-klein-base-4B; 9B with ``--config.pretrained.model=...``.

    Command:   CONFIG=config/flux2.py:klein_base bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr) and [2] (geneval)
    Hardware:  8 GPUs, 17 GB each at the peak with the rewards' models, one image a pass, activations recomputed;
               72 images per round, 24 per task
    Cost:      55 PFLOP per round, 18 s on 8 H100 at 47% of 790 TFLOP/s (computed, python -m tools.cost; not run)
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    return distillation_of("flux2_klein_base", "black-forest-labs/FLUX.2-klein-base-4B")


def klein() -> ConfigDict:
    """The same on FLUX.2-klein-4B, distilled to four steps without guidance, all of them trained.

    Command:   CONFIG=config/flux2.py:klein bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr) and [2] (geneval)
    Hardware:  8 GPUs, 16 GB each, likewise
    Cost:      12 PFLOP per round, 4.1 s (computed, as ``klein_base``'s)
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    return distillation_of("flux2_klein", "black-forest-labs/FLUX.2-klein-4B", few_steps=True)


def dev() -> ConfigDict:
    """The same on FLUX.2-dev, whose guidance is an input: 64 GB of weights in bf16, so sharded over the GPUs.

    Command:   ENGINE=fsdp2 CONFIG=config/flux2.py:dev bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr) and [2] (geneval)
    Hardware:  8 GPUs, 26 GB each, likewise; its text encoder alone is 48 GB in every process while prompts
               are encoded, and all processes together read 515 GB into main memory while it loads
    Cost:      232 PFLOP per round, 78 s (computed, as ``klein_base``'s)
    Expected:  not published and not measured; a student is compared with its own teachers
    """
    return distillation_of("flux2_dev", "black-forest-labs/FLUX.2-dev")
