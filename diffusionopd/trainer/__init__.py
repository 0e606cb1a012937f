"""A run from its configuration: build, resume, loop over rounds, save."""

from diffusionopd.trainer.command import run_command
from diffusionopd.trainer.profiling import Profile, profile
from diffusionopd.trainer.run import Trainer, make_accelerator, train
from diffusionopd.trainer.state import RunError

__all__ = ["Profile", "RunError", "Trainer", "make_accelerator", "profile", "run_command", "train"]
