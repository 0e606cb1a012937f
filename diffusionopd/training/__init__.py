"""A run from its configuration: plan, build, loop over rounds, save."""

from diffusionopd.training.checks import check
from diffusionopd.training.keys import base_config, load_config
from diffusionopd.training.loop import train
from diffusionopd.training.presets import distillation_of, teacher_of
from diffusionopd.training.stop import Stopped

__all__ = ["Stopped", "base_config", "check", "distillation_of", "load_config", "teacher_of", "train"]
