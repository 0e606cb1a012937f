"""Distillation on SANA 1.5 (1.6 B parameters; 1.0 has the same keys) at 1024x1024, where it has as many image tokens as
Stable Diffusion 3 at 512x512.

No teachers of it are released with this project: any LoRA of the base is one, published or trained with
``config/teacher.py`` (``--config.pretrained.model=Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers``).
The folders of SANA 1.0 in bf16 hold their weights as a variant: ``--config.pretrained.variant=bf16``.
"""

from ml_collections import ConfigDict

from diffusionopd.training import distillation_of


def get_config(name: str = "mopd") -> ConfigDict:
    """Return the configuration called ``name``: mopd."""
    return globals()[name]()


def mopd() -> ConfigDict:
    """Two teachers, one student.

    Command:   CONFIG=config/sana.py:mopd bash scripts/single_node/mopd.sh
               '--config.train.teachers[0].lora_path=...' and likewise [1] (ocr): LoRAs of this base
    Hardware:  8 GPUs, 32 GB each at the peak with the rewards' models, a task in a pass (11 GB with
               --config.activation_checkpointing=True); 48 images per round, 24 per task
    Cost:      7.7 PFLOP per round, 3.7 s on 8 H100 at 33% of 790 TFLOP/s (computed, python -m tools.cost)
    Expected:  not run and not measured; a student is compared with its own teachers
    """
    model = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
    config = distillation_of("sana_mopd", model, ("pickscore", "ocr"), batch=3, batches=2)
    config.resolution = 1024
    config.activation_checkpointing = False
    config.sample.test_batch_size = 16
    return config
