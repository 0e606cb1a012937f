"""Many LoRAs in one: `diffusionopd merge my_loras.csv`. No rewards, no test prompts, one GPU; docs/merging.md.

The student starts from the sum of the LoRAs and learns, on its own pictures, what each of them draws for its prompts.
Guidance is not folded in: the result is used as each of them is, under guidance and with negative prompts. It is
trained as it is used, because one student has one unconditional branch, which differs from that of each LoRA; what
counts is the guided velocity, and that is what is compared.
"""

from ml_collections import ConfigDict

from diffusionopd.training import base_config as _defaults


def get_config(name: str = "sd35") -> ConfigDict:
    """Return the configuration called ``name``: sd35 or tiny."""
    return globals()[name]()


def sd35() -> ConfigDict:
    """LoRAs of Stable Diffusion 3.5 Medium, or of the base that is named, with its own guidance, at 512x512.

    Command:   diffusionopd merge my_loras.csv [--config.pretrained.model=black-forest-labs/FLUX.1-dev]
    Hardware:  1 GPU, 16 GB: 11 GB of text encoders, then 11 GB for ten LoRAs; 12 images per round, 3 of each of 4
               LoRAs, which are drawn anew for each round
    Cost:      1.3 PFLOP per round (computed, as the memory, by diffusionopd cost --config config/merge.py
               --config.loras=my_loras.csv), 6 s on an H100 (measured with random weights)
    Expected:  not measured here; ten styles of the tiny world are in docs/merging.md
    """
    config = _merge("merge")
    config.mixed_precision = "bf16"
    config.activation_checkpointing = True
    config.num_epochs = 300
    config.save_freq = 50
    config.sample_freq = 25
    config.resolution = 512
    config.max_sequence_length = None  # the base's own, as its guidance
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"

    config.sample.guidance_scale = config.sample.teacher_guidance_scale = config.sample.eval_guidance_scale = None
    config.sample.num_steps = 10
    config.sample.eval_num_steps = 28
    config.sample.train_batch_size = 3
    config.train.batch_size = 3
    config.train.timestep_fraction = 0.99  # the first 9 of 10 steps
    config.train.steps_per_rollout = 5
    config.train.learning_rate = 3e-4
    return config


def tiny() -> ConfigDict:
    """LoRAs of the embedded tiny world, such as the ten styles of ``python -m diffusionopd.tiny.styles``.

    Command:   diffusionopd merge logs/tiny-styles/loras.csv --config config/merge.py:tiny
    Hardware:  1 CPU core; 16 images per round, 4 of each of 4 LoRAs
    Cost:      twelve minutes, the page included (measured on a CPU that had other work)
    Expected:  84% of each style's effect on average, where the plain sum has -323% and 37% at 1/n (docs/merging.md)
    """
    config = _merge("tiny-merge")
    config.num_epochs = 120
    config.save_freq = 50
    config.sample_freq = 20
    config.mixed_precision = "no"
    config.resolution = 64
    config.max_sequence_length = 14
    config.pretrained.model = "assets/tiny/model"

    config.sample.num_steps = 10
    config.sample.eval_num_steps = 10
    config.sample.guidance_scale = 1.0
    config.sample.teacher_guidance_scale = 1.0
    config.sample.eval_guidance_scale = 1.0
    config.sample.train_batch_size = 4
    config.train.batch_size = 4
    config.train.timestep_fraction = 0.99  # the first 9 of 10 steps
    config.train.steps_per_rollout = 4
    config.train.cfg = False
    config.train.learning_rate = 2e-3
    return config


def _merge(run_name: str) -> ConfigDict:
    config = _defaults()
    config.run_name = run_name
    config.eval_freq = 0
    config.monitor_freq = 0
    config.sample.noise_level = 0.0
    config.sample.num_batches_per_epoch = 4

    config.train.student_init = "teachers"
    config.train.lora_rank = 32
    config.train.lora_alpha = 32
    config.train.tasks_per_round = 4
    config.train.gradient_accumulation_steps = 4
    # Steps weigh equally, and LoRAs: a strong one would otherwise crowd out the others.
    config.train.target = "velocity"
    config.train.self_normalize = True
    config.train.ema = True
    config.train.ema_decay = 0.9
    config.train.ema_interval = 1
    config.train.ema_repeats = 1
    return config
