"""Distillation on SANA 1.5 (1.6 B parameters; 1.0 has the same keys) at 1024x1024, where it has as many image tokens as
Stable Diffusion 3 at 512x512.

No teachers of it are released with this project: any LoRA of the base is one, published or trained with
``config/teacher.py`` (``--config.pretrained.model=Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers``). Folders of
SANA 1.0 in bf16 hold their weights as a variant: ``--config.pretrained.variant=bf16``.
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


def get_config(name: str = "mopd") -> ConfigDict:
    """Return the configuration called ``name``: mopd."""
    return globals()[name]()


def mopd() -> ConfigDict:
    """Two teachers, one student.

    Command:   CONFIG=config/sana.py:mopd bash scripts/single_node/mopd.sh
               --config.train.teachers[0].lora_path=... and likewise [1] (ocr): LoRAs of this base
    Hardware:  8 GPUs: 3.2 GB of transformer each, in bf16, and 5.2 GB of text encoder until the prompts are encoded;
               48 images per round, 24 per task
    Cost:      two forwards a velocity, of 1.6 B parameters
    Expected:  not run and not measured; a student is compared with its own teachers
    """
    config = _defaults()
    config.run_name = "sana_mopd"
    config.save_freq = 30
    config.eval_freq = 30
    config.resolution = 1024
    config.pretrained.model = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"

    config.sample.num_steps = 10
    config.sample.train_batch_size = 3
    config.sample.test_batch_size = 16
    config.sample.num_batches_per_epoch = 2
    config.sample.noise_level = 0.0

    config.train.teachers = [dict(PICKSCORE), dict(OCR)]
    config.train.batch_size = 3
    config.train.gradient_accumulation_steps = 2
    config.train.timestep_fraction = 0.99  # the first 9 of 10 steps
    config.train.ema = True

    # The model's own: bf16, 300 tokens, 20 steps, guidance 4.5.
    config.mixed_precision = config.max_sequence_length = config.sample.eval_num_steps = None
    config.sample.guidance_scale = config.sample.teacher_guidance_scale = config.sample.eval_guidance_scale = None
    return config
