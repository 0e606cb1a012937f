"""A run from its configuration: build, resume, loop over rounds, save."""

from diffusionopd.training.command import run_command
from diffusionopd.training.loop import Trainer, make_accelerator, train
from diffusionopd.training.profiling import profile
from diffusionopd.training.state import RunError
from diffusionopd.training.stop import Stopped

__all__ = ["RunError", "Stopped", "Trainer", "make_accelerator", "profile", "run_command", "train"]
