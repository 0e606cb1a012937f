"""Prompt files, which prompt each group of a round gets, and generators of prompt files.

`python -m diffusionopd.prompts geneval|ocr` writes training prompts (`geneval.py`, `ocr.py`).
"""

from diffusionopd.prompts.files import Prompt, PromptError, load_prompts
from diffusionopd.prompts.sampler import PromptSampler

__all__ = ["Prompt", "PromptError", "PromptSampler", "load_prompts"]
