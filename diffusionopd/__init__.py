"""On-policy distillation of several task-specialised diffusion teachers into one student."""

__version__ = "0.1.0"
