"""A run from its configuration: plan, build, loop over rounds, save."""

from diffusionopd.training.loop import train
from diffusionopd.training.plan import base_config, check, load_config
from diffusionopd.training.stop import Stopped

__all__ = ["Stopped", "base_config", "check", "load_config", "train"]
