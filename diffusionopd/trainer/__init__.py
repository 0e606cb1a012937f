"""A run from its configuration: build, resume, loop over rounds, save."""

from diffusionopd.trainer.run import RunError, Trainer, make_accelerator, train

__all__ = ["RunError", "Trainer", "make_accelerator", "train"]
